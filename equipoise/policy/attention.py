"""Attention for a packed trie and for decoding over a static cache, through transformers' attention interface.

Packed: linear layers run on the M nodes, each once; attention runs row by row. A row of R gathers the nodes on its
path, at most L of them, so R·L² scores replace M². Decoding: keys and values live in one buffer per layer, of fixed
size and address, as CUDA graphs need. Written out on a CPU, where the backward pass of `scaled_dot_product_attention`
was measured at six times this one's, and in decoding, where with a mask it copies keys and values for every query head.
Called without any of these (the plain sampler, padded scoring), it is `sdpa`, or where scores are capped the model's
own.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TRIE_ATTENTION = "equipoise_trie"
PLAIN_ATTENTION = (
    "gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
"""Model types whose attention is softmax(QKᵀ·scale + causal mask)·V, with a window or a soft cap at the most."""


class TrieInputs(NamedTuple):
    """What the sampler and the scorer hand through transformers' model to every layer; None where it does not apply."""

    paths_RL: Tensor | None
    places_M: Tensor | None
    fill_BP: Tensor | None
    slot: Tensor | None
    hidden_BL: Tensor | None
    beyond_BL: Tensor | None


def take_trie(kwargs: dict[str, Any]) -> TrieInputs:
    """Take the trie's inputs out of a layer's keyword arguments."""
    return TrieInputs(*(kwargs.pop(name, None) for name in TrieInputs._fields))


def attention_modules(model: nn.Module) -> list[Any]:
    """The attention modules of the decoder layers, in order."""
    names = ("k_proj", "qkv_proj", "c_attn")
    return [m for m in model.modules() if hasattr(m, "layer_idx") and any(hasattr(m, name) for name in names)]


def trie_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """query (1, heads, M, head size) → (1, M, heads, head size) for a trie, `paths_RL` and `places_M` as in
    `trie.Trie`.

    fill_BP: nodes whose keys and values each of B rows starts its cache (`module.kv_cache`) with. slot: (1,) place in
    the cache for the one token of each row, query (B, heads, 1, head size) → (B, 1, heads, head size). hidden_BL: True
    where a row's place in the cache holds nothing for it; beyond_BL: there, and where it lies beyond a window.
    sliding_window: tokens that a token sees, itself among them. softcap: scores s become softcap · tanh(s / softcap).
    """
    paths_RL, places_M, fill_BP, slot, hidden_BL, beyond_BL = take_trie(kwargs)
    scale = scaling or query.shape[-1] ** -0.5
    if slot is not None or paths_RL is not None:
        # Whoever asks for more than is computed here is told, and computed otherwise (`verify.settle`).
        more = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
        if more or kwargs.get("dropout"):
            raise NotImplementedError(f"attention with {', '.join(more) or 'dropout'}")
    if slot is not None:
        assert hidden_BL is not None
        cache: Any = module.kv_cache
        cache[0].index_copy_(2, slot, key)
        cache[1].index_copy_(2, slot, value)
        hidden_BL = beyond_BL if sliding_window and beyond_BL is not None else hidden_BL
        return _attend(query, cache[0], cache[1], hidden_BL[:, None, None], scale, softcap).transpose(1, 2), None
    if paths_RL is None or places_M is None:
        return _as_without(module, query, key, value, attention_mask, scaling, softcap, **kwargs)
    if fill_BP is not None:
        for place, x in ((0, key), (1, value)):
            started: Any = module.kv_cache
            started[place, :, :, : fill_BP.shape[1]] = x[0][:, fill_BP].transpose(0, 1)
    rows, length = paths_RL.shape
    flat_paths = paths_RL.reshape(-1)

    def by_row(gathered: Tensor) -> Tensor:
        return gathered.unflatten(0, (rows, length)).transpose(1, 2)  # (R, heads, L, head size)

    # Beyond its end a row repeats node 0; causality keeps that from every real place before it.
    queries = by_row(_Gather.apply(query[0].transpose(0, 1), flat_paths, places_M))
    keys = by_row(key[0].transpose(0, 1).index_select(0, flat_paths))
    values = by_row(value[0].transpose(0, 1).index_select(0, flat_paths))
    if query.is_cuda and not softcap and (not sliding_window or sliding_window >= length):
        out = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    else:
        hidden_LL = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        if sliding_window:
            hidden_LL = hidden_LL | torch.ones_like(hidden_LL).tril(-sliding_window)
        out = _attend(queries, keys, values, hidden_LL, scale, softcap)
    return _Pick.apply(out.transpose(1, 2).flatten(0, 1), places_M)[None], None


class _Gather(torch.autograd.Function):
    """x[paths] of which only the rows `places` will be used: the gradient is then another gather, not a sum over
    rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, paths: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, paths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Pick(torch.autograd.Function):
    """x[places] for places that differ (spare nodes aside, which carry no gradient): the gradient is a copy, not a
    sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.rows, *grad.shape[1:])
        return out.index_copy_(0, ctx.saved_tensors[0], grad), None


def _as_without(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    scaling: float | None, softcap: float | None, **kwargs: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """What transformers itself would compute, neither for a trie nor over a static cache."""
    if softcap:
        own: Any = sys.modules[type(module).__module__]
        added = _added(mask, query, key)
        return own.eager_attention_forward(module, query, key, value, added, scaling=scaling, softcap=softcap, **kwargs)
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)


def _added(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """The mask of `sdpa` (True where a key is seen; None where that is all keys up to the query) as one to be added."""
    if mask is None:
        queries, keys = query.shape[2], key.shape[2]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float, cap: float | None = None
) -> Tensor:
    """softmax over the key places that are not `hidden`: query (R, heads, Q, D), key and value (R, key heads, L, D).

    The query heads that share a key head are stacked, so keys and values need no copies. Softmax is in float32.
    """
    rows, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    stacked = query.reshape(rows, key.shape[1], groups * queries, size)
    scores = ((stacked * scale) @ key.transpose(2, 3)).unflatten(2, (groups, queries))
    if cap:
        scores = torch.tanh(scores / cap) * cap
    # `hidden` is (Q, L), or (R, 1, 1, L): in either case it lacks the axis of the groups.
    scores = scores.masked_fill(hidden if hidden.dim() == 2 else hidden[:, :, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype).flatten(2, 3)
    return (weights @ value).reshape(rows, heads, queries, size)


AttentionInterface.register(TRIE_ATTENTION, trie_attention)
AttentionMaskInterface.register(TRIE_ATTENTION, sdpa_mask)
