"""A training checkpoint as a model: which base it belongs to, and its trained weights put into that."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.policy.adapters import with_adapters
from equipoise.policy.config import PolicyConfig
from equipoise.protocol.task import Task
from equipoise.runs.checkpoint import MANIFEST, Checkpoint, open_checkpoint
from equipoise.runs.records import task_on_record

WEIGHTS, CONFIG, AVERAGES = "weights.safetensors", "config.json", "optimizer.safetensors"


class Saved(NamedTuple):
    """What a checkpoint says of itself, its weights unread."""

    folder: Path
    config: Mapping[str, Any]
    """The whole configuration of the run."""
    policy: PolicyConfig
    """How the run loaded its model."""
    weights_sha256: str

    @property
    def task(self) -> Task:
        """Raises UserError."""
        return task_on_record(self.config, str(self.folder / CONFIG))

    @property
    def averaged(self) -> bool:
        """Whether the run exports a moving average of its weights."""
        ppo = self.config.get("ppo")
        return isinstance(ppo, Mapping) and bool(ppo.get("average_weights"))


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a checkpoint by its files: those of no model folder."""
    return all((folder / name).is_file() for name in (MANIFEST, WEIGHTS, CONFIG)) and not (
        (folder / "model.safetensors").exists() or (folder / "adapter_config.json").exists()
    )


def read_saved(folder: Path) -> Saved:
    """What the checkpoint says of itself. Raises UserError for one that is damaged or not of a training."""
    try:
        config = read_json(folder / CONFIG)
        manifest = read_json(folder / MANIFEST)
        names = {f.name for f in dataclasses.fields(PolicyConfig)}
        policy = PolicyConfig(**{name: value for name, value in config["policy"].items() if name in names})
        sha256 = manifest["files"][WEIGHTS]["sha256"]
        if isinstance(policy.model, str) and isinstance(config["prompt"], str) and isinstance(sha256, str):
            return Saved(folder, config, policy, sha256)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{folder} is no checkpoint of a training, or a damaged one: name another, or restore it")


@torch.no_grad()
def put_weights(base: nn.Module, saved: Saved) -> Any:
    """The base with the checkpoint's weights in it, adapters not merged; those that training would export: the moving
    average where it keeps one. Raises UserError for a damaged checkpoint, and one that does not fit the base."""
    checkpoint = open_checkpoint(saved.folder)
    model = with_adapters(base, saved.policy)[0] if saved.policy.tuning == "lora" else base
    weights = _weights(checkpoint, saved)
    parameters = dict(model.named_parameters())
    expected = {name for name in parameters if saved.policy.tuning == "full" or ".lora_" in name}
    if set(weights) != expected or any(parameters[name].shape != weights[name].shape for name in expected):
        raise UserError(
            f"{saved.folder} does not fit its base model {saved.policy.model!r}: it must be the one that was trained"
        )
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)
    return model


def _weights(checkpoint: Checkpoint, saved: Saved) -> dict[str, Tensor]:
    weights = {n: t for n, t in checkpoint.tensors("weights").items() if not n.startswith("value_head.")}
    if not saved.averaged:
        return weights
    averages = checkpoint.tensors("optimizer")
    return {name: averages.get(f"{name}.average", tensor) for name, tensor in weights.items()}
