"""One run on disk: its folders, what may be resumed, what is saved and when."""

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from equipoise.errors import UserError
from equipoise.learning.optimizer import Asked, MasterAdam
from equipoise.policy.card import ModelCard
from equipoise.policy.export import export, rehearse
from equipoise.policy.export_adapter import export_adapter
from equipoise.policy.load import Policy
from equipoise.policy.placed import MODELS
from equipoise.policy.push import check_push, push
from equipoise.policy.rollout import Rollout
from equipoise.policy.source import TASK, resolve
from equipoise.ppo.claim import OUTPUT_FILES, Claimed, base_weights, check_folders, claim, in_pieces
from equipoise.ppo.computed import DOCUMENT as COMPUTED
from equipoise.ppo.computed import computed
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.functions import DOCUMENT as FUNCTIONS
from equipoise.ppo.functions import check_same
from equipoise.ppo.log import RunLog
from equipoise.ppo.state import State
from equipoise.ppo.summary import FINAL, SUMMARY
from equipoise.ppo.tracking.tracker import check_installed
from equipoise.ppo.tracking.trackers import Trackers
from equipoise.ppo.undo import Made
from equipoise.runs.checkpoint import Checkpoint, at_step, discard_after, newest, prune, save_checkpoint
from equipoise.runs.files import make_folder, write_file, write_json
from equipoise.runs.locks import LOCK, FolderLock
from equipoise.runs.ownership import OWNER, marked
from equipoise.runs.records import provenance
from equipoise.runs.tensors import Deferred


