"""Every method at equal numbers and settings on one model: `equipoise study`.

The folder holds one completions file a method, with its side files, and `study.json`, which says where they are. Each
method is a step of its own: one that fails leaves the others, and the same command goes on where it stopped.
"""

import dataclasses
import gc
import json
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from equipoise.documents import read_json
from equipoise.errors import LoneError, LostProcess, NonFiniteError, UserError
from equipoise.methods.costs import costs_path
from equipoise.methods.gen_filter import raw_path
from equipoise.methods.generate import NONFINITE_EXIT, TRAINED
from equipoise.methods.sample import Method, check_task, sample
from equipoise.methods.sft_config import FORCED, FORCED_SENTENCES, SftConfig, check_own_sentences
from equipoise.methods.study_config import METHODS, StudyConfig
from equipoise.protocol.plural import plural
from equipoise.protocol.reward import Event
from equipoise.protocol.task import PROTOCOL, Task
from equipoise.runs.files import write_file
from equipoise.runs.locks import locked_folder
from equipoise.runs.ownership import has_provenance, look, marked
from equipoise.runs.ranks import Ranks, joined

__all__ = ["METHODS", "StudyConfig", "study"]

FAILED_EXIT = 1
SFT_FEWEST = 300
"""For small studies, which are to end in minutes on two cores."""
RECORD = "study.json"


@dataclass(frozen=True)
class StudyOutcome:
    status: dict[str, str]
    """`done`, or why not, of every selected method."""
    exit_code: int
    """0 all done; 1 a defect in one; 2 or 3 as that method alone would have ended; 128 + signal when stopped."""


def study(
    config: StudyConfig,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
    begin: Callable[[], None] = lambda: None,
) -> StudyOutcome:
    """Make what is missing of the study. Raises UserError for what concerns all methods.

    `begin` is called before each method, whose `progress` counts from its own start. Of several processes the first one
    keeps the files, and all get the same outcome.
    """
    with joined() as ranks, ExitStack() as opened:
        say = say if ranks.first else _unsaid

        def open_folder() -> tuple[StudyConfig, dict[str, Any]]:
            _check_task(config)
            whole = _resolved(config, say)
            _check_task(whole)
            _look(whole)  # a refusal comes before a lock is put there
            where = whole.output_dir
            busy = f"making the study in {where}: wait for it, or choose another --output-dir"
            opened.enter_context(locked_folder(where, busy))
            return whole, _open(whole)

        ranks.in_pieces(config.pieces)  # or hours later sft would find that they cannot be shared
        whole, record = ranks.first_does(open_folder)
        return _study(whole, record, ranks, say, progress, begin)


def _unsaid(_line: str) -> None:
    pass


def _check_task(config: StudyConfig) -> None:
    """Raises UserError, before any model is looked for, where a method can get no sentence of the task that is given.
    Found out one method after the other, it would cost the hours of those before."""
    for method in config.selected:
        check_task(config.sampling(method))
    if config.task is not None and "sft" in config.selected and config.sft_data == FORCED:
        check_own_sentences(config.task, "--sft-data")


def _study(
    config: StudyConfig,
    record: dict[str, Any],
    ranks: Ranks,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
    begin: Callable[[], None],
) -> StudyOutcome:
    status: dict[str, str] = {}
    exit_code = 0
    for number, method in enumerate(config.selected, start=1):
        begin()
        say(f"{method}  (method {number} of {len(config.selected)})")
        status[method], code = _make(config, record, method, ranks, say, progress)
        if code > 128:
            return StudyOutcome(status, code)
        exit_code = exit_code or code
    return StudyOutcome(status, exit_code)


