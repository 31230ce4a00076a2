"""A LoRA adapter alone as a folder in peft's format, with tokenizer, task and card; its base stays where it is."""

import json
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from equipoise.documents import read_json
from equipoise.errors import NonFiniteError, UserError
from equipoise.policy.adapter_config import CONFIG, WEIGHTS, lora_config
from equipoise.policy.beside import generation_config, save_tokenizer
from equipoise.policy.card import ModelCard, render
from equipoise.policy.hub import quiet_progress
from equipoise.policy.placed import put, write_texts
from equipoise.policy.source import Source
from equipoise.policy.versions import for_both

_INSIDE = "base_model.model."
"""What peft puts before the name of a layer of the base model."""


def export_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: ModelCard,
    source: Source | None = None,
    stop_ids: Iterable[int] | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write the adapter of `model` into `folder`: adapter_config.json, adapter_model.safetensors, tokenizer,
    generation_config.json, README.md. Arguments and errors are those of `export`, which writes the merged model.

    The tensors are as they were trained, not rounded. Raises UserError too for a model that has no adapter, or whose
    base is nowhere to be had without it.
    """
    if not isinstance(model, PeftModel):
        raise UserError("there is no adapter to save, all weights were trained: use --save merged")
    base, tensors = base_name(source), adapter_tensors(model)

    def write(partial: Path) -> None:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        config = copy(model.peft_config[model.active_adapter])
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(str(partial))
        _in_order(partial / CONFIG)
        (partial / WEIGHTS).chmod((partial / CONFIG).stat().st_mode)
        save_tokenizer(tokenizer, partial)
        with quiet_progress():
            for_both(partial, tokenizer)
        generation_config(model.get_base_model(), tokenizer, stop_ids).save_pretrained(partial)
        text = render(replace(card, adapter=True), source, tokenizer)
        write_texts(partial, {"README.md": text, **(extra_files or {})})
        _verify(partial, tensors)

    put(folder, write, sum(t.nbytes for t in tensors.values()) + 50_000_000, "adapter")


def base_name(source: Source | None) -> str:
    """How the adapter's configuration names its base: a Hub id, a folder's whole path, or a packaged model's alias,
    which this program alone knows, because its 4-bit weights are not those on the Hub. Raises UserError where the base
    is no model by itself."""
    kind = source.kind if source is not None else "nothing"
    if source is None or kind not in ("bundled", "folder", "hub"):
        of = f"{source.given!r}, which is " if source is not None else ""
        what = {"adapter": "an adapter itself", "checkpoint": "a checkpoint", "shape": "a shape with random weights"}
        raise UserError(
            f"--save adapter needs a base model that can be loaded by itself, and training began from {of}"
            f"{what.get(kind, 'unknown')}: use --save merged"
        )
    if source.packaged is not None:
        return source.packaged.alias
    return source.path_or_id if kind == "hub" else str(Path(source.path_or_id).expanduser().resolve())


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors by the names that peft gives them, on the CPU. Raises NonFiniteError."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        assert not layer.merged and not layer.lora_variant and not any(layer.lora_bias.values()), "plain LoRA only"
        for kind in ("lora_A", "lora_B"):
            weight = getattr(layer, kind)[model.active_adapter].weight.detach()
            tensors[f"{_INSIDE}{name}.{kind}.weight"] = weight.to("cpu").contiguous()
    for name, tensor in tensors.items():
        if bad := int((~tensor.isfinite()).sum()):
            raise NonFiniteError(f"{bad} values of the weight {name} are NaN or infinite; nothing was exported")
    return tensors


def _in_order(path: Path) -> None:
    """Write the configuration's sets in one order, so that one training leaves one file."""
    document = {
        name: sorted(value) if name == "target_modules" and isinstance(value, list) else value
        for name, value in read_json(path).items()
    }
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _verify(partial: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read the folder back and compare it with what was meant to be written."""
    lora_config(read_json(partial / CONFIG), partial / CONFIG)
    found = load_file(partial / WEIGHTS)
    if found.keys() != tensors.keys() or not all(torch.equal(found[name], tensors[name]) for name in tensors):
        raise OSError(f"{WEIGHTS} was not written as it should be")
    AutoTokenizer.from_pretrained(partial)
