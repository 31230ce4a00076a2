"""A tiny random model of every family of causal language models that is tried here: what it is built from."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.tiny import TOKENS, tiny_tokenizer

WINDOW = 12
"""Tokens that a local or sliding layer sees: fewer than a prompt of the tests has."""
POSITIONS = 512

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_FALCON = {k: v for k, v in _LLAMA.items() if k not in ("head_dim", "intermediate_size")}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "initializer_range": 0.2}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 1}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

# Name → (model type of transformers, settings of its configuration).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": POSITIONS,
            "attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "initializer_range": 0.2,
        },
    ),
    "gpt_neox": ("gpt_neox", _LLAMA),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "opt": (
        "opt",
        {
            "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS, "word_embed_proj_dim": 32, "init_std": 0.2,
        },
    ),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    "falcon": ("falcon", {**_FALCON, "new_decoder_architecture": False, "multi_query": True, "alibi": False}),
    "falcon-alibi": ("falcon", {**_FALCON, "alibi": True, "parallel_attn": False, "bias": True, "multi_query": False}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS, "initializer_range": 0.2}),
    "llama": ("llama", _LLAMA),
    "llama3.1": ("llama", {**_LLAMA, "rope_parameters": _LLAMA3_ROPE}),
    "llama3.2": ("llama", {**_LLAMA, "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama4-text": (
        "llama4_text",
        {
            **_LLAMA, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": WINDOW,
            "interleave_moe_layer_step": 2, "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": WINDOW}),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4, "sliding_window": None}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2-window": ("qwen2", {**_LLAMA, **_WINDOWED, "use_sliding_window": True}),
    "qwen3": ("qwen3", _LLAMA),
    "qwen3-moe": ("qwen3_moe", {**_LLAMA, **_EXPERTS}),
    "qwen3-next": (
        "qwen3_next", {**_LLAMA, **_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 24},
    ),
    "qwen3.5": ("qwen3_5_text", {**_LLAMA, **_DELTA}),
    "gemma": ("gemma", _LLAMA),
    "gemma2": ("gemma2", {**_LLAMA, **_WINDOWED, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {**_LLAMA, **_WINDOWED, "query_pre_attn_scalar": 8}),
    "gemma3n": (
        "gemma3n_text",
        {
            **_LLAMA, **_WINDOWED, "vocab_size_per_layer_input": len(TOKENS), "hidden_size_per_layer_input": 8,
            "intermediate_size": [48, 48], "num_kv_shared_layers": 0, "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "phi": ("phi", {**_LLAMA, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {**_LLAMA, "sliding_window": WINDOW}),
    "olmo2": ("olmo2", _LLAMA),
    "olmo3": ("olmo3", {**_LLAMA, **_WINDOWED}),
    "olmoe": ("olmoe", {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("smollm3", {**_LLAMA, "no_rope_layers": [1, 0]}),
    "granite": ("granite", _LLAMA),
    "granite-moe": ("granitemoe", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite-4-hybrid": (
        "granitemoehybrid",
        {
            **_LLAMA, **_MAMBA2, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
        },
    ),
    "cohere": ("cohere", _LLAMA),
    "stablelm": ("stablelm", {**_LLAMA, "partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", {**_LLAMA, "sliding_window": WINDOW}),
    "gpt-oss": ("gpt_oss", {**_LLAMA, **_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek-v2": (
        "deepseek_v2",
        {
            **_LLAMA, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "kv_lora_rank": 8,
            "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
            "n_shared_experts": 1, "topk_method": "greedy",
        },
    ),
    "xglm": (
        "xglm",
        {
            "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
            "max_position_embeddings": POSITIONS, "init_std": 0.2,
        },
    ),
    "gpt_bigcode": ("gpt_bigcode", _GPT),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.2}),
    "mamba2": (
        "mamba2",
        {
            "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1,
            "chunk_size": 16, "initializer_range": 0.2,
        },
    ),
    "falcon-h1": (
        "falcon_h1",
        {**_LLAMA, **_MAMBA2, "mamba_d_ssm": 64, "mamba_chunk_size": 16},
    ),
    "bamba": ("bamba", {**_LLAMA, **_MAMBA2, "attn_layer_indices": [1], "mamba_chunk_size": 16}),
    "lfm2": (
        "lfm2",
        {**_LLAMA, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    ),
    "recurrent-gemma": (
        "recurrent_gemma",
        {
            **_LLAMA, "lru_width": 32, "attention_window_size": WINDOW, "num_hidden_layers": 3,
            "block_types": ["recurrent", "recurrent", "attention"], "w_init_variance_scale": 1.0,
        },
    ),
}  # fmt: skip


def family_config(name: str, **changes: Any) -> PreTrainedConfig:
    kind, settings = FAMILIES[name]
    ids = {"vocab_size": len(TOKENS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(kind, **{**ids, **settings, **changes})


def family_model(name: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name, **changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # some families begin with zeros, which would hide what differs
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.05 * noise)
    return model.eval()


def family_folder(name: str, folder: Path, **changes: Any) -> Path:
    family_model(name, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
