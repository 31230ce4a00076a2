"""Supervised fine-tuning by several processes: the model of one, whatever happens to any of them."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipoise import cli
from equipoise.commands import sft as commands
from equipoise.learning import supervised
from equipoise.methods import fine_tune
from equipoise.methods.sft import sft
from equipoise.methods.sft_config import SftConfig
from equipoise.policy.config import PolicyConfig
from equipoise.protocol.task import PROTOCOL
from tests.ranked import rank, together
from tests.tiny import words_folder

from .test_sft import quiet

LEARNT = ("model.safetensors", "sentences.csv")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "base", prompt=None)


def config(base: Path, folder: Path, **changes: Any) -> SftConfig:
    settings: dict[str, Any] = {"data": "forced", "sentences": 36, "candidates": 2, "held_out": 0.2, "check": 1}
    settings |= {"prompt": "raw", "epochs": 2, "learning_rate": 0.03, "pieces": 4} | changes
    policy = PolicyConfig(str(base), dtype="float32", device="cpu", lora_rank=8)
    return SftConfig(output_dir=str(folder), policy=policy, **settings)


def learning(asked: SftConfig, say: Callable[[str], None] = quiet) -> Callable[[], int]:
    def work() -> int:
        sft(asked, say)
        return 0

    return lambda: cli.run_command(lambda _: work(), [])


def learnt(folder: Path) -> dict[str, Any]:
    """What was learnt, without what time decides."""
    record = json.loads((folder / "run.json").read_text())
    told = {name: value for name, value in record["training"].items() if "seconds" not in name}
    return {name: (folder / name).read_bytes() for name in LEARNT} | {"config": record["config"], "training": told}


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone") / "sft"
    assert together(1, learning(config(base, folder))) == [0]
    return learnt(folder)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_number_of_processes_changes_no_byte_of_the_model(
    base: Path, tmp_path: Path, alone: dict[str, Any], capfd: pytest.CaptureFixture[str], size: int
) -> None:
    assert together(size, learning(config(base, tmp_path / "sft"), print)) == [0] * size
    assert learnt(tmp_path / "sft") == alone
    assert alone["training"]["pieces"] == 4 and len(alone["training"]["nats_per_token"]) == 2
    assert capfd.readouterr().out.count("the model is in") == 1
    # It is the very same model, whatever it is cut into.
    again = config(base, tmp_path / "sft", pieces=1)
    assert together(1, learning(again, print)) == [0]
    assert "holds this very model already" in capfd.readouterr().out
