"""Runs that train nothing, in a few milliseconds each, and what they leave."""

from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.errors import UserError
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.run import Run

from .small import small_config

MODEL = Path("nowhere")


def light(where: Path, out: str = "out", checkpoints: str = "checkpoints", **changes: Any) -> TrainConfig:
    folders = {"output_dir": str(where / out), "checkpoint_dir": str(where / checkpoints)}
    return small_config(MODEL, where, **(folders | {"steps": 1000} | changes))


def work(config: TrainConfig, rows: int, saved: int | None = None, overwrite: bool = False) -> None:
    """A run of `rows` more steps, of which the checkpoint `saved` steps on is kept; then killed, in effect."""
    with Run.open(config, overwrite=overwrite) as run:
        first = run.resumed.step if run.resumed else 0
        for step in range(first + 1, first + rows + 1):
            run.log.step(step, {"reward/mean": float(config.seed), "compliance/both": 0.0, "kl/ref": 0.0}, {})
            if saved is not None and step == first + saved:
                run.log.sync()
                run._write(step, {"weights": {"w": torch.zeros(1)}}, {"config": config.document(), "state": {}}, [])


def rows_of(folder: Path) -> list[tuple[int, float]]:
    path = folder / "training_metrics.csv"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return [(int(step), float(seed)) for step, seed, *_ in (line.split(",") for line in lines)]


def everything(where: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(where.rglob("*")) if p.is_file() and "runs" not in p.parts}


def refused(config: TrainConfig, where: Path, match: str, overwrite: bool = False) -> None:
    before = everything(where)
    with pytest.raises(UserError, match=match):
        Run.open(config, overwrite=overwrite)
    assert everything(where) == before
