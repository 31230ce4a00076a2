"""Whose folders a run is given: what may be continued, what is begun anew, and what is left alone.

A run has a name of its own, drawn when it begins: in `run.json` of its output folder, and in `records.json` of its
checkpoint folder, which also says where the output folder is. Only folders of one name belong together, so that no run
cuts another's rows or adds to them. Runs of before there were names are told by their settings alone.
"""

import dataclasses
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from equipoise.errors import UserError
from equipoise.policy.config import PolicyConfig
from equipoise.policy.eightbit import NAMES
from equipoise.policy.load import eight_bits, pick_device
from equipoise.policy.placed import EXPORTED, MODELS, is_finished, not_ours, refuse_foreign
from equipoise.ppo.computed import continued, unlike_a_new_run
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.functions import TRACEBACK
from equipoise.ppo.run_config import RunConfig
from equipoise.ppo.summary import FINAL, SUMMARY, UNTRAINED
from equipoise.ppo.tracking.trackers import RECORD as TRACKERS
from equipoise.protocol.plural import plural
from equipoise.protocol.task import PROTOCOL, task_from_document
from equipoise.runs.checkpoint import Checkpoint, discard_all, newest
from equipoise.runs.exported import RECORD
from equipoise.runs.files import set_aside, unwritable, write_json
from equipoise.runs.ownership import OWNER, Found, look, marked, read_run_record, refuse_checkpoints_own
from equipoise.runs.ranks import Ranks
from equipoise.runs.records import differences
from equipoise.runs.targets import is_target_file, with_rates

ROWS = ("training_metrics.csv", "metrics.jsonl", "samples.jsonl", "eval.jsonl")
"""What a start without a checkpoint would cut."""
OUTPUT_FILES = (*ROWS, "events.jsonl", SUMMARY, FINAL, UNTRAINED, TRACEBACK, TRACKERS)
"""All that a run writes into its output folder, besides its record and the model."""

# What may differ when a run is continued: how long it goes on, and what has no influence on the numbers.
# Smaller passes and recomputing change rounding alone, and depend on how much memory was free; pieces likewise, and are
# told of.
FREE_TO_CHANGE = {
    *(
        "steps",
        "preset",
        "policy.gradient_checkpointing",
        "policy.tensor_parallel",
        "ppo.micro_batch_size",
        "ppo.pieces",
        "evaluation.final_sentences",
        "evaluation.pair_rates",
    )
} | {f"run.{f.name}" for f in dataclasses.fields(RunConfig)}


class Owner(NamedTuple):
    """What the checkpoint folder says of its run."""

    folder: Path
    run: str
    output: str
    """The output folder, as an absolute path."""
    saved: bool
    """Whether a checkpoint was ever complete."""

    def write(self) -> None:
        """Raises UserError."""
        write_json(
            self.folder / OWNER,
            marked({"run": self.run, "output_dir": self.output, "saved": self.saved}),
        )


class Claimed(NamedTuple):
    own: Owner
    resumed: Checkpoint | None
    """What to continue from."""
    complete: bool
    """Whether nothing is left to do."""
    mended: bool
    """Whether the record has to be written again, damaged as it was."""
    notices: tuple[str, ...]
    prompts: Mapping[str, str]
    """What is on record of the rendered prompts; empty where nothing is left to do."""
    policy: PolicyConfig
    """As configured; of a run that goes on with the dtype that it began with."""


