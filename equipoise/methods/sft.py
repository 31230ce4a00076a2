"""Supervised fine-tuning on compliant sentences of any method, or on the model's own: `equipoise sft`.

The model is left in a folder as training with PPO leaves its own: merged, with its task in `task.yaml` and the prompt
it belongs to in `run.json`. A run takes minutes and is done again from the start if it was stopped; the same data, seed
and number of pieces give the same model, however many processes share them. Of those the first one alone reads the data
and keeps the folder.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from equipoise.errors import UserError
from equipoise.methods.sft_config import (
    FORCED,
    OUT,
    SENTENCES,
    GivenSentences,
    OwnSentences,
    SftConfig,
    check_own_sentences,
)
from equipoise.protocol.plural import plural
from equipoise.protocol.task import PROTOCOL, Task
from equipoise.runs.locks import locked_folder
from equipoise.runs.ownership import read_run_record, refuse_checkpoints_own
from equipoise.runs.ranks import Ranks, joined

if TYPE_CHECKING:
    from equipoise.policy.load import Policy

__all__ = ["SftConfig", "sft"]


def sft(config: SftConfig, say: Callable[[str], None] = print) -> Path:
    """Train, unless the same training has left its model there, and return the folder. Raises UserError, with the
    folder as it was, and NonFiniteError; both on all ranks."""
    with joined() as joint, ExitStack() as opened:
        ranks = joint.in_pieces(config.pieces)
        say = say if ranks.first else _unsaid
        plan = ranks.first_does(lambda: _plan(config, opened))
        if plan.there:
            say(f"{config.output_dir} holds this very model already; --overwrite trains it anew")
        else:
            _train(config, plan, say, ranks)
        ranks.first_does(lambda: _push(config, say))
    return Path(config.output_dir)


class _Plan(NamedTuple):
    """What is to be learnt, as the host of rank 0 tells."""

    task: Task
    settings: dict[str, Any]
    """What decides the model."""
    there: bool
    """Whether the folder holds it."""


def _push(config: SftConfig, say: Callable[[str], None]) -> None:
    """Raises UserError."""
    from equipoise.policy.push import push

    push(Path(config.output_dir), config, say)


def _unsaid(_line: str) -> None:
    pass


def _plan(config: SftConfig, opened: ExitStack) -> _Plan:
    """Leaves the folder locked until `opened` is closed. Raises UserError."""
    source = config.source
    # Only here: `--help` and a mistyped option need not wait for torch.
    from equipoise.methods import fine_tune
    from equipoise.policy.prompt import render_prompts
    from equipoise.policy.push import check_push
    from equipoise.policy.source import load_tokenizer, recorded_task, resolve

    if isinstance(source, OwnSentences) and config.task is not None:
        check_own_sentences(config.task)
    model = resolve(config.policy.model)
    check_push(config, model)
    task = config.task or recorded_task(model) or PROTOCOL
    spec = config.prompt or task.default_prompt.name
    prompt = task.prompt(spec)
    if isinstance(source, GivenSentences):
        fine_tune.check_file(source, task)
    else:
        check_own_sentences(task)
    _, rendered = render_prompts(load_tokenizer(model), prompt, task, config.system)
    settings = _settings(config, source, spec, task) | rendered
    folder = Path(config.output_dir)
    _is_there(folder, settings, task, config.overwrite, config.save)  # a refusal comes before a lock is put there
    opened.enter_context(locked_folder(folder, f"training in {folder}: wait for it, or choose another --output-dir"))
    return _Plan(task, settings, _is_there(folder, settings, task, config.overwrite, config.save))


def _loaded(
    config: SftConfig, plan: _Plan, say: Callable[[str], None], ranks: Ranks
) -> "tuple[Policy, dict[str, list[int]]]":
    """The model that learns, the same on all ranks, and the prompts as token ids. Raises UserError, on all."""
    import torch

    from equipoise.policy.alike import check_alike
    from equipoise.policy.config import SamplingConfig
    from equipoise.policy.load import load_policy
    from equipoise.policy.prompt import render_prompts
    from equipoise.policy.verify import settle

    made = []

    def load() -> None:
        prompt = plan.task.prompt(plan.settings["prompt"])
        torch.manual_seed(config.seed)  # adapters start at random
        policy = load_policy(config.policy, prompt, ranks)
        prompts, _ = render_prompts(policy.tokenizer, prompt, plan.task, config.system)
        settle(policy, list(prompts.values()), SamplingConfig().max_new_tokens, say)
        made.append((policy, prompts))

    ranks.each(load)
    ((policy, prompts),) = made
    check_alike(policy, list(prompts.values()), ranks)
    policy.ways = ranks.first_does(lambda: policy.ways)  # found by each with its own rounding
    return policy, prompts


def _train(config: SftConfig, plan: _Plan, say: Callable[[str], None], ranks: Ranks) -> None:
    """Learn, and leave the model in its folder."""
    import torch

    from equipoise.learning.supervised import Supervision, supervise
    from equipoise.methods import fine_tune
    from equipoise.ppo.computed import computed

    task, spec, folder, source = plan.task, plan.settings["prompt"], config.output_dir, config.source
    policy, prompts = _loaded(config, plan, say, ranks)
    ranks.first_does(lambda: fine_tune.rehearse_export(policy, config, task, spec))
    data = fine_tune.collect_rows(source, config, task, policy, prompts, say, ranks)
    generator = torch.Generator().manual_seed(config.seed)
    at_most = source.at_most if isinstance(source, GivenSentences) else None
    split = fine_tune.split_held_out(data.examples.examples, at_most, config.held_out, generator)
    fine_tune.check_enough(split, data, config.data, config.filter)
    say(
        f"learning {plural(len(split.learnt), 'sentence')} with {len(split.held_out):,} held out, "
        f"{plural(config.epochs, 'epoch')}, "
        f"learning rate {config.rate:g}, {config.policy.tuning}"
    )
    began = time.perf_counter()
    how = Supervision(config.epochs, config.rate, warmup=config.warmup, decay=True)
    losses = supervise(policy, split.learnt, generator, how, packed=True, say=say, held_out=split.held_out, ranks=ranks)
    policy.forget_recordings()
    seconds = time.perf_counter() - began
    record = fine_tune.record_of(plan.settings, data, split, losses, seconds, ranks.pieces, computed(config.policy))
    ranks.first_does(lambda: fine_tune.export_trained(policy, config, task, spec, record, data.found))
    say(f"the model is in {folder}: equipoise sample --method sft --model {folder} writes sentences with it")
    if config.check:
        for line in fine_tune.look(policy, task, prompts, config.check, config.seed, ranks).splitlines():
            say(line)


def _settings(config: SftConfig, source: OwnSentences | GivenSentences, prompt: str, task: Task) -> dict[str, Any]:
    """What decides the model, with `method`, the task, and a file's contents in place of its path."""
    plain = dataclasses.asdict(dataclasses.replace(config, task=None, prompt=prompt))
    document = json.loads(json.dumps(plain, default=str))
    for name in ("data", "output_dir", "overwrite", "check", "candidates", "budget", "pieces", "task", *OUT):
        del document[name]
    for name in ("text_column", "occupation_column", "encoding"):
        if document[name] is None:
            del document[name]
    if document["form"] == "auto":
        del document["form"]
    document |= {"method": "sft", "learning_rate": config.rate}
    if isinstance(source, OwnSentences):
        return {"data": FORCED, **document, **source._asdict(), "task": task.document()}
    with source.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"data_sha256": digest, **document, "task": task.document()}


