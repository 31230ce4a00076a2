"""Named model shapes with random weights: speed and memory of a model that is not at hand. Nothing can be learnt on
them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from equipoise.errors import UserError
from equipoise.policy.eightbit import goes_into_eight_bits, put_aside
from equipoise.policy.slices import Cut

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
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "gemma-2-2b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    },
    "gemma-3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "max_position_embeddings": 32768,
    },
    # The vocabularies of these two are smaller than the bundled tokenizer's.
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 49152,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_window": None,
    },
    "phi-3-mini": {
        "model_type": "phi3",
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "sliding_window": 2047,
        "rms_norm_eps": 1e-5,
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


def shape_config(name: str) -> PreTrainedConfig:
    """The configuration of a name in `SHAPES`, a Llama unless that says otherwise, or of its first layers alone:
    `llama-3.1-70b:20`. The bundled tokenizer goes with it, hence its stop and pad id. Raises UserError."""
    shape, colon, layers = name.partition(":")
    if shape not in SHAPES:
        raise UserError(f"there is no shape {shape!r}: choose {', '.join(SHAPES)}")
    sizes = dict(SHAPES[shape])
    if colon:
        most = sizes["num_hidden_layers"]
        if not (layers.isascii() and layers.isdigit() and 1 <= int(layers[:9]) <= most):
            raise UserError(f"the shape {name!r} has {layers!r} for its layers: give 1 to {most}, as in {shape}:1")
        sizes["num_hidden_layers"] = int(layers)
    kind = sizes.pop("model_type", "llama")
    return AutoConfig.for_model(kind, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2)


@torch.no_grad()
def random_model(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None,
    eight_bits: torch.dtype | None = None,
    cut: Cut | None = None,
) -> PreTrainedModel:
    """A model of that shape with normal random weights, made on the device, one tensor after the other.

    `eight_bits`, `cut`: as for `weights.load_model`, with the same random weights rounded, or cut.
    """
    config = shape_config(name)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    _fill_buffers(model, config, device)
    head = model.get_output_embeddings()
    for owner in model.modules():
        for name, module in owner.named_children():
            aside: Callable[..., nn.Parameter] | None = None
            if goes_into_eight_bits(owner, module, head):
                aside = partial(cut.put_aside, name) if cut is not None else None
                if eight_bits is not None:
                    aside = partial(_into_eight_bits, name, eight_bits)
            _fill(module, config, device, aside)
    return model.eval()


def _into_eight_bits(name: str, into: torch.dtype, linear: nn.Linear, weight_NK: Tensor) -> nn.Parameter:
    return put_aside(linear, f"{name}.weight", weight_NK, into)


def _fill_buffers(model: Any, config: PreTrainedConfig, device: torch.device) -> None:
    """What is no parameter and no matter of chance: rotary frequencies, and the scale of embeddings."""
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        embeddings = model.get_input_embeddings()
        if hasattr(embeddings, "scalar_embed_scale"):
            embeddings.embed_scale = torch.tensor(embeddings.scalar_embed_scale)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, left


def _fill(
    module: nn.Module,
    config: PreTrainedConfig,
    device: torch.device,
    aside: Callable[..., nn.Parameter] | None,
) -> None:
    """A module's own parameters, which are on the meta device: random matrices, and ones for the norms."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if parameter.dim() == 1:
            values.fill_(0.0 if name == "bias" else 1.0)
        else:
            values.normal_(0.0, config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            values[module.padding_idx] = 0.0
        filled = aside(module, values) if aside is not None else nn.Parameter(values)
        setattr(module, name, filled)
