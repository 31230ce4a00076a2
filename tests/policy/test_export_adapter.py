"""The adapter alone: peft's own loader puts it on the base, and it computes what the merged model computes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.cli import main
from equipoise.errors import NonFiniteError, UserError
from equipoise.methods.sft import SftConfig
from equipoise.policy.card import ModelCard, is_card
from equipoise.policy.config import PolicyConfig
from equipoise.policy.export import export
from equipoise.policy.export_adapter import export_adapter
from equipoise.policy.load import Policy, load_policy
from equipoise.policy.placed import is_finished
from equipoise.policy.source import Source, resolve
from equipoise.policy.weights import load_model
from equipoise.ppo.train import train
from equipoise.protocol.task import PROTOCOL
from tests.ppo.small import small_config
from tests.tiny import perturb, words_folder

CARD = ModelCard("PPO, 2 steps", "raw")
TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return words_folder(tmp_path / "base", prompt=None)


@pytest.fixture
def policy(base: Path) -> Policy:
    config = PolicyConfig(str(base), dtype="float32", device="cpu", lora_rank=4)
    return perturb(load_policy(config, PROTOCOL.prompt("raw")))


def write(policy: Policy, folder: Path) -> None:
    export_adapter(policy.model, policy.tokenizer, folder, card=CARD, source=policy.source, stop_ids=policy.stop_ids)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def test_peft_loads_it_on_the_base_with_the_logits_of_the_merged_model(
    policy: Policy, base: Path, tmp_path: Path
) -> None:
    write(policy, tmp_path / "adapter")
    export(policy.model, policy.tokenizer, tmp_path / "merged", card=CARD, source=policy.source)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    adapted = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    torch.testing.assert_close(adapted, merged, rtol=1e-5, atol=1e-5)
    assert (adapted - before).abs().max() > 0.01
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").get_vocab() == policy.tokenizer.get_vocab()
    # This program's own loader: the folder is the name of a model.
    own = load_model(resolve(str(tmp_path / "adapter")), dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logits(own), merged, rtol=1e-5, atol=1e-5)


def test_its_files_are_the_same_bytes_in_every_process_and_name_the_base(
    policy: Policy, base: Path, tmp_path: Path
) -> None:
    write(policy, tmp_path / "adapter")
    document = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert document["base_model_name_or_path"] == str(base) and document["inference_mode"] is True
    assert document["target_modules"] == sorted(document["target_modules"]) and document["r"] == 4
    assert not (tmp_path / "adapter/config.json").exists()
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in names)


def test_the_card_says_that_it_is_an_adapter_and_its_example_runs(
    policy: Policy, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(policy, tmp_path / "adapter")
    text = (tmp_path / "adapter/README.md").read_text()
    assert is_card(text) and 'library_name: "peft"' in text and "the LoRA adapter alone" in text
    code = text.split("```python\n")[1].split("```")[0].replace('base = "base"', f"base = {str(base)!r}")
    monkeypatch.chdir(tmp_path / "adapter")
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.startswith("The architect was") for line in lines)


def test_one_form_takes_the_place_of_the_other_and_nothing_of_anyone_elses(policy: Policy, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(policy.model, policy.tokenizer, folder, card=CARD, source=policy.source)
    write(policy, folder)
    assert is_finished(folder, "adapter") and not is_finished(folder, "merged")
    assert not (folder / "config.json").exists()
    export(policy.model, policy.tokenizer, folder, card=CARD, source=policy.source)
    assert is_finished(folder, "merged") and not (folder / "adapter_config.json").exists()
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="equipoise did not write it"):
        write(policy, folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (Source("there", "adapter", "there"), "'there', which is an adapter itself: use --save merged"),
        (Source("there", "checkpoint", "there"), "a checkpoint"),
        (None, "began from unknown"),
    ],
)
def test_a_base_that_is_no_model_by_itself_is_refused(
    policy: Policy, tmp_path: Path, source: Source | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        export_adapter(policy.model, policy.tokenizer, tmp_path / "out", card=CARD, source=source)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_not_saved(policy: Policy, tmp_path: Path) -> None:
    next(p for n, p in policy.model.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="1 values of the weight"):
        write(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_save_is_refused_before_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["train", "--steps", "1"], ["sft", "--data", "forced"]):
        assert main([*command, "--model", str(base), "--tuning", "full", "--save", "adapter"]) == 2
        assert "--save adapter has nothing to save with --tuning full" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    config = small_config(base, tmp_path, tuning="full")
    with pytest.raises(UserError, match="nothing to save"):
        replace(config, run=replace(config.run, save="adapter"))
    with pytest.raises(UserError, match="nothing to save"):
        SftConfig(save="adapter", policy=config.policy)


def test_a_run_leaves_its_adapter_and_the_same_command_finds_it_complete(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(base, tmp_path, steps=2)
    config = replace(config, run=replace(config.run, save="adapter"))
    assert train(config).exit_code == 0
    out = tmp_path / "out"
    assert is_finished(out, "adapter") and not (out / "model.safetensors").exists()
    capsys.readouterr()
    assert train(config).exit_code == 0
    assert "this run is complete" in capsys.readouterr().out
    adapted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out))
    # Asked for the whole model afterwards, the run writes that, and the two are one model.
    assert train(replace(config, run=replace(config.run, save="merged"))).exit_code == 0
    assert not (out / "adapter_model.safetensors").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), adapted, rtol=1e-5, atol=1e-5)
    # And the checkpoint's, by `equipoise export`.
    exported = ["export", str(tmp_path / "checkpoints/checkpoint-2"), "--save", "adapter"]
    assert main([*exported, "--output-dir", str(tmp_path / "exported"), "--device", "cpu"]) == 0
    again = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "exported"))
    torch.testing.assert_close(again, adapted, rtol=1e-5, atol=1e-5)
