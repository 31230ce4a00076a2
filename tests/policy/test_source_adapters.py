"""A LoRA adapter's folder as a model: merged into its base, or refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from equipoise.errors import UserError
from equipoise.policy.source import load_tokenizer, resolve
from equipoise.policy.weights import load_model
from tests.policy.sources import ADAPTED, CPU, change_json

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_an_adapter_folder_loads_merged_into_its_base(adapter: Path) -> None:
    source = resolve(str(adapter))
    assert source.kind == "adapter"
    model = load_model(source, **CPU)
    expected = torch.load(adapter.parent / "logits.pt", weights_only=True)
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(torch.arange(3, 20)[None]).logits, expected, rtol=0, atol=1e-5)
    assert load_tokenizer(source).eos_token == "<|im_end|>"  # the base's, as the adapter has none


def test_an_adapter_without_effect_is_its_base_to_the_bit_in_every_dtype(adapter: Path, folder: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({n: torch.zeros_like(t) if "lora_B" in n else t for n, t in weights.items()}, adapter / ADAPTED)
    ids = torch.arange(400)[None, :200] % 200 + 3
    for dtype in (torch.bfloat16, torch.float32):
        base, merged = (load_model(resolve(str(f)), dtype=dtype, device="cpu") for f in (folder, adapter))
        assert torch.equal(merged(ids).logits, base(ids).logits), dtype
        assert {n: b.dtype for n, b in merged.named_buffers()} == {n: b.dtype for n, b in base.named_buffers()}


def test_an_adapter_that_has_an_effect_is_rounded_once(adapter: Path) -> None:
    exact, rounded = (load_model(resolve(str(adapter)), dtype=t, device="cpu") for t in (torch.float32, torch.bfloat16))
    for name, parameter in rounded.named_parameters():
        assert torch.equal(parameter, dict(exact.named_parameters())[name].bfloat16()), name


@pytest.mark.parametrize("how", ["prefix", "other", "half", "extra"])
def test_an_adapter_whose_tensors_are_not_those_of_its_layers_is_refused(adapter: Path, how: str) -> None:
    weights = load_file(adapter / ADAPTED)
    first = next(n for n in weights if ".layers.0." in n)
    changed = {
        "prefix": {n.removeprefix("base_model.model."): t for n, t in weights.items()},
        "other": {"x": torch.zeros(64, 64)},
        "half": {n: t for n, t in weights.items() if "v_proj" not in n},
        "extra": weights | {first.replace(".layers.0.", ".layers.9."): weights[first].clone()},
    }
    save_file(changed[how], adapter / ADAPTED)
    with pytest.raises(UserError, match=r"the adapter in .* (lacks|has) \d+ ") as caught:
        load_model(resolve(str(adapter)), **CPU)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_leads_back_to_itself_is_refused(adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(adapter))
    with pytest.raises(UserError, match="is its own base"):
        resolve(str(adapter))
    shutil.copytree(adapter, adapter.parent / "second")
    change_json(adapter / "adapter_config.json", base_model_name_or_path=str(adapter.parent / "second"))
    with pytest.raises(UserError, match="is its own base"):
        resolve(str(adapter))


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "x"}, {"num_attention_heads": 0}, {"hidden_size": -1}, {"num_hidden_layers": "two"}, {"vocab_size": {}}],
)
def test_any_nonsense_of_a_configuration_is_one_line(folder: Path, changes: dict[str, object]) -> None:
    change_json(folder / "config.json", **changes)
    with pytest.raises(UserError) as caught:
        load_model(resolve(str(folder)), **CPU)
    assert "\n" not in str(caught.value)


def test_an_adapters_base_must_be_named_and_be_no_adapter_itself(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base, message in ((None, "names no base model"), ("absent", "no model 'absent'"), (str(adapter), "another")):
        if base == str(adapter):  # an adapter whose base is an adapter whose base is a folder
            shutil.copytree(adapter, adapter.parent / "second")
            (adapter / "adapter_config.json").write_text(
                json.dumps(config | {"base_model_name_or_path": str(adapter.parent / "model")})
            )
            name = adapter.parent / "second"
        else:
            name = adapter
        (name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(UserError, match=message):
            resolve(str(name))


def test_an_adapter_may_name_the_bundled_model_as_its_base(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "bundled"}))
    assert resolve(str(adapter)).kind == "adapter"
