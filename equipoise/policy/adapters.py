"""Which layers get LoRA adapters."""

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from equipoise.policy.config import PolicyConfig

# peft refuses these layers of models with a selective state space, whose kernels read the weights past the adapters;
# of dt_proj too the weights alone are read.
_STATE_SPACE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_MLP = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_READ_DIRECTLY = ("out_proj", "conv1d", "dt_proj")


def with_adapters(model: Any, config: PolicyConfig) -> tuple[PeftModel, str | None]:
    """The model with an adapter on every linear layer, and a line on which were left out, if any.

    Of a mixture the experts are left out: they are one tensor for all, whose adapters could not be merged into the
    published format. So is every layer that peft would take them for by its name, and routers that are layers of
    another kind.
    """
    names = [
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not model.get_output_embeddings()
    ]
    left_out = None
    if _has_experts(model):
        left_out = "experts and MLPs"
        names = [name for name in names if "experts" not in name.split(".") and name.rpartition(".")[2] not in _MLP]
    if model.config.model_type in _STATE_SPACE:
        left_out = ", ".join(_READ_DIRECTLY)
        names = [name for name in names if name.rpartition(".")[2] not in _READ_DIRECTLY]
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear" if left_out is None else names,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    # Adapters in the compute dtype: float32 ones are cast at every layer. The optimizer keeps float32 masters.
    wrapped = get_peft_model(model, lora, autocast_adapter_dtype=False)
    kinds = sorted({name.rpartition(".")[2] for name in names})
    note = f"LoRA trains {', '.join(kinds)}; {left_out} of this {model.config.model_type} model stay as they are"
    return wrapped, note if left_out is not None else None


def _has_experts(model: nn.Module) -> bool:
    """Whether the model is a mixture, its experts as one tensor of three dimensions or as layers of a list."""
    return any("experts" in name.split(".") for name, _ in model.named_modules())