def _make(
    config: StudyConfig,
    record: dict[str, Any],
    method: Method,
    ranks: Ranks,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> tuple[str, int]:
    """(what happened, exit code) of one method, which is put into the record. Raises UserError where that cannot be
    written, on all ranks."""
    message, code, rows = _run(config, method, say, progress)
    _release()

    def note() -> tuple[str, int]:
        path = config.output_dir / f"{method}.csv"
        if path.exists() and rows is not None:
            entry = {"completions": path.name, "costs": costs_path(path).name, "status": message}
            more = {"gen-filter": {"raw": raw_path(path).name}, "sft": {"model": "sft_model"}}
            record["methods"][method] = entry | more.get(method, {})
            say(f"{method}  {message}: {_line(path, rows)}")
        else:
            record["methods"].setdefault(method, {})["status"] = message
            say(f"{method}  {message}")
        _write(config, record)
        return message, code

    return ranks.first_does(note)


def _run(
    config: StudyConfig, method: Method, say: Callable[[str], None], progress: Callable[[int, int], None]
) -> tuple[str, int, int | None]:
    """(what happened, exit code, rows). Whatever goes wrong is the method's own affair, but for a process that is gone:
    raises LostProcess."""
    try:
        if method == "sft":
            made = _sft(config, say, progress)
            if made:
                return "stopped", made, None
        changes: dict[str, Any] = {"base_model": config.model, "base_prompt": config.prompt}
        if method == "sft":
            changes |= {"model": str(config.output_dir / "sft_model")}
        elif method == "ppo":
            changes |= {"model": config.trained or TRAINED, "prompt": None}
        outcome = sample(config.sampling(method, **changes), say, progress)
        if outcome.status == "done":
            return "done", 0, len(outcome.texts)
        return outcome.status, outcome.exit_code, len(outcome.texts)
    except (LoneError, LostProcess):
        raise
    except UserError as error:
        return f"failed: {' '.join(str(error).split())}", 2, None
    except NonFiniteError as error:
        return f"failed: {error}", NONFINITE_EXIT, None
    except Exception as error:  # a defect in one method must not lose the hours of the others
        if not getattr(error, "told", False):
            traceback.print_exc()
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", FAILED_EXIT, None


def _sft(config: StudyConfig, say: Callable[[str], None], progress: Callable[[int, int], None]) -> int:
    """Get the sentences and learn from them; an exit code where that was stopped, else 0. Raises UserError."""
    from equipoise.methods.sft import sft
    from equipoise.policy.config import PolicyConfig

    assert config.task is not None
    event: Event = "strict"
    if config.sft_data == "ctrlg":
        # Not the method's own file: what is learnt from should not be what is compared with, and n may be small.
        data = str(config.output_dir / "sft_data" / "ctrlg.csv")
        event = "strict" if config.ctrlg.shape == "strict" else "both"
        assert config.sft_sentences is not None
        runs = -(-config.sft_sentences // len(config.task.names))
        say(f"sft learns from {plural(runs, 'sentence')} of Ctrl-G for each occupation, in {data}")
        wanted = config.sampling("ctrlg", output=Path(data), n=runs, seed=config.seed + 1, kl_sentences=0)
        outcome = sample(wanted, say, progress)
        if outcome.status != "done":
            return outcome.exit_code
        _release()
    elif config.sft_data == "gen-filter":
        data, event = str(config.output_dir / "gen-filter.csv"), config.filter
    else:
        data = config.sft_data
    assert config.prompt is not None
    policy = PolicyConfig(config.model, use_8bit=config.use_8bit, dtype=config.dtype, device=config.device)
    sft(
        SftConfig(
            data=data,
            output_dir=str(config.output_dir / "sft_model"),
            task=config.task,
            prompt=config.prompt,
            filter=event,
            sentences=config.sft_sentences if config.sft_data == FORCED else None,
            epochs=config.sft_epochs,
            learning_rate=config.sft_learning_rate,
            seed=config.seed,
            pieces=config.pieces,
            check=0,
            overwrite=config.overwrite,
            policy=policy,
        ),
        say,
    )
    _release()
    return 0


def _resolved(config: StudyConfig, say: Callable[[str], None]) -> StudyConfig:
    """With the task, the model, the prompt and the trained folder filled in. Raises UserError."""
    from equipoise.methods.prompted import own_prompt, training_record
    from equipoise.policy.source import recorded_task, resolve

    found = config.trained or (TRAINED if any(Path(TRAINED).glob("*.safetensors")) else None)
    trained = resolve(found) if found else None
    record = training_record(trained) if trained else {}
    if config.trained and not record:
        raise UserError(f"{config.trained} does not say how it was trained: name a folder that training made")
    task = config.task or (recorded_task(trained) if trained else None) or PROTOCOL
    model = config.model if config.model != "auto" else record.get("model") or "bundled"
    prompt = config.prompt or own_prompt(record, task)
    resolve(model)
    for spec in (prompt, config.best_prompt):
        task.prompt(spec)
    methods = config.methods or ",".join((*config.selected, *(["ppo"] if found else [])))
    base = f"base model {model}, prompt {prompt.partition('=')[0]}"
    say(
        f"{base}, {plural(config.n, 'sentence')} for each of {plural(len(task.names), 'occupation')}, in "
        f"{config.output_dir}"
    )
    if task != PROTOCOL:
        say(f"task {task.name}, of all methods")
    if found:
        say(f"ppo is the model in {found}")
    elif not config.methods:
        say("no model trained with PPO was found, so ppo is left out: train one, or name it with --trained")
    budget = config.sampling("gen-filter").draws(task)
    sentences = config.sft_sentences or min(FORCED_SENTENCES, max(SFT_FEWEST, config.n * len(task.names)))
    return replace(
        config,
        task=task,
        trained=found,
        model=model,
        prompt=prompt,
        methods=methods,
        budget=budget,
        sft_sentences=sentences,
    )


FREE_TO_CHANGE = {"methods", "trained", "overwrite", "output_dir", "batch_size", "budget", "pieces"}
"""What may differ when a study is continued: which methods, and what does not change their sentences."""


def _open(config: StudyConfig) -> dict[str, Any]:
    """The record, new or continued. Raises UserError where the folder holds a study with other settings."""
    from equipoise.runs.records import provenance

    assert config.task is not None
    settings = json.loads(json.dumps(dataclasses.asdict(replace(config, task=None)), default=str))
    # As numbers, whatever the defaults become.
    settings["top_p"] = config.sampling("prompt-only").nucleus
    settings["ctrlg_top_p"] = config.sampling("ctrlg").nucleus
    del settings["task"]
    settings["task"] = config.task.document()
    path, found = config.output_dir / RECORD, _look(config)
    methods: dict[str, Any] = {}
    if found:
        changed, methods = _changes(found["settings"], settings, config.task, path), dict(found["methods"])
        if changed and not config.overwrite:
            raise UserError(
                f"{config.output_dir} holds a study with other settings ({'; '.join(changed)}): use the same to "
                "continue it, another --output-dir for a new one, or --overwrite to start anew"
            )
        if changed:
            methods = {}
        elif found["settings"].get("dtype") == "auto" and not config.overwrite:
            # Naming a dtype goes on with files that are in it, and changes nothing about those that are not.
            settings["dtype"] = "auto"
    record = marked({"settings": settings, "methods": methods, "provenance": provenance()})
    _write(config, record)
    return record


def _look(config: StudyConfig) -> dict[str, Any]:
    """The record of the study that the folder holds, empty where there is none. Raises UserError for what is not a
    study's, with --overwrite too."""
    path = config.output_dir / RECORD
    found = look(path, _is_study, b'{"settings":{')
    if found.state == "absent":
        return {}
    if found.state == "ours" and all(isinstance(found.document.get(n), dict) for n in ("settings", "methods")):
        return found.document
    raise UserError(
        f"{path} cannot be read, damaged or somebody else's as it is: restore it, move it away, or choose another "
        "--output-dir"
    )


def _is_study(document: Mapping[str, Any]) -> bool:
    """The shape of a record before records were marked."""
    made = document.get("provenance")
    return set(document) == {"settings", "methods", "provenance"} and isinstance(made, dict) and has_provenance(made)


def _changes(recorded: Mapping[str, Any], settings: Mapping[str, Any], task: Task, path: Path) -> list[str]:
    """What differs from the recorded settings and may not."""
    from equipoise.runs.records import differences, task_on_record

    old, new = ({k: v for k, v in each.items() if k != "task"} for each in (recorded, settings))
    # Where `auto` has become another dtype, the files go on in theirs once it is named: they compare it themselves.
    free = FREE_TO_CHANGE | ({"dtype"} if old.get("dtype") == "auto" else set())
    return differences(old, new, free) + task_on_record(recorded, str(path)).differences(task)


def _write(config: StudyConfig, record: Mapping[str, Any]) -> None:
    write_file(config.output_dir / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _line(path: Path, rows: int) -> str:
    """What a method has come to, in one line."""
    try:
        costs = read_json(costs_path(path))
        accepted, generations = costs["accepted"], costs["generations"]
    except (OSError, ValueError, KeyError):
        return f"{plural(rows, 'row')} so far"
    line = f"{plural(rows, 'row')}, {accepted:,} of {generations:,} drawn comply"
    if "kl" in costs:
        line += f", KL {costs['kl']['value']:z.2f} nats"
    return f"{line}, {costs['seconds'] + costs['load_seconds']:.0f} s"


def _release() -> None:
    """Give back the memory of a method's model."""
    import torch

    gc.unfreeze()  # loading for training puts all that lives out of the collector's sight
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