class Run:
    """Use as a context manager: `with Run.open(config) as run`. Holds a lock, so that no two processes share a run."""

    def __init__(self, config: TrainConfig, log: RunLog, found: Claimed, locks: ExitStack, made: Made) -> None:
        self.config = config
        self.log = log
        self._made = made
        resumed = self.resumed = found.resumed
        self.complete = found.complete
        self.policy = found.policy
        """As the model is to be loaded: see `Claimed`."""
        self.prompts: Mapping[str, str] = {}
        """What is on record of the rendered prompts."""
        self.checkpoints = Path(config.run.checkpoint_dir)
        self.saved_step = resumed.step if resumed else -1
        self.saved_at = time.monotonic()
        self.dumps = 0
        self.functions: Mapping[str, str] = {}
        """`Functions.document` of the run."""
        self._save_seconds = 0.0
        self._computed = computed(found.policy)
        self._own = found.own
        self._locks = locks
        self._asynchronous = torch.cuda.is_available()
        """Whether checkpoints may be written while training goes on: 1.6 GB of SmolLM2 take as long as 20 steps."""
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        refused = isinstance(error, UserError) and self.saved_step < 0 and not self.log.last_step
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self.log.close()
            if refused:
                self._made.remove_files()
            self._locks.close()
            if refused:
                self._made.remove_folders()

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
        changed_functions: bool = False,
        edited: Mapping[str, Any] | None = None,
        processes: int = 1,
    ) -> "Run":
        """Find out what is there. Raises UserError rather than touch anything that is not this run's.

        Into the record go `functions`, what stands in place of the protocol's reward and rank, with its source; what
        `prompts` gives, which is what `render_prompts` says of them; and `edited`, what was changed in the script. A
        run goes on with the functions and prompts that it began with or not at all; with `changed_functions`, one
        function may have become another, which is recorded too. The configuration is kept with the number of pieces
        that is in force for so many `processes`.
        """
        check_installed(config.run.track)
        if config.run.push_to_hub:
            check_push(config.run, resolve(config.policy.model))
        check_folders(config)  # before a lock or anything else is put there
        output, board = Path(config.run.output_dir), _board(config)
        made = Made((output, Path(config.run.checkpoint_dir), board))
        try:
            for folder in (output, config.run.checkpoint_dir, config.run.tensorboard_dir):
                make_folder(Path(folder))
            with ExitStack() as locks:
                locks.enter_context(_lock(config.run.checkpoint_dir, "checkpoint-dir", ".training"))
                locks.enter_context(_lock(config.run.output_dir, "output-dir"))
                if overwrite:
                    prompts()  # which may refuse: before anything is removed
                found = claim(config, overwrite, prompts)
                config, notices = in_pieces(config, found.resumed, processes)
                found = found._replace(notices=(*found.notices, *notices))
                changed = check_same(found.resumed, output / "run.json", functions or {}, changed_functions)
                facts = {**(functions or {}), "prompts": found.prompts} | ({"edited": dict(edited)} if edited else {})
                facts |= {"base_weights": rounded} if (rounded := base_weights(found.policy)) else {}
                names = (output / name for name in (*OUTPUT_FILES, "run.json"))
                made.about_to_write((*names, found.own.folder / OWNER), board)
                try:
                    run = cls(config, _begin(config, facts, found), found, locks.pop_all(), made)
                except UserError:
                    made.remove_files()
                    raise
        except UserError:
            made.remove_folders()
            raise
        run.prompts, run.functions = found.prompts, functions or {}
        if changed:
            run.log.event(run.saved_step, "functions_changed", what=changed)
        return run

    def newest(self) -> Checkpoint | None:
        self.wait()
        return newest(self.checkpoints)

    def checkpoint_at(self, step: int) -> Checkpoint | None:
        self.wait()
        return at_step(self.checkpoints, step)

    def wants_save(self, state: State) -> bool:
        """Whether this step's checkpoint is one of those that are kept, or the last one was long ago."""
        late = time.monotonic() - self.saved_at > 60 * self.config.run.save_minutes
        return is_due(self.config, state) or (late and state.bad_in_a_row == 0)

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of later steps; this one's is to be written anew."""
        self.wait()
        discard_after(self.checkpoints, step)
        self.saved_step = -1

    def save(
        self,
        optimizer: MasterAdam,
        state: State,
        *,
        asynchronous: bool = False,
        ask: Callable[[Asked], Tensor | None] | None = None,
    ) -> None:
        """Write the checkpoint of `state.step`, unless it is there. Raises NonFiniteError; UserError on a full disk.

        `asynchronous`: where that is worth while, copy what is to be saved and go on while it is written; an error
        then comes out of the next call. `ask` is for states that are sharded, which are gathered while they are
        written."""
        asynchronous, started = asynchronous and self._asynchronous and not optimizer.sharded, time.monotonic()
        if asynchronous and state.step == self.saved_step:
            return  # or is being written
        self.wait()
        if state.step == self.saved_step:
            return
        weights, moments = optimizer.state(copied=asynchronous, ask=ask)
        tensors: dict[str, Mapping[str, Tensor | Deferred]] = {
            "weights": weights,
            "optimizer": moments,
            "rng": state.random_states(),
        }
        documents = {
            "config": self.config.document(),
            "state": state.document(),
            "prompts": dict(self.prompts),
            FUNCTIONS: dict(self.functions),
            COMPUTED: self._computed,
        }
        kept = [s for s in (state.choice.step, state.watch.healthy_step) if s is not None]
        if asynchronous:
            documents = json.loads(json.dumps(documents))  # nothing that training will change
            self._writing = self._writer.submit(self._write, state.step, tensors, documents, kept)
        else:
            self._write(state.step, tensors, documents, kept)
        self.saved_step, self.saved_at = state.step, time.monotonic()
        self._save_seconds += time.monotonic() - started

    def _write(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor | Deferred]],
        documents: Mapping[str, Any],
        kept: list[int],
    ) -> None:
        self.log.sync()  # a power cut must not leave a checkpoint that is newer than the metrics
        save_checkpoint(self.checkpoints, step, tensors=tensors, documents=documents)
        self.log.kept(step)
        if not self._own.saved:
            self._own = self._own._replace(saved=True)
            self._own.write()
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

    def restore(self, checkpoint: Checkpoint, state: State) -> None:
        """Put random states and everything else back as they were, but for weights and optimizer."""
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
        contents = dict(tensors)
        if rollout is not None:
            contents |= {"tokens": rollout.tokens_BT, "lengths": rollout.lengths_B}
        data = serialize({k: v.detach().cpu().contiguous() for k, v in contents.items()})
        prompts = [list(p) for p in rollout.prompts] if rollout else []
        if folder.is_symlink():
            raise UserError(f"cannot write {folder}: it is a link, and nothing is written through one; move it away")
        make_folder(folder)
        write_file(folder / f"step-{step}.safetensors", data)
        write_json(
            folder / f"step-{step}.json", {"step": step, "problem": problem, "origin": origin, "prompts": prompts}
        )

    def rehearse_export(self, policy: Policy) -> None:
        """Find out before the first step whether the model can be exported. Raises UserError."""
        self._export(partial(rehearse, save=self.config.run.save), policy, "rehearsed")

    def export(self, policy: Policy, facts: str) -> None:
        """Write the final model into the output folder, once the last checkpoint is on the disk: a folder with the
        model is complete."""
        self.wait()
        self.log.say(f"writing the final model to {self.config.run.output_dir}")
        self._export(export_adapter if self.config.run.save == "adapter" else export, policy, facts)

    def push(self) -> None:
        """Put the final model on the Hub, where that is asked for. Raises UserError, with everything here as it was."""
        push(Path(self.config.run.output_dir), self.config.run, self.log.say)

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
                reward=self.functions.get("reward_fn", ""),
            ),
            extra_files={TASK: config.task.to_yaml()},
        )


