"""A model's weights, read into memory: safetensors only, adapters merged, in 8 bits one tensor at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftModelForCausalLM
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from equipoise.errors import UserError
from equipoise.policy import saved, shapes
from equipoise.policy.adapter_config import CONFIG as ADAPTER
from equipoise.policy.adapter_config import check_ranks, check_tensors, lora_config
from equipoise.policy.eightbit import NotFinite, is_put_aside, put_aside
from equipoise.policy.hub import holds
from equipoise.policy.slices import Cut
from equipoise.policy.source import (
    Source,
    adapter_base,
    check_code,
    checkpoint_base,
    load_config,
    loading,
    place,
    read_object,
)
from equipoise.policy.streamed import OutOfMemory, Streamed, fits_its_configuration
from equipoise.policy.tied import tie_if_equal, untie


def load_model(
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    attn_implementation: str | None = None,
    eight_bits: torch.dtype | None = None,
    cut: Cut | None = None,
) -> PreTrainedModel:
    """The model in `dtype` on `device`, in evaluation mode; an adapter comes merged into its base.

    With `eight_bits`, one of the formats of `eightbit`, the linear layers' weights are rounded to it one by one as they
    are read, so that no more than one is in memory as it was; the model can compute once `eightbit.to_eight_bits` has
    put them in. With a `cut` the same goes for this process's parts of them, and `slices.cut_layers`.

    Only safetensors are read, and no code that comes with a model is run or fetched (docs/SECURITY.md). Raises
    UserError if the weights cannot be had, do not fit the configuration, or leave any of the model's parameters without
    a value.
    """
    device = torch.device(device)
    if source.kind in ("adapter", "checkpoint"):
        merged = _adapter_merged if source.kind == "adapter" else _checkpoint_merged
        return _rounded(*merged(source, attn_implementation), dtype, device, attn_implementation, eight_bits, cut)
    if source.kind == "shape":
        return shapes.random_model(source.path_or_id, dtype, device, attn_implementation, eight_bits, cut)
    where = place(source)
    if where == source.path_or_id and source.kind == "hub" and holds(where, ADAPTER):
        raise UserError(f"{where} is an adapter, or holds one: download it, and give the folder")
    config = load_config(source)
    check_code(config, source)
    options: dict[str, Any] = {}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if (eight_bits or cut is not None) and getattr(config, "quantization_config", None) is None:
        options["quantization_config"] = Streamed(eight_bits, cut)
    if device.type != "cpu":
        # Straight to the device: an 8B model need not fit into main memory first.
        index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
        options["device_map"] = {"": torch.device(device.type, index)}
    with loading(source), _errors_of_rounding():
        model, report = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        if (eight_bits or cut is not None) and not fits_its_configuration(model):
            raise RuntimeError("size mismatch")
    # transformers gives such parameters random values and carries on.
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"the weights of {source.given!r} lack {len(missing)} of the model's tensors ({missing[0]}, …): "
            "the copy is incomplete, or it is no causal language model"
        )
    return model


@contextmanager
def _errors_of_rounding() -> Iterator[None]:
    try:
        yield
    except OutOfMemory as error:
        raise error.__cause__ or error from None
    except NotFinite as error:
        raise error.told() from None


def _adapter_merged(source: Source, attn_implementation: str | None) -> tuple[PreTrainedModel, Source]:
    """The model in float32 on the CPU with the adapter merged into it, and its base.

    What the merge needs is on the CPU, so a small card can hold the result.
    """
    folder = Path(source.path_or_id)
    base, config = adapter_base(folder), lora_config(read_object(folder / ADAPTER), folder / ADAPTER)
    model = load_model(base, dtype=torch.float32, device="cpu", attn_implementation=attn_implementation)
    with loading(source):
        check_ranks(config, folder)
        # What an adapter does to the output head it does not do to the embedding, though they may share their weights;
        # of single tokens the peft library sees to that itself.
        if not config.ensure_weight_tying and config.trainable_token_indices is None:
            untie(model)
        adapted = PeftModelForCausalLM(model, config)
        found = adapted.load_adapter(source.path_or_id, "default", torch_device="cpu")
        check_tensors(found.missing_keys, found.unexpected_keys, folder)
        merged = adapted.merge_and_unload(safe_merge=True)
        tie_if_equal(merged, load_config(base))
        return merged, base


def _checkpoint_merged(source: Source, attn_implementation: str | None) -> tuple[PreTrainedModel, Source]:
    """The base in float32 on the CPU with the checkpoint's weights, adapters merged, and that base."""
    folder = Path(source.path_or_id)
    base = checkpoint_base(folder)
    model = load_model(base, dtype=torch.float32, device="cpu", attn_implementation=attn_implementation)
    model = saved.put_weights(model, saved.read_saved(folder))
    return model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model, base


@torch.no_grad()
def _rounded(
    model: PreTrainedModel,
    base: Source,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
    eight_bits: torch.dtype | None,
    cut: Cut | None,
) -> PreTrainedModel:
    """A float32 model, rounded once to the dtypes that its base has when loaded in `dtype`, on `device`; in 8 bits from
    those, a tensor at a time.

    Only what the base itself has in `dtype` is rounded. A cast of the whole model would round the frequencies of the
    rotary embedding too, which always are float32, and move every position.
    """
    if dtype == torch.float32 and not eight_bits and cut is None:
        return model.to(device=device).eval()
    rounded = load_model(
        base, dtype=dtype, device=device, attn_implementation=attn_implementation, eight_bits=eight_bits, cut=cut
    )
    if not model.config.get_text_config().tie_word_embeddings:
        untie(rounded)
    weights = dict(model.named_parameters())
    assert weights.keys() == {name for name, _ in rounded.named_parameters()}, "of another shape than its base"
    for name, parameter in rounded.named_parameters():
        layer = rounded.get_submodule(name.rpartition(".")[0])
        if is_put_aside(layer) and parameter is layer.weight:
            assert eight_bits is not None
            with _errors_of_rounding():
                put_aside(layer, name, weights[name].to(device=device, dtype=dtype), eight_bits)
        elif isinstance(layer, nn.Linear) and "slice" in layer.__dict__ and parameter is layer.weight:
            assert cut is not None
            cut.put_aside(name.removesuffix(".weight"), layer, weights[name].to(device=device, dtype=dtype))
        else:
            parameter.copy_(weights[name])
    return rounded.eval()
