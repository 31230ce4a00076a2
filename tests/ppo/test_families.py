"""Whole runs of models that are not Llama: they end with a model, or are refused in one line before the first step."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from equipoise.errors import UserError
from equipoise.ppo import train as training
from equipoise.ppo.preflight import preflight
from tests.families import FAMILIES, family_folder
from tests.ppo.small import rows, small_config

FEW = ("mpt", "mixtral", "gpt-oss", "mamba", "bamba")
EVERY = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", EVERY)
def test_a_run_starts_trains_and_leaves_a_model_that_loads(name: str, tmp_path: Path) -> None:
    folder = family_folder(name, tmp_path / "model")
    config, lines = preflight(small_config(folder, tmp_path, steps=2, eval_sentences=0))
    assert lines
    assert training.train(config).status == "done"
    assert len(rows(tmp_path)) == 2
    for row in rows(tmp_path):
        assert row["ppo/updates"] >= 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()
    assert not list((tmp_path / "out").glob(".*export*"))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_what_cannot_be_exported_is_refused_before_the_first_step(
    tuning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_folder("llama", tmp_path / "model")
    for file in ("config.json", "generation_config.json"):
        document = json.loads((folder / file).read_text()) | {"pad_token_id": -1}
        (folder / file).write_text(json.dumps(document))
    monkeypatch.setattr(training, "ppo_step", lambda _: pytest.fail("a step was run"))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="could not be exported after training") as refusal:
        training.train(small_config(folder, tmp_path, tuning=tuning))
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_resumed_run_rehearses_nothing_and_ends_alike(tmp_path: Path) -> None:
    folder = family_folder("mpt", tmp_path / "model")
    training.train(small_config(folder, tmp_path / "whole", steps=4))
    training.train(small_config(folder, tmp_path / "parts", steps=2))
    training.train(small_config(folder, tmp_path / "parts", steps=4))
    whole, parts = ((tmp_path / name / "out" / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_training_of_a_model_that_is_not_packed_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training.train(small_config(family_folder("mpt", tmp_path / "model"), tmp_path, steps=1))
    assert capsys.readouterr().out.count("the plain way is taken everywhere") == 1
