"""The final model as a plain Hugging Face folder, adapters merged, that loads without anything of ours."""

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from equipoise.documents import read_json
from equipoise.errors import NonFiniteError, UserError
from equipoise.policy.adapter_config import CONFIG as ADAPTER_CONFIG
from equipoise.policy.beside import generation_config, save_tokenizer
from equipoise.policy.card import ModelCard, render
from equipoise.policy.eightbit import EightBitLinear
from equipoise.policy.export_adapter import export_adapter
from equipoise.policy.hub import quiet_progress
from equipoise.policy.placed import WEIGHTS, not_ours, put, write_texts
from equipoise.policy.slices import matrix_weights
from equipoise.policy.source import Source
from equipoise.policy.versions import for_both
from equipoise.policy.weights import load_model

REHEARSAL = ".equipoise-rehearsal"
BESIDE = 50_000_000
"""Bytes for what lies beside the weights."""
SMALL = 1_000_000_000
"""Below this many parameters an export is float32 by default: rounding a merge costs more than the disk space."""


def export(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: ModelCard,
    source: Source | None = None,
    dtype: torch.dtype | None = None,
    stop_ids: Iterable[int] | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write `model` into `folder`: config.json, one model.safetensors, tokenizer, generation_config.json, README.md.

    LoRA adapters are merged in float32 and rounded once, one tensor at a time on the CPU; `model` stays as it is. Where
    the base is quantised, the adapters are merged into the original weights, loaded again from `source`.
    `dtype` is that of the file: by default float32 for a model below a billion parameters, else bfloat16 (float32 where
    the model computes in it). `stop_ids` end a text; by default those that the model and its tokenizer name.
    `extra_files` maps further file names to texts.

    Everything is written aside, read back and compared, then moved, model.safetensors last: a folder with that file
    holds a complete export. Other files in `folder` stay, and none of their names is taken. Raises NonFiniteError if a
    weight is NaN or infinite; UserError for a full disk, a folder that cannot be written, one that holds an adapter,
    and a file in the place of one that no export wrote, or that was changed since.
    """
    if not_ours(folder, [ADAPTER_CONFIG]):
        raise UserError(f"{folder} holds an adapter, which would be loaded on top of the exported model: name another")
    plain: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    dtype = dtype or _usual_dtype(plain)
    weights = merged_weights(model, dtype, source)

    def write(partial: Path) -> None:
        _write(partial, plain, weights, dtype, tokenizer, stop_ids)
        write_texts(partial, {"README.md": render(card, source, tokenizer), **(extra_files or {})})
        _verify(partial, weights)

    put(folder, write, sum(t.nbytes for t in weights.values()) + BESIDE)


def _size(plain: PreTrainedModel) -> int:
    parameters: int = sum(p.numel() for p in plain.parameters())
    return parameters + matrix_weights(plain)


def _usual_dtype(plain: PreTrainedModel) -> torch.dtype:
    compute: torch.dtype = plain.get_input_embeddings().weight.dtype
    return torch.float32 if _size(plain) < SMALL or compute == torch.float32 else torch.bfloat16


def merged_weights(model: PreTrainedModel | PeftModel, dtype: torch.dtype, source: Source | None) -> dict[str, Tensor]:
    """Every weight of the plain model by its usual name, adapters merged: W + scale · B A, rounded once to `dtype`.

    The tensors are on the CPU; those that need neither merging nor rounding nor moving share memory with `model`, and
    tied ones with each other. Raises NonFiniteError.
    """
    plain: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    adapters = {name: module for name, module in plain.named_modules() if isinstance(module, LoraLayer)}
    if getattr(plain, "is_quantized", False):
        assert source is not None, "a quantised model needs its source"
        # Not the quantised layers' own values: those are rounded already, and rounding is not what training changed.
        originals = load_model(source, dtype=dtype, device="cpu").state_dict()
    else:
        originals = {_plain_name(key, adapters): value for key, value in plain.state_dict().items()}
        originals.pop("", None)
    merged: dict[str, Tensor] = {}
    done: dict[tuple[int, torch.Size, LoraLayer | None], Tensor] = {}  # tied weights are one tensor and stay one
    for name, original in originals.items():
        owner, _, leaf = name.rpartition(".")
        adapter = adapters.get(owner) if leaf == "weight" else None
        key = (original.data_ptr(), original.shape, adapter)
        if key not in done:
            whole = original.detach().to("cpu") if adapter is None else _merge(adapter, original)
            done[key] = whole.to(dtype) if whole.is_floating_point() else whole
            _refuse_non_finite(name, done[key])
        merged[name] = done[key]
    return merged


def _refuse_non_finite(name: str, values: Tensor) -> None:
    if bad := int((~values.isfinite()).sum()):
        raise NonFiniteError(f"{bad} values of the weight {name} are NaN or infinite; nothing was exported")


def _check_plain(layer: Any) -> None:
    assert not layer.merged and not layer.lora_variant and not any(layer.lora_bias.values()), "plain LoRA only"


def _merge(layer: Any, original: Tensor) -> Tensor:
    """W + Σ scale · B A, float32 on the CPU; out of place, because `original` may be the live weight."""
    _check_plain(layer)
    whole = original.detach().to("cpu", torch.float32)
    for name in layer.active_adapters:
        a, b = (part[name].weight.detach().to("cpu", torch.float32) for part in (layer.lora_A, layer.lora_B))
        whole = torch.addmm(whole, *((a.T, b.T) if layer.fan_in_fan_out else (b, a)), alpha=layer.scaling[name])
    return whole


def _plain_name(key: str, adapters: Mapping[str, nn.Module]) -> str:
    """The name a tensor has in the model without peft; empty for an adapter's own."""
    owner, marker, leaf = key.partition(".base_layer.")
    if marker and owner in adapters:
        return f"{owner}.{leaf}"
    return "" if any(f".lora_{kind}" in key for kind in ("A.", "B.", "embedding_", "magnitude_")) else key


def _write(
    partial: Path,
    plain: PreTrainedModel,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Iterable[int] | None,
) -> None:
    config = deepcopy(plain.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if hasattr(config, "use_cache"):
        config.use_cache = True  # gradient checkpointing turns it off
    # A model of the same class without memory of its own: its save_pretrained knows the published names of the tensors
    # and which of them are tied, and has neither adapters nor quantisation to trip over.
    with torch.device("meta"):
        skeleton = type(plain)(config)
    skeleton.to(dtype)
    skeleton._weight_conversions = getattr(plain, "_weight_conversions", None)
    expected = set(skeleton.state_dict())
    assert set(weights) == expected, f"not the model's weights: {sorted(set(weights) ^ expected)[:5]}"
    skeleton.generation_config = generation_config(plain, tokenizer, stop_ids)
    with quiet_progress():
        skeleton.save_pretrained(partial, state_dict=dict(weights), max_shard_size="1000GB")
    # safetensors makes its file readable for the owner alone, whatever the umask.
    (partial / WEIGHTS).chmod((partial / "config.json").stat().st_mode)
    save_tokenizer(tokenizer, partial)
    with quiet_progress():
        for_both(partial, tokenizer)


def _verify(partial: Path, weights: Mapping[str, Tensor]) -> None:
    """Load the folder as anyone would and compare every tensor with what was meant to be written."""
    for name, tensor in _loaded(partial, ("missing_keys", "unexpected_keys", "mismatched_keys")).state_dict().items():
        if not torch.equal(tensor.to(weights[name].dtype), weights[name]):
            raise OSError(f"{name} was not written as it should be")


def _loaded(partial: Path, must_be_empty: Iterable[str], **how: Any) -> PreTrainedModel:
    """The model in the folder, its tokenizer and generation settings read as well."""
    with quiet_progress(reports=False):  # what would be told is in `report`
        loaded, report = AutoModelForCausalLM.from_pretrained(partial, dtype="auto", output_loading_info=True, **how)
    assert not any(report[kind] for kind in must_be_empty), report
    AutoTokenizer.from_pretrained(partial)
    read_json(partial / "generation_config.json")
    return loaded


def rehearse(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: ModelCard,
    source: Source | None = None,
    stop_ids: Iterable[int] | None = None,
    extra_files: Mapping[str, str] | None = None,
    save: str = "merged",
) -> None:
    """Find out before training whether `export` will work, and keep nothing. Raises what `export` would.

    Everything is done as there, but with one column of every weight: whether names, configuration, tokenizer and card
    can be written, and are read back by transformers as the same model, does not depend on the others. Of all weights
    only their number, for which there must be room, and whether they are finite.
    """
    plain: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    partial = folder / REHEARSAL
    if partial.is_symlink():
        raise UserError(f"cannot write {partial}: it is a link, and nothing is written through one; move it away")
    shutil.rmtree(partial, ignore_errors=True)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if save == "adapter":
            adapter: Any = model
            export_adapter(
                adapter, tokenizer, partial, card=card, source=source, stop_ids=stop_ids, extra_files=extra_files
            )
        else:
            texts = {"README.md": render(card, source, tokenizer), **(extra_files or {})}
            _rehearse_merged(model, tokenizer, partial, stop_ids, texts)
    except (UserError, NonFiniteError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers' own writing has against the model
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"this {plain.config.model_type} model could not be exported after training ({first}): mend its files, or "
            "choose another model"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _rehearse_merged(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    stop_ids: Iterable[int] | None,
    texts: Mapping[str, str],
) -> None:
    plain: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    dtype = _usual_dtype(plain)
    for name, value in model.named_parameters():
        # The sum first: it needs no memory beside the weight, and is finite unless one of them is not.
        if value.is_floating_point() and not value.detach().sum(dtype=torch.float32).isfinite():
            _refuse_non_finite(name, value.detach())
    for module in plain.modules():
        if isinstance(module, LoraLayer):
            _check_plain(module)

    def write(partial: Path) -> None:
        _write(partial, plain, _columns(plain, dtype), dtype, tokenizer, stop_ids)
        write_texts(partial, texts)
        # On the meta device nothing is computed or kept; a column is of another shape than its weight.
        _loaded(partial, ("missing_keys", "unexpected_keys"), device_map={"": "meta"}, ignore_mismatched_sizes=True)

    put(folder, write, _size(plain) * dtype.itemsize + BESIDE)


def _columns(plain: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight by the name it is exported under, its last dimension cut to one."""
    adapters = {name: module for name, module in plain.named_modules() if isinstance(module, LoraLayer)}
    rounded = {name for name, module in plain.named_modules() if isinstance(module, EightBitLinear)}
    named = {}
    for key, value in plain.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if owner not in rounded or leaf == "bias":
            named[_plain_name(key, adapters)] = value
        elif leaf == "q":  # what stands for the weight, whose scales are no weights
            named[_plain_name(f"{owner}.weight", adapters)] = value
    named.pop("", None)
    made: dict[int, Tensor] = {}  # tied weights are one tensor and stay one
    return {
        name: made.setdefault(value.data_ptr(), torch.zeros((*value.shape[:-1], 1) if value.dim() else (), dtype=dtype))
        for name, value in named.items()
    }