def check_folders(config: TrainConfig) -> None:
    """Raises UserError where somebody else's files lie where a run's would be written. Writes nothing."""
    output, checkpoints = Path(config.run.output_dir), Path(config.run.checkpoint_dir)
    for folder, option in ((output, "--output-dir"), (Path(config.run.tensorboard_dir), "--tensorboard-dir")):
        refuse_checkpoints_own(folder, option, checkpoints)
    refuse_checkpoints_own(checkpoints, "--checkpoint-dir")
    try:
        names = os.listdir(output) if output.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read {output} ({error.strerror}): choose another --output-dir") from None
    owner = look(checkpoints / OWNER, lambda _: False)
    if owner.state == "foreign":
        raise UserError(
            f"{checkpoints / OWNER} is there and no run of equipoise wrote it: choose another --checkpoint-dir, or "
            "move it away"
        )
    record = read_run_record(output)
    known = record.state in ("ours", "damaged") or _names(owner, output)
    if record.state == "foreign" and not known:
        raise UserError(
            f"{output} holds files that no run of equipoise wrote (its run.json is damaged, or somebody else's): "
            "choose another folder with --output-dir, or move them away"
        )
    suffixes = (".safetensors", ".json", ".csv", ".bin")
    if not known and any(name.endswith(suffixes) or name in OUTPUT_FILES for name in names):
        raise UserError(
            f"{output} holds files that no run of equipoise wrote (there is no run.json): "
            "choose another folder with --output-dir, or move them away"
        )
    if links := [name for name in (*OUTPUT_FILES, "run.json") if (output / name).is_symlink()]:
        raise UserError(f"{output / links[0]} is a link, and nothing is written through one: move it away")
    refuse_foreign(output)


def _names(owner: Found, output: Path) -> bool:
    """Whether the checkpoint folder's own record says that its run writes to `output`."""
    return owner.document.get("output_dir") == str(output.resolve())


def claim(config: TrainConfig, overwrite: bool, prompts: Callable[[], Mapping[str, str]] = dict) -> Claimed:
    """Find out what is there; with the locks held. Raises UserError for what must not be touched."""
    check_folders(config)  # again: it may have changed before the lock was had
    output, checkpoints = Path(config.run.output_dir), Path(config.run.checkpoint_dir)
    if overwrite:
        _clear(output, checkpoints)
    owner = look(checkpoints / OWNER, lambda _: False)
    record, notices = read_run_record(output), []
    resumed = newest(checkpoints)
    mended = record.state in ("damaged", "foreign")
    if mended and (resumed is None or not _names(owner, output)):
        raise UserError(
            f"{output / 'run.json'} is damaged, so nothing says which run the files beside it are of: restore it, "
            "choose another --output-dir, or --overwrite to start anew"
        )
    begun = [name for name in (*ROWS, *MODELS) if _size(output / name)]
    _check_settings(config, resumed, record if begun else None)
    run = _paired(config, record, owner, resumed, begun)
    step = resumed.step if resumed else 0
    if step > config.steps:
        raise UserError(
            f"{checkpoints} is at step {step}, past --steps {config.steps}: ask for at least {plural(step, 'step')}"
        )
    saved = resumed is not None or (run is not None and owner.document.get("saved") is True)
    own = Owner(checkpoints, run or secrets.token_hex(8), str(output.resolve()), saved)
    complete = resumed is not None and step == config.steps and is_finished(output, config.run.save)
    policy = config.policy if resumed is None else continued(config.policy, resumed)
    if resumed is not None and not complete:
        notices += _rounded_otherwise(record, base_weights(policy)) + unlike_a_new_run(config.policy, policy)
    rendered = {} if complete and not mended else dict(prompts())
    _check_prompts(config, resumed, record, rendered)
    if mended:  # last of all, when nothing is refused any more
        notices.append(f"run.json was damaged; it is now {set_aside(output / 'run.json').name}, and written anew")
    return Claimed(own, resumed, complete, mended, tuple(notices), rendered, policy)


def base_weights(policy: PolicyConfig) -> str | None:
    """What the frozen weights are rounded to on this machine, by its name; None where they are not."""
    into = eight_bits(policy, pick_device(policy.device))
    return None if into is None else NAMES[into]


def _rounded_otherwise(record: Found, now: str | None) -> list[str]:
    """A line where the run's frozen weights were rounded to another format before, on another card."""
    if now is None or not record.document:
        return []
    before = record.document.get("base_weights") or NAMES[torch.int8]  # which records did not name at first
    if before == now:
        return []
    return [
        f"the frozen weights were rounded to {before} so far, and are to {now} on this device: the policy that goes on "
        "differs from the one that stopped by that much"
    ]


