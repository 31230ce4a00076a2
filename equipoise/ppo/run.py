"""One run on disk: its folders, what may be resumed, what is saved and when."""

import dataclasses
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from equipoise.errors import UserError
from equipoise.learning.optimizer import MasterAdam
from equipoise.policy.card import ModelCard
from equipoise.policy.export import WEIGHTS, export, rehearse
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.policy.source import TASK
from equipoise.ppo.config import RunConfig, TrainConfig
from equipoise.ppo.log import RunLog
from equipoise.ppo.state import State
from equipoise.protocol.plural import plural
from equipoise.protocol.task import PROTOCOL, task_from_document
from equipoise.runs.checkpoint import (
    Checkpoint,
    at_step,
    discard_after,
    list_checkpoints,
    newest,
    prune,
    save_checkpoint,
)
from equipoise.runs.files import make_folder, write_json
from equipoise.runs.records import differences, provenance

# All that a run may write into its output folder. Whatever else lies there is somebody's.
OUTPUT_FILES = (
    *("run.json", "training_metrics.csv", "metrics.jsonl", "samples.jsonl", "events.jsonl", "eval.jsonl"),
    *(WEIGHTS, "config.json", "generation_config.json", "README.md", "chat_template.jinja", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json"),
    *("vocab.txt", "merges.txt", "summary.json", "final_sentences.jsonl", TASK),
)

# What may differ when a run is continued: how long it goes on, and what has no influence on the numbers.
# Smaller passes and recomputing change rounding alone, and depend on how much memory was free.
FREE_TO_CHANGE = {
    *("steps", "preset", "policy.gradient_checkpointing", "ppo.micro_batch_size", "evaluation.final_sentences")
} | {f"run.{f.name}" for f in dataclasses.fields(RunConfig)}


class Run:
    """Use as a context manager: `with Run.open(config) as run`. Holds a lock, so that no two processes share a run."""

    def __init__(self, config: TrainConfig, log: RunLog, resumed: Checkpoint | None, complete: bool, lock: Any) -> None:
        self.config = config
        self.log = log
        self.resumed = resumed
        self.complete = complete
        self.prompts: Mapping[str, str] = {}
        """What is on record of the rendered prompts."""
        self.checkpoints = Path(config.run.checkpoint_dir)
        self.saved_step = resumed.step if resumed else -1
        self.saved_at = time.monotonic()
        self.dumps = 0
        self._save_seconds = 0.0
        self._lock = lock
        self._asynchronous = torch.cuda.is_available()
        """Whether checkpoints may be written while training goes on: 1.6 GB of SmolLM2 take as long as 20 steps."""
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self.log.close()
            self._lock.close()

    def wait(self) -> None:
        """Until the checkpoint is on the disk that is being written. Raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        *,
        overwrite: bool,
        functions: Mapping[str, str] | None = None,
        prompts: Callable[[], Mapping[str, str]] = dict,
    ) -> "Run":
        """Find out what is there. Raises UserError rather than touch anything that is not this run's.

        Both go into the record: `functions`, what stands in place of the protocol's reward and rank, by name;
        `prompts` gives what `render_prompts` says of them: a run goes on with the prompts it began with, or not at all.
        """
        for folder in (config.run.output_dir, config.run.checkpoint_dir, config.run.tensorboard_dir):
            make_folder(Path(folder))
        lock = _lock(Path(config.run.checkpoint_dir))
        try:
            if overwrite:
                prompts()  # which may refuse: before anything is removed
            resumed, complete = _find(config, overwrite)
            rendered = {} if complete else dict(prompts())
            _check_prompts(config, resumed, rendered)
            facts = {**(functions or {}), "prompts": rendered}
            run = cls(config, _begin(config, facts, resumed, complete), resumed, complete, lock)
            run.prompts = rendered
            return run
        except BaseException:
            lock.close()
            raise

    def newest(self) -> Checkpoint | None:
        self.wait()
        return newest(self.checkpoints)

    def checkpoint_at(self, step: int) -> Checkpoint | None:
        self.wait()
        return at_step(self.checkpoints, step)

    def is_due(self, state: State) -> bool:
        """Whether this step's checkpoint is one of those that are kept. A skipped step is no place to come back to."""
        return state.step % self.config.run.save_every == 0 and state.bad_in_a_row == 0

    def save_if_due(self, optimizer: MasterAdam, state: State) -> None:
        late = time.monotonic() - self.saved_at > 60 * self.config.run.save_minutes
        if self.is_due(state) or (late and state.bad_in_a_row == 0):
            self.save(optimizer, state, asynchronous=self._asynchronous)

    def replace_from(self, step: int, optimizer: MasterAdam, state: State) -> None:
        """The run has gone back to `step` and goes on otherwise: delete what came after, save `step` as it is now."""
        self.wait()
        discard_after(self.checkpoints, step)
        self.saved_step = -1
        self.save(optimizer, state)

    def save(self, optimizer: MasterAdam, state: State, *, asynchronous: bool = False) -> None:
        """Write the checkpoint of `state.step`, unless it is there. Raises NonFiniteError; UserError on a full disk.

        `asynchronous`: copy what is to be saved and go on while it is written; an error then comes out of the
        next call."""
        started = time.monotonic()
        self.wait()
        if state.step == self.saved_step:
            return
        weights, moments = optimizer.state(copied=asynchronous)
        tensors = {"weights": weights, "optimizer": moments, "rng": state.random_states()}
        documents = {"config": self.config.document(), "state": state.document(), "prompts": dict(self.prompts)}
        kept = [s for s in (state.choice.step, state.watch.healthy_step) if s is not None]
        self.log.sync()  # a power cut must not leave a checkpoint that is newer than the metrics
        if asynchronous:
            documents = json.loads(json.dumps(documents))  # nothing that training will change
            self._writing = self._writer.submit(self._write, state.step, tensors, documents, kept)
        else:
            self._write(state.step, tensors, documents, kept)
        self.saved_step, self.saved_at = state.step, time.monotonic()
        self._save_seconds += time.monotonic() - started

    def _write(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any], kept: list[int]
    ) -> None:
        save_checkpoint(self.checkpoints, step, tensors=tensors, documents=documents)
        keep = self.config.run.keep_checkpoints
        prune(
            self.checkpoints,
            keep_last=max(1, keep),
            keep_every=0 if keep else self.config.run.save_every,
            keep=kept,
        )

    def take_save_seconds(self) -> float:
        """Seconds spent on checkpoints since the last call."""
        seconds, self._save_seconds = self._save_seconds, 0.0
        return seconds

    def restore(self, checkpoint: Checkpoint, optimizer: MasterAdam, state: State) -> None:
        """Put weights, optimizer, random states and everything else back as they were."""
        optimizer.load_state(checkpoint.tensors("weights"), checkpoint.tensors("optimizer"))
        state.load(checkpoint.document("state"), checkpoint.tensors("rng"))
        self.saved_step = checkpoint.step

    def dump(
        self, step: int, problem: str, rollout: Rollout | None, tensors: Mapping[str, Tensor], origin: Mapping[str, Any]
    ) -> None:
        """Keep the batch of a non-finite step for whoever looks into it, at most ten a session; `origin` says where it
        comes from."""
        self.log.event(step, "nonfinite", what=problem, where=origin["where"])
        if self.dumps == 10:
            return
        self.dumps += 1
        folder = self.checkpoints / "nonfinite"
        folder.mkdir(exist_ok=True)
        contents = dict(tensors)
        if rollout is not None:
            contents |= {"tokens": rollout.tokens_BT, "lengths": rollout.lengths_B}
        save_file({k: v.detach().cpu().contiguous() for k, v in contents.items()}, folder / f"step-{step}.safetensors")
        prompts = [list(p) for p in rollout.prompts] if rollout else []
        write_json(
            folder / f"step-{step}.json", {"step": step, "problem": problem, "origin": origin, "prompts": prompts}
        )

    def rehearse_export(self, policy: Policy) -> None:
        """Find out before the first step whether the model can be exported. Raises UserError."""
        self._export(rehearse, policy, "rehearsed")

    def export(self, policy: Policy, facts: str) -> None:
        """Write the final model into the output folder."""
        self.log.say(f"writing the final model to {self.config.run.output_dir}")
        self._export(export, policy, facts)

    def _export(self, write: Callable[..., None], policy: Policy, facts: str) -> None:
        config = self.config
        write(
            policy.model,
            policy.tokenizer,
            Path(config.run.output_dir),
            source=policy.source,
            stop_ids=policy.stop_ids,
            card=ModelCard(
                facts,
                config.prompt,
                config.task,
                config.occupations,
                system=config.system,
                sampled=config.sampling.describe(),
            ),
            extra_files={TASK: config.task.to_yaml()},
        )


