"""Named model shapes with random weights: speed and memory of a model that is not at hand. Nothing can be learnt on
them."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from equipoise.errors import UserError
from equipoise.policy.eightbit import goes_into_eight_bits, put_aside

PREFIX = "shape:"
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-3.1-70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def shape_config(name: str) -> LlamaConfig:
    """The configuration of a name in `SHAPES`, or of its first layers alone: `llama-3.1-70b:20`. The bundled tokenizer
    goes with it, hence its stop and pad id. Raises UserError."""
    shape, colon, layers = name.partition(":")
    if shape not in SHAPES:
        raise UserError(f"there is no shape {shape!r}: choose {', '.join(SHAPES)}")
    sizes = dict(SHAPES[shape])
    if colon:
        most = sizes["num_hidden_layers"]
        if not (layers.isascii() and layers.isdigit() and 1 <= int(layers[:9]) <= most):
            raise UserError(f"the shape {name!r} has {layers!r} for its layers: give 1 to {most}, as in {shape}:1")
        sizes["num_hidden_layers"] = int(layers)
    return LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2)


@torch.no_grad()
def random_model(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
    eight_bits: torch.dtype | None = None,
) -> LlamaForCausalLM:
    """A model of that shape with normal random weights, made on the device, one tensor after the other.

    `eight_bits`: as for `weights.load_model`, with the same random weights rounded.
    """
    config = shape_config(name)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its frequencies are no parameters
    head = model.get_output_embeddings()
    for owner in model.modules():
        for module in owner.children():
            _fill(module, config, device, eight_bits if goes_into_eight_bits(owner, module, head) else None)
    return model.eval()


def _fill(module: nn.Module, config: LlamaConfig, device: torch.device, eight_bits: torch.dtype | None) -> None:
    """A module's own parameters, which are on the meta device: random matrices, and ones for the norms."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if parameter.dim() == 1:
            values.fill_(1.0)
        else:
            values.normal_(0.0, config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            values[module.padding_idx] = 0.0
        filled = put_aside(module, name, values, eight_bits) if eight_bits else nn.Parameter(values)  # type: ignore[arg-type]
        setattr(module, name, filled)
