"""One run as all its processes see it: rank 0 keeps the files, and what it finds there, or fails with, reaches all."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor

from equipoise.learning.optimizer import Asked, MasterAdam
from equipoise.policy.config import PolicyConfig
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.log import RunLog
from equipoise.ppo.run import Run
from equipoise.ppo.state import State
from equipoise.protocol.reward import Reward
from equipoise.runs.checkpoint import Checkpoint
from equipoise.runs.console import Console
from equipoise.runs.ranks import Ranks
from equipoise.runs.stage import Stage, unseen


class SharedLog:
    """The log of a run. What writes files is called by all ranks, and raises on all; `say` and `stage`, by anyone."""

    def __init__(self, ranks: Ranks, log: RunLog | None) -> None:
        self._ranks, self._log = ranks, log

    def say(self, text: str) -> None:
        if self._log is not None:
            self._log.say(text)

    def stage(self, label: str) -> AbstractContextManager[Stage]:
        return unseen(label) if self._log is None else self._log.stage(label)

    def _write(self, write: Callable[[RunLog], None]) -> None:
        def work() -> None:
            assert self._log is not None
            write(self._log)

        self._ranks.first_does(work)

    def step(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        self._write(lambda log: log.step(step, metrics, timings))

    def samples(
        self, step: int, rewards: Sequence[Reward], occupations: Sequence[str], own: Sequence[float] | None = None
    ) -> None:
        self._write(lambda log: log.samples(step, rewards, occupations, own))

    def evaluation(self, step: int, measured: Mapping[str, float]) -> None:
        self._write(lambda log: log.evaluation(step, measured))

    def alert(self, step: int, name: str, evidence: Mapping[str, Any], remedy: str, line: str) -> None:
        self._write(lambda log: log.alert(step, name, evidence, remedy, line))

    def event(self, step: int, kind: str, **fields: Any) -> None:
        self._write(lambda log: log.event(step, kind, **fields))

    def finished(self) -> None:
        self._write(lambda log: log.finished())

    def screen(self, show: Callable[[Console], None]) -> None:
        """Have rank 0 show something at the end."""
        self._write(lambda log: show(log.screen()))

    def rewind(self, step: int) -> None:
        self._write(lambda log: log.rewind(step))


class SharedRun:
    """Use as a context manager: `with SharedRun.open(config, ranks, …) as run`. All ranks call all of it alike."""

    def __init__(
        self,
        ranks: Ranks,
        config: TrainConfig,
        policy: PolicyConfig,
        run: Run | None,
        resumed: Checkpoint | None,
        complete: bool,
    ) -> None:
        self.ranks = ranks
        self.config = config
        """With the number of pieces that is in force."""
        self.policy = policy
        """As each rank is to load the model: see `Claimed`."""
        self.resumed, self.complete = resumed, complete
        self.log = SharedLog(ranks, run.log if run is not None else None)
        self._run = run
        self._saved_step = resumed.step if resumed else -1

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        ranks: Ranks,
        *,
        overwrite: bool,
        functions: Mapping[str, str] | None = None,
        prompts: Callable[[], Mapping[str, str]] = dict,
        changed_functions: bool = False,
        edited: Mapping[str, Any] | None = None,
    ) -> "SharedRun":
        """`Run.open` on rank 0. Raises UserError, on all."""
        opened: list[Run] = []

        def begin() -> tuple[Checkpoint | None, bool, int, Any]:
            run = Run.open(
                config,
                overwrite=overwrite,
                functions=functions,
                prompts=prompts,
                changed_functions=changed_functions,
                edited=edited,
                processes=ranks.dealers,
            )
            opened.append(run)
            return run.resumed, run.complete, run.config.ppo.pieces, run.policy.dtype

        resumed, complete, pieces, dtype = ranks.first_does(begin)
        config = replace(config, ppo=replace(config.ppo, pieces=pieces))
        policy = replace(config.policy, dtype=dtype)
        return cls(ranks.cut_into(pieces), config, policy, opened[0] if opened else None, resumed, complete)

    def __enter__(self) -> "SharedRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:  # after one, the others may not be there any more
                self._first_does(lambda run: run.wait())
        except BaseException as late:
            error = late
            raise
        finally:
            if self._run is not None:
                self._run.__exit__(type(error) if error else None, error, trace)

    def _first_does(self, work: Callable[[Run], Any]) -> Any:
        def on_first() -> Any:
            assert self._run is not None
            return work(self._run)

        return self.ranks.first_does(on_first)

    @property
    def saved_step(self) -> int:
        """The step of the last checkpoint; −1 where the next one is to be written in any case."""
        return self._saved_step

    @saved_step.setter
    def saved_step(self, step: int) -> None:
        self._saved_step = step
        if self._run is not None:
            self._run.saved_step = step

    def newest(self) -> Checkpoint | None:
        found: Checkpoint | None = self._first_does(lambda run: run.newest())
        return found

    def checkpoint_at(self, step: int) -> Checkpoint | None:
        found: Checkpoint | None = self._first_does(lambda run: run.checkpoint_at(step))
        return found

    def save_if_due(self, optimizer: MasterAdam, state: State) -> None:
        if self._first_does(lambda run: run.wants_save(state)):
            self.save(optimizer, state, asynchronous=True)

    def save(self, optimizer: MasterAdam, state: State, *, asynchronous: bool = False) -> None:
        """`Run.save` on rank 0, once all ranks have been found to hold the same. Raises what it raises, on all."""
        if self.ranks.size > 1 and state.step != self.saved_step:
            self.ranks.each(optimizer.check_finite)
            self.ranks.agree(state.step, optimizer.digest(), _digest(state))

        def write(ask: Callable[[Asked], Tensor | None]) -> None:
            assert self._run is not None
            self._run.save(optimizer, state, asynchronous=asynchronous, ask=ask)

        self.ranks.first_asks(write, optimizer.reply)
        self._saved_step = state.step

    def replace_from(self, step: int, optimizer: MasterAdam, state: State) -> None:
        """The run has gone back to `step` and goes on otherwise: delete what came after, save `step` as it is now."""
        self._first_does(lambda run: run.discard_after(step))
        self._saved_step = -1
        self.save(optimizer, state)

    def take_save_seconds(self) -> float:
        """Seconds that rank 0 spent on checkpoints since the last call; 0 elsewhere."""
        return 0.0 if self._run is None else self._run.take_save_seconds()

    def restore(self, checkpoint: Checkpoint, optimizer: MasterAdam, state: State) -> None:
        """Put weights, optimizer, random states and everything else back as they were, on all ranks from the files of
        rank 0, which alone need have them."""

        def read(run: Run) -> Any:
            run.restore(checkpoint, state)
            if self.ranks.size == 1:
                return None
            # A GPU's own generator is that of rank 0's: no step draws from it.
            host = {name: s for name, s in checkpoint.tensors("rng").items() if not name.startswith("cuda.")}
            return checkpoint.document("state"), host

        self.load_weights(checkpoint, optimizer)
        read_there = self._first_does(read)
        if not self.ranks.first:
            state.load(*read_there)
        self._saved_step = checkpoint.step

    def load_weights(self, checkpoint: Checkpoint, optimizer: MasterAdam) -> None:
        """Put weights and optimizer alone back as they were."""
        held: list[Mapping[str, Tensor]] = []
        self._first_does(lambda _: held.extend(checkpoint.tensors(name) for name in ("weights", "optimizer")))
        optimizer.load_state(*(held or ({}, {})))

    def dump(
        self,
        step: int,
        problem: str,
        rollout: Rollout | None,
        tensors: Mapping[str, Tensor],
        origin: Callable[[], Mapping[str, Any]],
    ) -> None:
        """`Run.dump`, `origin` being looked for by rank 0."""
        self._first_does(lambda run: run.dump(step, problem, rollout, tensors, origin()))

    def rehearse_export(self, policy: Policy) -> None:
        self._first_does(lambda run: run.rehearse_export(policy))

    def export(self, policy: Policy, facts: str) -> None:
        self._first_does(lambda run: run.export(policy, facts))

    def push(self) -> None:
        """`Run.push` on rank 0. Raises UserError, on all."""
        self._first_does(lambda run: run.push())


def _digest(state: State) -> int:
    """56 bits of everything in the state that decides how the run goes on."""
    document = state.document()
    del document["python_random"]  # the interpreter's own; nothing in a run draws from it
    content = json.dumps(document).encode() + state.generator.get_state().numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
