"""Whole training runs of a quarter of a second each, and what they leave behind."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.ppo.config import PPOConfig, TrainConfig
from equipoise.ppo.run_config import RunConfig


def small_config(model: Path, where: Path, **changes: Any) -> TrainConfig:
    """Six steps of eight sentences, `where` holding all folders. `changes` name settings of any group."""
    config = TrainConfig(
        prompt="raw",
        steps=6,
        policy=PolicyConfig(model=str(model), dtype="float32", device="cpu", lora_rank=4),
        sampling=SamplingConfig(max_new_tokens=8),
        ppo=PPOConfig(
            batch_size=8, mini_batch_size=4, micro_batch_size=4, ppo_epochs=2, learning_rate=3e-3, warmup_steps=3
        ),
        run=RunConfig(
            output_dir=str(where / "out"),
            checkpoint_dir=str(where / "checkpoints"),
            tensorboard_dir=str(where / "runs"),
            save_every=2,
            sample_every=2,
        ),
    )
    return changed(config, **changes)


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The configuration with other settings of any group."""
    for name, value in changes.items():
        if name == "task" or not dataclasses.is_dataclass(getattr(config, name, config)):
            config = dataclasses.replace(config, **{name: value})
            continue
        group = next(f.name for f in dataclasses.fields(config) if hasattr(getattr(config, f.name), name))
        part = dataclasses.replace(getattr(config, group), **{name: value})
        config = dataclasses.replace(config, **{group: part})
    return config


def rows(where: Path) -> list[dict[str, float]]:
    with (where / "out" / "training_metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def events(where: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (where / "out" / "events.jsonl").read_text().splitlines()]


def checkpoints(where: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (where / "checkpoints").glob("checkpoint-*"))


def tensors(where: Path, step: int) -> dict[str, Tensor]:
    """Everything of a checkpoint that is a tensor: weights, optimizer, random states."""
    folder = where / "checkpoints" / f"checkpoint-{step}"
    return {f"{path.stem}/{n}": x for path in folder.glob("*.safetensors") for n, x in load_file(path).items()}


def results(where: Path, step: int) -> dict[str, Any]:
    """All that the seed determines, ready to be compared."""
    out = where / "out"
    state = json.loads((where / "checkpoints" / f"checkpoint-{step}" / "state.json").read_text())
    del state["python_random"]  # the interpreter's own; nothing in a run draws from it
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timeless = [
        {k: v for k, v in row.items() if k.split("/")[0] not in ("time", "speed", "memory", "ranks")} for row in metrics
    ]
    return {
        "training_metrics.csv": (out / "training_metrics.csv").read_bytes(),
        "samples.jsonl": (out / "samples.jsonl").read_bytes(),
        "metrics.jsonl": timeless,
        "model.safetensors": {n: x.tolist() for n, x in load_file(out / "model.safetensors").items()},
        "tensors": {name: x.tolist() for name, x in tensors(where, step).items()},
        "state": state,
    }