def is_due(config: TrainConfig, state: State) -> bool:
    """Whether this step's checkpoint is one of those that are kept. A skipped step is no place to come back to."""
    return state.step % config.run.save_every == 0 and state.bad_in_a_row == 0


def _begin(config: TrainConfig, facts: Mapping[str, Any], found: Claimed) -> RunLog:
    output, step = Path(config.run.output_dir), found.resumed.step if found.resumed else 0
    if not found.complete or found.mended:
        # First of all: it is what tells the other files from somebody else's.
        found.own.write()
        record = {"run": found.own.run, "config": config.document(), **facts, **provenance()}
        write_json(output / "run.json", marked(record))
    log = RunLog(
        output_dir=output,
        tensorboard_dir=_board(config),
        total_steps=config.steps,
        resume_step=step,
        task=config.task,
        target_kl=config.ppo.target_kl,
    )
    for notice in found.notices:
        log.say(notice)
    log.track(Trackers(config.run.track, output, found.own.run, config.document(), step))
    if found.complete:
        log.finished()
    if not found.complete:
        # A run that goes on has no final model; an old one must not be taken for it.
        for name in (*MODELS, SUMMARY, FINAL):
            (output / name).unlink(missing_ok=True)
    if found.resumed is not None and not found.complete:
        log.event(step, "resume", checkpoint=found.resumed.path.name)
        log.say(f"continuing from {found.resumed.path} (step {step} of {config.steps}); --overwrite would start anew")
    return log


def _board(config: TrainConfig) -> Path:
    """The folder of the curves, whose name in TensorBoard is the output folder's whole path from here, so that `a/out`
    and `b/out` are two. A path that leads elsewhere begins with `root`, for a name must stay below that of all curves.
    """
    place, here = Path(config.run.output_dir).resolve(), Path.cwd().resolve()
    inside = place.is_relative_to(here) and place != here
    return Path(config.run.tensorboard_dir, place.relative_to(here) if inside else Path("root", *place.parts[1:]))


def _lock(folder: str, option: str, name: str = LOCK) -> FolderLock:
    return FolderLock(Path(folder), f"training in {folder}: wait for it, or use another --{option}", name)
