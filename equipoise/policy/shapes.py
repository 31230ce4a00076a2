"""Named model shapes with random weights: speed and memory of a model that is not at hand. Nothing can be learnt on
them."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
    """The configuration of a name in `SHAPES`. The bundled tokenizer goes with it, hence its stop and pad id."""
    return LlamaConfig(**SHAPES[name], bos_token_id=1, eos_token_id=2, pad_token_id=2)


def random_model(
    name: str, dtype: torch.dtype, device: torch.device, attn_implementation: str | None
) -> LlamaForCausalLM:
    """A model of that shape with normal random weights, made on the device."""
    config = shape_config(name)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()
