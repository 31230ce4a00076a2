"""Runs that several tests look at."""

from pathlib import Path
from typing import Any

import pytest

from equipoise.learning import shards
from equipoise.policy.load import Policy
from equipoise.ppo import train as training
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.train import train

from .several import alone
from .small import small_config


@pytest.fixture
def finished(model: Path, tmp_path: Path) -> TrainConfig:
    """A run that has ended, in `tmp_path`."""
    config = small_config(model, tmp_path, steps=2)
    train(config)
    return config


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the few weights of full fine-tuning are cut into several blocks."""
    monkeypatch.setattr(shards, "BLOCK", 1024)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of one process with the settings of `LIGHT`."""
    return alone(model, tmp_path_factory.mktemp("alone"))


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> list[Policy]:
    """The policies that runs of this test load."""
    seen: list[Policy] = []
    load = training.load_policy

    def remember(*args: Any, **options: Any) -> Policy:
        seen.append(load(*args, **options))
        return seen[-1]

    monkeypatch.setattr(training, "load_policy", remember)
    return seen