def _recorded_config(path: Path) -> dict[str, Any]:
    """The configuration in a run's record. Raises UserError for a damaged one."""
    try:
        config = json.loads(path.read_bytes())["config"]
        if isinstance(config, dict):
            return config
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(
        f"{path} is damaged, so nothing says which run the files beside it are of: restore it, choose another "
        "--output-dir, or --overwrite to start anew"
    )


def _changes(recorded: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """What differs between a recorded configuration and this one and matters to the numbers."""
    old, new = dict(recorded), config.document()
    reward = dict(old.get("reward", {}))
    # Records of before tasks had files are of the default task, with the bounds among the reward's numbers.
    bounds = (reward.pop("min_words", None), reward.pop("max_words", None))
    before = old.pop("task", None)
    task = task_from_document(before, "the record of the run") if before else PROTOCOL.with_bounds(*bounds)
    del new["task"]
    return differences(old | {"reward": reward}, new, FREE_TO_CHANGE) + task.differences(config.task)


def _check_prompts(config: TrainConfig, resumed: Checkpoint | None, rendered: Mapping[str, str]) -> None:
    """Raises UserError where a run is on record whose prompts are not these; records of before they were kept tell
    nothing."""
    checkpoints, record = Path(config.run.checkpoint_dir), Path(config.run.output_dir) / "run.json"
    known = resumed is not None and "prompts.json" in resumed.files
    recorded = {checkpoints: resumed.document("prompts") if resumed is not None and known else None}
    if resumed is not None and record.exists():
        recorded[record.parent] = json.loads(record.read_bytes()).get("prompts")
    for folder, old in recorded.items():
        if old and rendered and (changed := differences(old, rendered)):
            raise UserError(
                f"{folder} holds a run whose prompts were rendered otherwise ({'; '.join(changed)}): put the model's "
                "chat template and tokenizer back to continue it, use other folders (--output-dir, --checkpoint-dir), "
                "or --overwrite to start anew"
            )


def _find(config: TrainConfig, overwrite: bool) -> tuple[Checkpoint | None, bool]:
    """(checkpoint to continue from, whether nothing is left to do). Raises UserError for what must not be touched."""
    output, checkpoints = Path(config.run.output_dir), Path(config.run.checkpoint_dir)
    metrics = output / "training_metrics.csv"
    ours = (output / "run.json").exists()
    if not ours and any(p.suffix in {".safetensors", ".json", ".csv", ".bin"} for p in output.iterdir()):
        raise UserError(
            f"{output} holds files that no run of equipoise wrote (there is no run.json): "
            "choose another folder with --output-dir, or move them away"
        )
    if overwrite:
        _clear(output, checkpoints)
    resumed = newest(checkpoints)
    begun = ours and metrics.exists() and metrics.stat().st_size > 0
    recorded = {
        checkpoints: resumed.document("config") if resumed else None,
        output: _recorded_config(output / "run.json") if begun else None,
    }
    for folder, old in recorded.items():
        if old is not None and (changed := _changes(old, config)):
            raise UserError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}): use the same to continue it, "
                "other folders (--output-dir, --checkpoint-dir) for a new run, or --overwrite to start anew"
            )
    if resumed is None and (output / WEIGHTS).exists():
        raise UserError(
            f"{output} holds a finished model and {checkpoints} no checkpoint to continue from: choose another "
            "--output-dir, or --overwrite to start anew in its place"
        )
    step = resumed.step if resumed else 0
    if step > config.steps:
        raise UserError(
            f"{checkpoints} is at step {step}, past --steps {config.steps}: ask for at least {plural(step, 'step')}"
        )
    return resumed, step == config.steps and (output / WEIGHTS).exists()


