"""The rehearsed export finds before training what would stop the real one, and costs a hundredth of it."""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from equipoise.errors import NonFiniteError, UserError
from equipoise.policy import export as exporting
from equipoise.policy import placed
from equipoise.policy.export import ModelCard, export, rehearse
from tests.tiny import tiny_model, tiny_tokenizer

CARD = ModelCard(method="PPO, 3 steps", prompt="describe")


def rehearsed(model: Any, folder: Path) -> None:
    rehearse(model, tiny_tokenizer(), folder, card=CARD)


@pytest.mark.parametrize("small", [1, 1_000_000_000])
def test_one_column_of_every_weight_is_written_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    sizes: dict[str, int] = {}
    move = placed._move

    def moved(partial: Path, *rest: Any) -> None:
        sizes.update({path.name: path.stat().st_size for path in partial.iterdir()})
        move(partial, *rest)

    monkeypatch.setattr(placed, "_move", moved)
    monkeypatch.setattr(exporting, "SMALL", small)
    model = tiny_model()
    rehearsed(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    names, few = set(sizes), sizes["model.safetensors"]
    export(model, tiny_tokenizer(), tmp_path / "real", card=CARD)
    assert names == set(sizes)
    held = model.state_dict().values()
    columns = sum(p.numel() // p.shape[-1] for p in held)
    header = sizes["model.safetensors"] - 4 * sum(p.numel() for p in {p.data_ptr(): p for p in held}.values())
    assert few <= header + 4 * columns + 64


@pytest.mark.parametrize(
    "change", [lambda found: found.pop("model.norm.weight"), lambda found: found.update(more=torch.ones(1))]
)
def test_names_that_do_not_come_back_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], Any]
) -> None:
    plain = LlamaForCausalLM.save_pretrained

    def save(self: Any, folder: Path, state_dict: dict[str, Any], **rest: Any) -> None:
        plain(self, folder, state_dict=state_dict, **rest)
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    with pytest.raises(UserError, match="could not be exported after training"):
        rehearsed(tiny_model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("lora", [False, True])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float, lora: bool) -> None:
    model: Any = tiny_model()
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    name, weight = list(model.named_parameters())[3]
    weight.data[0, :2] = value
    with pytest.raises(NonFiniteError, match=rf"2 values of the weight {re.escape(name)} are NaN or infinite"):
        rehearsed(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_whose_sum_alone_is_beyond_float32_pass(tmp_path: Path) -> None:
    model = tiny_model()
    model.model.norm.weight.data.fill_(3e38)
    assert model.model.norm.weight.sum().isinf()
    rehearsed(model, tmp_path / "out")


def test_room_is_asked_for_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    needed = 4 * sum(p.numel() for p in model.parameters()) + 50_000_000
    free = needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    rehearsed(model, tmp_path / "out")
    free = needed - 1
    with pytest.raises(UserError, match=r"the model needs 0\.1 GB .* free some space"):
        rehearsed(model, tmp_path / "out")


def test_adapters_that_cannot_be_merged_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UserError, match=r"could not be exported after training \(plain LoRA only\)"):
        rehearsed(model, tmp_path / "out")


def test_transformers_says_nothing_of_columns(tmp_path: Path) -> None:
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(handler := Listening())
    try:
        rehearsed(tiny_model(), tmp_path / "out")
    finally:
        logger.removeHandler(handler)
    assert said == []
