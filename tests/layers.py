"""Tiny models of every architecture that the fused layer covers, and what transformers itself makes of them.

Everything that the architectures differ in bites: windows shorter than the rows, caps below the scores, norms, biases
and scales away from 1 and 0, layers with and without rotation, heads of an odd size.
"""

import copy
import random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from equipoise.learning.optimizer import MasterAdam
from equipoise.policy import llama
from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.config import SamplingConfig
from equipoise.policy.decode import StaticDecoder
from equipoise.policy.eightbit import to_eight_bits
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.policy.score import Pack, pack, score_pack

WINDOW = 5
PROMPTS = [[5, 6, 7, 8, 9, 9], [5, 6, 7, 8], [5, 6, 7, 8, 9]]
LENGTHS = (6, 1, 3)
VOCABULARY = 40
_BASE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64, "initializer_range": 0.2,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-3,
}  # fmt: skip
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_PHI = {"hidden_size": 48, "num_attention_heads": 2, "head_dim": 24, "num_key_value_heads": 1, "resid_pdrop": 0.0}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3": ("llama", {**_BASE, "rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**_BASE, **_MIXED, "use_sliding_window": True, "rope_parameters": _YARN}),
    "qwen3": ("qwen3", {**_BASE, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "gemma": ("gemma", _BASE),
    "gemma2": (
        "gemma2",
        {
            **_BASE, **_MIXED, "query_pre_attn_scalar": 11, "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0, "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_BASE, **_MIXED, "query_pre_attn_scalar": 11, "rope_parameters": GEMMA3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "wide-heads": ("gemma2", {**_BASE, **_MIXED, "head_dim": 256, "attn_logit_softcapping": 1.5}),
    "mistral": ("mistral", {**_BASE, "sliding_window": WINDOW}),
    "phi3": ("phi3", {**_BASE, **_PHI, "sliding_window": WINDOW}),
    "phi3-partial": ("phi3", {**_BASE, **_PHI, "partial_rotary_factor": 0.75}),
    "olmo2": ("olmo2", {**_BASE, "num_attention_heads": 3, "hidden_size": 96}),
    "olmo3": ("olmo3", {**_BASE, **_MIXED}),
    "smollm3": ("smollm3", {**_BASE, "no_rope_layers": [1, 0]}),
    "gpt2": (
        "gpt2",
        {"n_embd": 48, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2, "n_inner": 64},
    ),
}  # fmt: skip


def model(name: str, attention: str) -> Any:
    """A random model whose every parameter is away from where it begins."""
    kind, settings = LAYERS[name]
    ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **ids, **settings)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        spread = 0.3 if parameter.dim() == 1 else 0.05
        parameter.data.add_(spread * torch.randn(parameter.shape, generator=generator))
    return made


def policy(
    name: str,
    *,
    tuning: str,
    fused: bool,
    device: str = "cpu",
    eight_bits: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
) -> Policy:
    """As training has it; `fused=False`: with transformers' own attention, written out."""
    made = model(name, TRIE_ATTENTION if fused else "eager").to(device=device, dtype=dtype)
    reference = copy.deepcopy(made).requires_grad_(False) if tuning == "full" else None
    if tuning == "lora":
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        made = get_peft_model(made, lora, autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(2)
        for key, parameter in made.named_parameters():
            if "lora_" in key:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    if eight_bits:
        to_eight_bits(made, eight_bits)
    if fused:
        for part in (made, reference):
            if part is not None:
                assert llama.not_covered(part) is None
                llama.fuse_layers(part)
    whole = Policy(made, None, reference=reference, stop_ids=(-1,))  # type: ignore[arg-type]
    if fused:
        MasterAdam(whole.trained(), betas=(0.9, 0.999), eps=1e-5)  # gradients then lie beside each other
    return whole


def rollout() -> Rollout:
    generator = random.Random(1)
    tokens = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, n in enumerate(LENGTHS):
        tokens[row, :n] = torch.tensor([generator.randrange(3, VOCABULARY) for _ in range(n)])
    return Rollout(PROMPTS, tokens, torch.tensor(LENGTHS), torch.ones(len(LENGTHS), dtype=torch.bool))


def by_transformers(whole: Policy, rows: Rollout) -> Tensor:
    """(N,) log-probabilities: each row by itself, nothing packed, padded or cached."""
    found = []
    for prompt, completion in zip(rows.prompts, rows.completions(), strict=True):
        ids = torch.tensor([[*prompt, *completion[:-1]]], device=whole.device)
        logits = whole.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        targets = torch.tensor(completion, device=whole.device)
        found.append(logits.float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1))
    return torch.cat(found)


def scores_and_gradients(
    name: str, *, fused: bool, padded: bool = False, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """(log-probabilities, the gradient of a weighted sum of them by the parameter's name)."""
    whole, rows = policy(name, fused=fused, **options), rollout()
    count = int(rows.lengths_B.sum())
    weights = torch.randn(count, generator=torch.Generator().manual_seed(3)).to(whole.device)
    if fused:
        logprobs = score_pack(whole, Pack(*pack(whole, rows, padded=padded)), 1.0, False, False).logprobs[:count]
    else:
        logprobs = by_transformers(whole, rows)
    (logprobs * weights).sum().backward()
    named = {n: p.grad for n, p in whole.trained().items() if not n.startswith("value_head")}
    missing = [n for n, g in named.items() if g is None]
    assert not missing, missing
    return logprobs.detach(), {n: g for n, g in named.items() if g is not None}


@torch.no_grad()
def decoded(name: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Of 3 tokens that the static decoder writes: the logits (B, V) after them, and transformers' own."""
    whole = policy(name, tuning="lora", fused=True, **options)
    steps = 3
    uniform = torch.rand(len(PROMPTS), steps, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    decoder = StaticDecoder(whole, len(PROMPTS), 8, SamplingConfig(max_new_tokens=steps))
    written, finite = decoder(PROMPTS, uniform.to(whole.device))
    assert finite and all(n == steps for n in written.lengths_B.tolist())
    plain = policy(name, tuning="lora", fused=False, **options)
    own = [
        plain.model(input_ids=torch.tensor([[*p, *c]], device=whole.device), use_cache=False).logits[0, -1]
        for p, c in zip(PROMPTS, written.completions(), strict=True)
    ]
    return decoder.logits_BV, torch.stack(own)


def modules(whole: nn.Module, name: str) -> list[Any]:
    return [m for m in whole.modules() if type(m).__name__ == name]