def _check_folder(folder: Path) -> None:
    """Raises UserError where anything but such a training's model lies where it would be written. Writes nothing."""
    from equipoise.policy.placed import EXPORTED, refuse_foreign
    from equipoise.runs.exported import RECORD, exported_to

    refuse_checkpoints_own(folder, "--output-dir")
    record = read_run_record(folder)
    config = record.document.get("config")
    if record.state != "absent" and not (isinstance(config, dict) and config.get("method") == "sft"):
        raise UserError(
            f"{folder} holds a model that equipoise sft did not make, or its run.json is damaged: choose another "
            "--output-dir"
        )
    if record.state == "absent" and folder.is_dir():
        try:
            names = os.listdir(folder)
        except OSError as error:
            raise UserError(f"cannot read {folder} ({error.strerror}): choose another --output-dir") from None
        # A kill may have left an export without its run.json.
        others = set(names) - exported_to(folder).keys() - {RECORD}
        if any(name.endswith((".safetensors", ".json", ".bin")) for name in others):
            raise UserError(f"{folder} holds files that equipoise did not write: choose another --output-dir")
    refuse_foreign(folder, (*EXPORTED, "run.json", SENTENCES))


def _is_there(folder: Path, settings: dict[str, Any], task: Task, overwrite: bool, save: str) -> bool:
    """Whether this very training is done. Raises UserError for a folder that holds another."""
    from equipoise.policy.placed import is_finished
    from equipoise.ppo.computed import trained_in
    from equipoise.runs.records import differences, task_on_record

    _check_folder(folder)
    document = read_run_record(folder).document
    recorded = document.get("config")
    if overwrite or recorded is None or not is_finished(folder, save):
        return False
    # Records of before prompts were fingerprinted do not tell how they were rendered.
    apart = {"task"} if "prompts" in recorded else {"task", "prompts", "prompt_date"}
    was, now = recorded.get("policy", {}).get("dtype"), settings["policy"]
    named = was == "auto" and now["dtype"] == trained_in(document, now["device"])  # now, and `auto` was that one
    free = {"policy.dtype"} if named else set()
    old, new = ({k: v for k, v in each.items() if k not in apart} for each in (recorded, settings))
    if changed := differences(old, new, free) + task_on_record(recorded, str(folder / "run.json")).differences(task):
        raise UserError(
            f"{folder} holds a model trained with other settings ({'; '.join(changed)}): choose another --output-dir, "
            "or --overwrite to train anew in its place"
        )
    return True