def in_pieces(config: TrainConfig, resumed: Checkpoint | None, processes: int) -> tuple[TrainConfig, list[str]]:
    """The configuration with the number of pieces that so many processes share: what was asked for, else what the run
    had before, else one for each; and a line where that is not what the run had before.

    Raises UserError where the processes could not share them alike."""
    ppo, before = config.ppo, None
    if resumed is not None:
        recorded = resumed.document("config").get("ppo", {})
        before = int(recorded.get("pieces") or 1)
    kept = before is not None and before % processes == 0 and ppo.mini_batch_size % before == 0
    pieces = ppo.pieces or (before if before is not None and kept else processes)
    Ranks(size=processes).in_pieces(pieces)
    if ppo.mini_batch_size % pieces:
        larger = pieces * -(-ppo.mini_batch_size // pieces)
        raise UserError(
            f"mini-batch-size {ppo.mini_batch_size} is not a multiple of {plural(pieces, 'piece')}, one for each "
            f"process: start as many processes as divide it, or give --mini-batch-size {larger}"
        )
    notices = []
    if before is not None and before != pieces:
        notices.append(
            f"mini-batches are now cut into {plural(pieces, 'piece')} and were cut into {before}: from here on sums "
            f"are rounded otherwise. As many processes as divide {before}, with --pieces {before}, keep them as they "
            "were"
        )
    return replace(config, ppo=replace(ppo, pieces=pieces)), notices


def _check_prompts(config: TrainConfig, resumed: Checkpoint | None, record: Found, rendered: Mapping[str, str]) -> None:
    """Raises UserError where a run is on record whose prompts are not these; records of before they were kept tell
    nothing."""
    if resumed is None:
        return
    known = "prompts.json" in resumed.files
    recorded = {
        config.run.checkpoint_dir: resumed.document("prompts") if known else None,
        config.run.output_dir: record.document.get("prompts"),
    }
    for folder, old in recorded.items():
        if isinstance(old, Mapping) and old and rendered and (changed := differences(old, rendered)):
            raise UserError(
                f"{folder} holds a run whose prompts were rendered otherwise ({'; '.join(changed)}): put the model's "
                "chat template and tokenizer back to continue it, use other folders (--output-dir, --checkpoint-dir), "
                "or --overwrite to start anew"
            )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_settings(config: TrainConfig, resumed: Checkpoint | None, record: Found | None) -> None:
    """Raises UserError where a checkpoint or the records are of other settings than these."""
    recorded = {
        config.run.checkpoint_dir: resumed.document("config") if resumed else None,
        config.run.output_dir: record.document.get("config") if record else None,
    }
    for folder, old in recorded.items():
        if isinstance(old, Mapping) and (changed := _changes(old, config)):
            raise UserError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}): use the same to continue it, "
                "other folders (--output-dir, --checkpoint-dir) for a new run, or --overwrite to start anew"
            )


def as_begun(config: TrainConfig) -> TrainConfig:
    """The configuration with the sentences of its target that the run in its output folder began with, where there is
    one and they are still there: whatever they would be named now. Reads no checkpoint and writes nothing.

    Raises UserError where that run has other settings, and for somebody else's files: before the minutes that a target
    takes."""
    check_folders(config)
    output, warm = Path(config.run.output_dir), config.warm_start
    if warm.warm_start_file or not any(_size(output / name) for name in (*ROWS, *MODELS)):
        return config
    record = read_run_record(output)
    _check_settings(config, None, record)
    recorded = record.document.get("config", {}).get("warm_start", {}).get("warm_start_file", "")
    if not (is_target_file(warm.warm_start_target, recorded) and all(map(os.path.isfile, with_rates(recorded)))):
        return config
    return replace(config, warm_start=replace(warm, warm_start_file=recorded))


