"""Weights rounded while they are read: the bytes of the whole model, and never more of it in memory than a layer."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from equipoise.errors import UserError
from equipoise.policy import eightbit, shapes
from equipoise.policy.adapters import with_adapters
from equipoise.policy.config import PolicyConfig
from equipoise.policy.eightbit import ROTATED, EightBitLinear, to_eight_bits
from equipoise.policy.source import resolve
from equipoise.policy.streamed import Streamed, _Quantizer
from equipoise.policy.weights import load_model
from tests.families import FAMILIES, family_folder
from tests.policy.eight_bits import bytes_of
from tests.tiny import tiny_folder, tiny_model


def both_ways(model: str, dtype: torch.dtype, into: torch.dtype = torch.int8) -> tuple[nn.Module, nn.Module]:
    """Loaded whole and then rounded, and rounded while it is read."""
    source = resolve(model)
    torch.manual_seed(0)
    whole = load_model(source, dtype=dtype, device="cpu")
    torch.manual_seed(0)
    streamed = load_model(source, dtype=dtype, device="cpu", eight_bits=into)
    to_eight_bits(whole, into)
    to_eight_bits(streamed, into)
    return whole, streamed


def same(whole: nn.Module, streamed: nn.Module) -> None:
    assert bytes_of(whole) == bytes_of(streamed)
    assert [type(m) for m in whole.modules()] == [type(m) for m in streamed.modules()]
    # Since transformers 5.24 a model knows how the names in its files were changed, if any were, while it was read.
    assert vars(whole).keys() - {"_weight_conversions"} == vars(streamed).keys() - {"_weight_conversions"}
    first, second = (json.loads(m.config.to_json_string()) for m in (whole, streamed))  # type: ignore[union-attr,operator]
    assert first == second


@pytest.mark.parametrize(
    ("tie", "dtype", "into"),
    [
        (False, torch.float32, torch.int8),
        (True, torch.float32, torch.int8),
        (False, torch.bfloat16, ROTATED),
        (True, torch.bfloat16, ROTATED),
    ],
)
def test_a_model_of_several_files_gives_the_bytes_of_the_whole_model(
    tmp_path: Path, tie: bool, dtype: torch.dtype, into: torch.dtype
) -> None:
    folder = tiny_folder(tmp_path / "model", tie)
    tiny_model(tie).save_pretrained(folder, max_shard_size="12KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 3
    whole, streamed = both_ways(str(folder), dtype, into)
    assert sum(isinstance(m, EightBitLinear) for m in streamed.modules()) == 14
    same(whole, streamed)
    ids = torch.arange(3, 30)[None]
    assert torch.equal(whole(ids).logits, streamed(ids).logits)


QUICK = ("llama3.2", "gpt2", "qwen3-moe", "deepseek-v2", "phi3", "falcon")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_every_family_gives_the_bytes_of_the_whole_model(tmp_path: Path, name: str) -> None:
    same(*both_ways(str(family_folder(name, tmp_path)), torch.bfloat16))


@pytest.mark.parametrize(("dtype", "into"), [(torch.float32, torch.int8), (torch.bfloat16, ROTATED)])
def test_an_adapter_is_merged_before_the_weights_are_rounded(
    tmp_path: Path, dtype: torch.dtype, into: torch.dtype
) -> None:
    folder = tiny_folder(tmp_path / "base")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(load_model(resolve(str(folder)), dtype=torch.float32, device="cpu"), config)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "adapter")
    same(*both_ways(str(tmp_path / "adapter"), dtype, into))


@pytest.mark.parametrize(("shape", "into"), [("shape:tiny", torch.int8), ("shape:tiny:1", ROTATED)])
def test_a_shape_gives_the_bytes_of_the_whole_random_model(shape: str, into: torch.dtype) -> None:
    whole, streamed = both_ways(shape, torch.bfloat16, into)
    same(whole, streamed)
    assert len(whole.model.layers) == (1 if shape.endswith(":1") else 2)  # type: ignore[arg-type,union-attr]
    logits = streamed(torch.arange(3, 30)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0.01


def test_a_shape_of_fewer_layers_is_the_first_of_them_and_others_are_refused() -> None:
    assert shapes.shape_config("llama-3.1-70b").num_hidden_layers == 80
    assert shapes.shape_config("llama-3.1-70b:20").num_hidden_layers == 20
    for wrong in ("0", "81", "", "-1", "x", "²", "1" * 5000):
        with pytest.raises(UserError, match="give 1 to 80"):
            resolve(f"shape:llama-3.1-70b:{wrong}")
    with pytest.raises(UserError, match="there is no shape"):
        resolve("shape:llama-3.1-90b:2")


def test_shapes_have_the_number_of_weights_that_their_names_say() -> None:
    for name, billions in (("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55)):
        with torch.device("meta"):
            model = LlamaForCausalLM(shapes.shape_config(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_adapters_around_weights_that_wait_are_those_around_whole_ones(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    made = []
    for eight_bits in (None, ROTATED):
        model = load_model(resolve(str(folder)), dtype=torch.bfloat16, device="cpu", eight_bits=eight_bits)
        torch.manual_seed(3)
        adapted, _ = with_adapters(model, PolicyConfig(str(folder), device="cpu"))
        to_eight_bits(adapted, ROTATED)
        made.append(adapted)
    same(*made)
    trained = [n for n, p in made[1].named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_weights_that_wait_give_no_numbers(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    model = load_model(resolve(str(folder)), dtype=torch.float32, device="cpu", eight_bits=torch.int8)
    assert model(torch.arange(3, 9)[None]).logits.isnan().all()


def peak(work: Callable[[], Any]) -> int:
    """The most bytes that PyTorch's allocator held at a time on the CPU while `work` ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    seen = [e["args"] for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == 0]
    before = seen[0]["Total Allocated"] - seen[0]["Bytes"]  # of earlier measurements
    return int(max(each["Total Allocated"] for each in seen) - before)


