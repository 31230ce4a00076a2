"""Runs as commands and as processes, and what they leave."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from equipoise import cli
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.train import train
from tests.default import score

ROOT = Path(__file__).parents[2]

# All that has a state: adaptive coefficient, diversity window, warm start, weights in bfloat16 beside masters.
EVERYTHING = {
    "tuning": "full", "dtype": "bfloat16", "learning_rate": 1e-3, "diversity_weight": 0.1, "ref_kl_target": 1.0,
    "kl_horizon": 100, "warm_start": "forced", "warm_start_sentences": 16, "warm_start_epochs": 1,
    "entropy_coef": 0.01, "keep_checkpoints": 2, "save_every": 3, "temperature": 0.9, "top_p": 0.95,
    "missing_eos_penalty": 0.1, "strict_bonus": 0.1, "average_weights": 0.9, "diversity_on": "both",
    "opening_weight": 0.1, "base_samples": 8, "eval_sentences": 12, "value_warmup_steps": 1, "value_hidden": 3,
    "decay_steps": 6,
}  # fmt: skip


def own(texts: Sequence[str], _: Sequence[str]) -> list[float]:
    return [score(text).reward for text in texts]


def work(config: TrainConfig, reward: Callable[..., Any] = own) -> Callable[[], int]:
    def run() -> int:
        with open(os.devnull, "w") as nowhere:
            sys.stdout = nowhere
            return train(config, reward).exit_code

    return run


def options(model: Path, where: Path, *more: str) -> list[str]:
    return [
        *("--preset", "bundled-cpu", "--model", str(model), "--prompt", "raw", "--dtype", "float32", "--device", "cpu"),
        *("--batch-size", "8", "--mini-batch-size", "4", "--max-new-tokens", "8", "--save-every", "5"),
        *("--warm-start", "off", "--base-samples", "16", "--eval-sentences", "0", "--final-sentences", "0"),
        *("--output-dir", str(where / "out"), "--checkpoint-dir", str(where / "checkpoints")),
        *("--tensorboard-dir", str(where / "runs"), *more),
    ]


def snapshot(where: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(where.rglob("*")) if p.is_file() and "runs" not in p.parts}


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line on standard error with which the command ended, code 2."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("equipoise: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err
