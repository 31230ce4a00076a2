"""Runs in several processes."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from equipoise import cli
from equipoise.ppo import train as loop
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.train import train
from tests.default import score
from tests.ranked import only_first_has_disk, rank, together

from .small import results, small_config
from .started import ROOT

METRICS = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
LIGHT: dict[str, Any] = {"steps": 4, "batch_size": 8, "mini_batch_size": 4, "pieces": 4, "save_every": 2}


def reward(texts: Sequence[str], _: Sequence[str]) -> list[float]:
    return [score(text).reward for text in texts]


def run(config: TrainConfig, function: Callable[..., Any] | None = None) -> Callable[[], int]:
    def work() -> int:
        only_first_has_disk(Path(config.run.output_dir).parent)
        with open(os.devnull, "w") as nowhere:
            sys.stdout = nowhere
            return train(config, function).exit_code

    return work


def command(config: TrainConfig, function: Callable[..., Any] | None = None) -> Callable[[], int]:
    """The same as a command ends: with one line where something is wrong, and the exit code."""
    return lambda: cli.run_command(lambda _: run(config, function)(), [])


def alone(model: Path, where: Path, **changes: Any) -> dict[str, Any]:
    """The results of one process."""
    config = small_config(model, where, **(LIGHT | changes))
    assert together(1, run(config)) == [0]
    return results(where, config.steps)


def on_rank(
    monkeypatch: pytest.MonkeyPatch, number: int, step: int, act: Callable[[Any], object], before: bool = True
) -> None:
    """Have `act` called on that rank before (or after) that step, with what is trained."""
    plain = loop.ppo_step

    def stepping(training: Any) -> Any:
        due = rank() == number and training.state.step + 1 == step
        if due and before:
            act(training)
        done = plain(training)
        if due and not before:
            act(training)
        return done

    monkeypatch.setattr(loop, "ppo_step", stepping)


SLOW = pytest.mark.slow