def wide_folder(folder: Path) -> Path:
    """A Llama whose layers are most of it, in two dozen files of float32."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=128, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=16,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="300KB")
    return folder


@pytest.mark.parametrize("kind", ["folder", "shape"])
def test_no_more_than_one_layer_is_in_memory_as_it_was(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eightbit, "BLOCK", 1 << 12)
    sizes = {**shapes.SHAPES["tiny"], "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8}
    monkeypatch.setitem(shapes.SHAPES, "wide", {**sizes, "vocab_size": 16})
    source = resolve(str(wide_folder(tmp_path)) if kind == "folder" else "shape:wide")

    def loaded(streamed: bool) -> nn.Module:
        model = load_model(source, dtype=torch.bfloat16, device="cpu", eight_bits=ROTATED if streamed else None)
        to_eight_bits(model, ROTATED)
        return model

    finished = sum(map(len, bytes_of(loaded(True)).values()))
    matrix = 128 * 512 * 2
    assert finished <= peak(lambda: loaded(True)) < finished + 2 * matrix
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # what other threads allocate is not seen
    assert peak(lambda: loaded(False)) > 1.7 * finished


def test_matrices_that_are_used_twice_or_have_a_dtype_of_their_own_are_left_to_the_end() -> None:
    model = tiny_model().bfloat16()
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    other = "model.layers.0.mlp.gate_proj.weight"
    quantizer = _Quantizer(Streamed(torch.int8), pre_quantized=False)
    assert all(quantizer.param_needs_quantization(model, name) for name in (first, second, other))
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, second: first}
    model.get_submodule("model.layers.0.mlp.gate_proj").float()
    assert not any(quantizer.param_needs_quantization(model, name) for name in (first, second, other))


def test_memory_is_reserved_for_the_8_bits_and_not_for_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[float] = []

    def warm_up(model: Any, device_map: dict[str, Any], quantizer: Any) -> None:
        tensors = {name: model.get_parameter_or_buffer(name) for name in device_map}
        reserved.extend(t.numel() * quantizer.param_element_size(model, n, t) for n, t in tensors.items())

    monkeypatch.setattr("transformers.modeling_utils.caching_allocator_warmup", warm_up)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder(tmp_path, tie=False),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=Streamed(torch.int8),
    )
    to_eight_bits(model)
    assert sum(reserved) == sum(t.nbytes for n, t in model.state_dict().items() if not n.endswith(".scale"))


def test_memory_that_gives_out_while_rounding_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    folder = tiny_folder(tmp_path)
    monkeypatch.setattr(eightbit, "quantise", full)
    with pytest.raises(UserError, match="does not fit into the GPU's memory"):
        load_model(resolve(str(folder)), dtype=torch.float32, device="cpu", eight_bits=torch.int8)


def test_a_damaged_or_foreign_model_is_refused_as_without_8_bits(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for change, match in (
        ({"intermediate_size": 64}, "belong to different models"),
        ({"num_hidden_layers": 3}, "lack"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        for eight_bits in (None, torch.int8):
            with pytest.raises(UserError, match=match):
                load_model(resolve(str(folder)), dtype=torch.float32, device="cpu", eight_bits=eight_bits)
