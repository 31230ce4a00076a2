"""Checkpoints that say of which step they are."""

import os
from pathlib import Path

import torch

from equipoise.runs.checkpoint import newest, save_checkpoint


def save(folder: Path, step: int, size: int = 5000) -> Path:
    tensors = {name: {"w": torch.full((size,), float(step))} for name in ("model", "optimizer")}
    return save_checkpoint(folder, step, tensors, {"loop": {"step": step}})


def assert_of_one_step(folder: Path) -> int:
    found = newest(folder)
    assert found is not None
    for name in (file.removesuffix(".safetensors") for file in found.files if file.endswith(".safetensors")):
        for tensor in found.tensors(name).values():
            assert tensor.eq(found.step).all()
    assert found.document("loop") == {"step": found.step}
    return found.step


def visible_and_hidden(folder: Path) -> tuple[set[str], set[str]]:
    names = set(os.listdir(folder)) - {".lock"}
    return {name for name in names if name[0] != "."}, {name for name in names if name[0] == "."}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