def _paired(
    config: TrainConfig, record: Found, owner: Found, resumed: Checkpoint | None, begun: list[str]
) -> str | None:
    """The name of the run that both folders are of; None for a new one. Raises UserError where they do not belong
    together, and going on would cut records, or mix those of two runs."""
    output, checkpoints = Path(config.run.output_dir), Path(config.run.checkpoint_dir)
    named, holds = _name(record), _name(owner)
    if record.state in ("damaged", "foreign"):
        named = holds  # `claim` made sure that the checkpoint folder is this one's
    if begun:
        what = "a finished model" if set(MODELS) & set(begun) else "a run's records"
        other = ": choose another --output-dir for a new run, or --overwrite to start anew in its place"
        if resumed is None and (named is None or named != holds or owner.document.get("saved") is True):
            was = _checkpoints_of(record)
            raise UserError(
                f"{output} holds {what} ({begun[0]}) and {checkpoints} no checkpoint to continue from: name its folder "
                f"of checkpoints with --checkpoint-dir{was}{other.replace(': choose', ', choose')}"
            )
        if named != holds:
            raise UserError(
                f"{output} holds {what} ({begun[0]}) and {checkpoints} the checkpoints of another run: name its own "
                f"with --checkpoint-dir{_checkpoints_of(record)}{other.replace(': choose', ', choose')}"
            )
        return holds
    if resumed is None:
        return None
    if holds is not None and named != holds:
        place = owner.document.get("output_dir")
        if isinstance(place, str) and Path(place) != output.resolve():
            elsewhere = read_run_record(Path(place))
            if _name(elsewhere) == holds:
                raise UserError(
                    f"{checkpoints} holds the checkpoints of the run in {place}: name that --output-dir to continue "
                    "it, another --checkpoint-dir for a new run, or --overwrite to start anew"
                )
    return holds


def _checkpoints_of(record: Found) -> str:
    run = record.document.get("config", {}).get("run")
    folder = run.get("checkpoint_dir") if isinstance(run, Mapping) else None
    return f" (it was {folder})" if isinstance(folder, str) else ""


def _name(record: Found) -> str | None:
    name = record.document.get("run")
    return name if isinstance(name, str) else None


def as_now(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded configuration, with the options that there were not yet when it was written: at their defaults, which
    leave everything as it was."""
    default = TrainConfig().document()
    filled = {name: value for name, value in default.items() if name != "task"} | dict(recorded)
    for name, value in recorded.items():
        if isinstance(value, Mapping) and isinstance(default.get(name), Mapping) and name != "task":
            filled[name] = {**default[name], **value}
    return filled


def _changes(recorded: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """What differs between a recorded configuration and this one and matters to the numbers."""
    old, new = as_now(recorded), config.document()
    reward = dict(old.get("reward", {}))
    # Records of before tasks had files are of the default task, with the bounds among the reward's numbers.
    bounds = (reward.pop("min_words", None), reward.pop("max_words", None))
    before = old.pop("task", None)
    task = task_from_document(before, "the record of the run") if before else PROTOCOL.with_bounds(*bounds)
    del new["task"]
    # A target's sentences are known by what they are made from, which is compared, not by where they lie: the cache may
    # be moved, and another version name its files otherwise.
    for group in (old["warm_start"], new["warm_start"]):
        if is_target_file(group["warm_start_target"], group["warm_start_file"]):
            group["warm_start_file"] = ""
    return differences(old | {"reward": reward}, new, FREE_TO_CHANGE) + task.differences(config.task)


def _clear(output: Path, checkpoints: Path) -> None:
    """Start anew: remove the earlier run's checkpoints and files, and nothing else. Raises UserError."""
    discard_all(checkpoints)
    try:
        _clear_dumps(checkpoints / "nonfinite")
        (checkpoints / OWNER).unlink(missing_ok=True)
        model = set(EXPORTED) - {path.name for path in not_ours(output)}
        record = read_run_record(output)
        if record.state == "foreign":
            set_aside(output / "run.json")
        if record.state != "absent":
            for name in (*OUTPUT_FILES, *sorted(model), RECORD, "run.json"):  # what tells whose they are is the last
                (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(Path(error.filename or output), error) from error


def _clear_dumps(folder: Path) -> None:
    """The batches of an earlier run's non-finite steps; the folder stays where anything else lies in it."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.glob("step-*"):
        if path.suffix in (".json", ".safetensors") and path.is_file():
            path.unlink()
    if not any(folder.iterdir()):
        shutil.rmtree(folder)