def _begin(config: TrainConfig, facts: Mapping[str, Any], resumed: Checkpoint | None, complete: bool) -> RunLog:
    output, step = Path(config.run.output_dir), resumed.step if resumed else 0
    if not complete:
        # First of all: it is what tells the other files from somebody else's.
        write_json(output / "run.json", {"config": config.document(), **facts, **provenance()})
    log = RunLog(
        output_dir=output,
        tensorboard_dir=Path(config.run.tensorboard_dir) / output.resolve().name,
        total_steps=config.steps,
        resume_step=step,
        task=config.task,
    )
    if not complete:
        # A run that goes on has no final model; an old one must not be taken for it.
        for name in (WEIGHTS, "summary.json", "final_sentences.jsonl"):
            (output / name).unlink(missing_ok=True)
    if resumed is not None and not complete:
        log.event(step, "resume", checkpoint=resumed.path.name)
        log.say(f"continuing from {resumed.path} (step {step} of {config.steps}); --overwrite would start anew")
    return log


def _lock(folder: Path) -> Any:
    handle = (folder / ".training").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"another process is training in {folder}: wait for it, or use another --checkpoint-dir"
        ) from None
    return handle


def _clear(output: Path, checkpoints: Path) -> None:
    """Start anew: remove the earlier run's checkpoints and files, and nothing else."""
    for path in list_checkpoints(checkpoints):
        shutil.rmtree(path)
    shutil.rmtree(checkpoints / "nonfinite", ignore_errors=True)
    if (output / "run.json").exists():
        for name in OUTPUT_FILES:
            (output / name).unlink(missing_ok=True)
