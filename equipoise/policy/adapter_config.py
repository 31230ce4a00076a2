"""A LoRA adapter's folder as data: what of its configuration is used, and what is refused."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from equipoise.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_USED = (
    *("r", "lora_alpha", "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "bias"),
    *("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "trainable_token_indices", "ensure_weight_tying"),
)
"""What says where an adapter's matrices go and how they are scaled."""
_WITHOUT_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode"),
    *("init_lora_weights", "lora_dropout", "runtime_config", "megatron_core"),
}
"""What has none on a trained adapter. `megatron_core` names a module that the peft library would import."""


def lora_config(document: Mapping[str, Any], path: Path) -> "LoraConfig":
    """The configuration of the LoRA adapter whose `adapter_config.json`, at `path`, is `document`.

    Only settings on a list are used, so that no module named in the file is imported, whatever versions of the peft
    library may add. Raises UserError for another kind of adapter, and for a setting that would change what the adapter
    computes and is not on the list.
    """
    from peft import LoraConfig  # half a second, which a model without an adapter need not take

    if (kind := document.get("peft_type")) != "LORA":
        raise UserError(f"{path} is of an adapter of the kind {kind!r:.40}, expected LoRA: merge it into its model")
    if revision := document.get("revision"):
        raise UserError(
            f"{path} wants the revision {revision!r:.60} of its base model: download that, and name its folder as "
            "base_model_name_or_path"
        )
    start = document.get("init_lora_weights", True)
    if not isinstance(start, bool) and start != "gaussian":
        raise UserError(
            f"the adapter of {path} was begun by {start!r:.40}, which changes its base model: save it converted to "
            "plain LoRA, or merged"
        )
    usual = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    for name, value in document.items():
        if name in _USED or name in _WITHOUT_EFFECT or value in (None, False, "", usual.get(name)) or value in ([], {}):
            continue
        raise UserError(
            f"{path} sets {name!r:.60}, which is not read here, as it may run code or change what the adapter "
            "computes: merge the adapter into its model with the program that made it, and give that"
        )
    settings = {name: document[name] for name in _USED if document.get(name) is not None}
    try:
        return LoraConfig(**settings, task_type="CAUSAL_LM")
    except (TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is no configuration of a LoRA adapter ({reason}): save the adapter again") from None


_FLOATS = ("F64", "F32", "F16", "BF16")


def check_ranks(config: "LoraConfig", folder: Path) -> None:
    """Raises UserError for tensors that are no floating numbers, and for a rank greater than any dimension of the
    adapter's own tensors: matrices are made as large as the configuration says before they are compared."""
    with safe_open(folder / WEIGHTS, framework="np") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        kinds = {name: tensor.get_dtype() for name, tensor in tensors.items()}
        largest = max((n for tensor in tensors.values() for n in tensor.get_shape()), default=0)
    if whole := [name for name, kind in kinds.items() if kind not in _FLOATS]:
        raise UserError(
            f"the adapter in {folder} holds numbers of the kind {kinds[whole[0]]} ({whole[0]:.120}), expected floating "
            "ones: save the adapter again, without quantising it"
        )
    ranks = [config.r, *config.rank_pattern.values()]
    if too_large := [rank for rank in ranks if rank > largest]:
        raise UserError(
            f"{folder / CONFIG} gives the rank {too_large[0]!r:.40}, and no tensor of the adapter is that large: "
            "save the adapter again"
        )


def check_tensors(missing: Sequence[str], unexpected: Sequence[str], folder: Path) -> None:
    """Raises UserError unless the adapter's tensors are those that its configuration and its base ask for."""
    wrong = [f"lacks {len(missing)} tensors of its layers ({missing[0]:.120}, …)"] if missing else []
    if unexpected:
        wrong.append(f"has {len(unexpected)} for which the base has no place ({unexpected[0]:.120}, …)")
    if wrong:
        raise UserError(
            f"the adapter in {folder} {' and '.join(wrong)}: it belongs to another base model, or is incomplete; "
            "save it again, or mend target_modules and base_model_name_or_path"
        )
