"""What several tests of where a model is have in common."""

import json
from pathlib import Path

import torch

ADAPTED = "adapter_model.safetensors"
CPU = {"dtype": torch.float32, "device": "cpu"}


def cached(hub_cache: Path, name: str, files: dict[str, str]) -> None:
    snapshot = hub_cache / f"models--org--{name}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (hub_cache / f"models--org--{name}" / "refs").mkdir()
    (hub_cache / f"models--org--{name}" / "refs" / "main").write_text("abc")
    for file, text in files.items():
        (snapshot / file).write_text(text)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
