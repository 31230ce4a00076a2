"""The exported model is the trained one: its logits, its dtype, whatever it was trained with."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from equipoise.policy import export as exporting
from equipoise.policy.eightbit import ROTATED, to_eight_bits
from equipoise.policy.export import export, merged_weights, rehearse
from equipoise.policy.source import load_tokenizer, resolve
from equipoise.policy.weights import load_model
from tests.families import family_folder
from tests.policy.exported import CARD, IDS, logits, reload, with_adapters
from tests.tiny import TOKENS, tiny_folder, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("tie", [True, False])
def test_the_exported_adapters_give_the_adapter_models_logits(tmp_path: Path, tie: bool) -> None:
    model = with_adapters(tiny_model(tie))
    expected = logits(model)
    with model.disable_adapter():
        base = logits(model)
    assert (expected - base).abs().max() > 0.1  # the adapters matter
    export(model, tiny_tokenizer(), tmp_path, card=CARD)
    plain = reload(tmp_path)
    assert type(plain).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=2e-5)
    tied = plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    assert tied == tie
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) == (not tie)  # noqa: SIM118


def test_rank_stabilised_scaling_and_transposed_layers_merge_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(TOKENS), n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    model = with_adapters(GPT2LMHeadModel(config).eval(), use_rslora=True, fan_in_fan_out=True)
    expected = logits(model)
    export(model, tiny_tokenizer(), tmp_path, card=CARD)
    torch.testing.assert_close(logits(reload(tmp_path)), expected, rtol=0, atol=2e-5)


def test_a_fully_trained_model_is_exported_as_it_is(tmp_path: Path) -> None:
    model = tiny_model()
    export(model, tiny_tokenizer(), tmp_path, card=CARD)
    assert torch.equal(logits(reload(tmp_path)), logits(model))


def test_a_model_whose_file_names_differ_from_its_modules_survives_the_trip(tmp_path: Path) -> None:
    """In memory a mixture's experts are one tensor, in the published files many."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    export(model, tiny_tokenizer(), tmp_path, card=CARD)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert any("experts.2." in name for name in file.keys())  # noqa: SIM118
    assert torch.equal(logits(reload(tmp_path)), logits(model))


def test_the_live_model_is_untouched_and_trains_on(tmp_path: Path) -> None:
    model = with_adapters(tiny_model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = (str(model.config), str(model.get_base_model().generation_config), logits(model))
    export(model, tiny_tokenizer(), tmp_path, card=CARD, dtype=torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (str(model.config), str(model.get_base_model().generation_config)) == state[:2]
    assert torch.equal(logits(model), state[2])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), state[2])


def test_merging_rounds_once_even_from_bfloat16_weights_and_adapters() -> None:
    model = with_adapters(tiny_model()).to(torch.bfloat16)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = (layer.base_layer.weight.double() + 7 / 4 * b @ a).detach()  # lora_alpha / r
    merged = merged_weights(model, torch.float32, None)["model.layers.1.mlp.down_proj.weight"]
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), exact, rtol=1e-6, atol=1e-7)
    rounded = merged_weights(model, torch.bfloat16, None)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(rounded, exact.to(torch.bfloat16))


def test_a_quantised_base_is_merged_from_the_original_weights(tmp_path: Path) -> None:
    """The 8-bit layers themselves need a GPU; what export sees of them is rounded values and the flag."""
    source = resolve(str(tiny_folder(tmp_path / "original")))
    exact = with_adapters(tiny_model())
    rounded = with_adapters(tiny_model())
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if "base_layer" in name:
                parameter.copy_((parameter * 16).round() / 16)
    rounded.get_base_model().is_quantized = True
    assert (logits(rounded) - logits(exact)).abs().max() > 0.1
    export(rounded, tiny_tokenizer(), tmp_path / "out", card=CARD, source=source)
    torch.testing.assert_close(logits(reload(tmp_path / "out")), logits(exact), rtol=0, atol=2e-5)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_has_the_dtype_asked_for_and_says_so(tmp_path: Path, dtype: torch.dtype) -> None:
    export(with_adapters(tiny_model()), tiny_tokenizer(), tmp_path, card=CARD, dtype=dtype)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118
    assert reload(tmp_path).dtype == dtype


def test_a_small_model_is_float32_by_default_whatever_it_was_trained_in(tmp_path: Path) -> None:
    export(with_adapters(tiny_model()).to(torch.bfloat16), tiny_tokenizer(), tmp_path, card=CARD)
    assert reload(tmp_path).dtype == torch.float32


@pytest.mark.parametrize("into", [torch.int8, ROTATED])
@pytest.mark.parametrize("lora", [False, True])
def test_an_export_of_weights_in_8_bits_is_rehearsed_and_made(tmp_path: Path, into: torch.dtype, lora: bool) -> None:
    source = resolve(str(tiny_folder(tmp_path / "original")))
    exact = tiny_model() if not lora else with_adapters(tiny_model())
    model = tiny_model() if not lora else with_adapters(tiny_model())
    to_eight_bits(model, into)
    rehearse(model, tiny_tokenizer(), tmp_path / "out", card=CARD, source=source)
    assert not (tmp_path / "out").exists()
    export(model, tiny_tokenizer(), tmp_path / "out", card=CARD, source=source)
    torch.testing.assert_close(logits(reload(tmp_path / "out")), logits(exact), rtol=0, atol=2e-5)


def test_gpt2s_weights_in_8_bits_are_merged_from_the_original_ones(tmp_path: Path) -> None:
    source = resolve(str(family_folder("gpt2", tmp_path / "original")))
    made = []
    for rounded in (False, True):
        torch.manual_seed(0)
        model = with_adapters(load_model(source, dtype=torch.float32, device="cpu"))
        if rounded:
            to_eight_bits(model)
        made.append(model)
    exact, model = made
    assert model.get_submodule("base_model.model.transformer.h.0.attn.c_attn.base_layer").q.dtype == torch.int8
    rehearse(model, load_tokenizer(source), tmp_path / "out", card=CARD, source=source)
    expected = merged_weights(exact, torch.float32, None)
    found = merged_weights(model, torch.float32, source)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_weights_in_8_bits_count_where_the_dtype_of_the_file_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    model = tiny_model().bfloat16()
    whole = sum(p.numel() for p in model.parameters())
    to_eight_bits(model)
    assert sum(p.numel() for p in model.parameters()) < whole - 1000
    for small, expected in ((whole + 1, torch.float32), (whole - 1000, torch.bfloat16)):
        monkeypatch.setattr(exporting, "SMALL", small)
        export(model, tiny_tokenizer(), tmp_path / str(small), card=CARD, source=resolve(str(tmp_path / "base")))
        assert reload(tmp_path / str(small)).dtype == expected
