"""Attention for a packed trie and for decoding over a static cache, through transformers' attention interface.

Packed: linear layers run on the M nodes, each once; attention runs row by row. A row of R gathers the nodes on its
path, at most L of them, so R·L² scores replace M². Decoding: keys and values live in one buffer per layer, of fixed
size and address, as CUDA graphs need. Written out on a CPU, where the backward pass of `scaled_dot_product_attention`
was measured at six times this one's, and in decoding, where with a mask it copies keys and values for every query head.
Called without any of these (the plain sampler, padded scoring), it is `sdpa`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TRIE_ATTENTION = "equipoise_trie"
# Model types whose attention is softmax(QKᵀ·scale + causal mask)·V and nothing more (no soft cap, no sinks, no window).
PLAIN_ATTENTION = ("llama", "olmo2", "qwen2", "qwen3", "smollm3")


class TrieInputs(NamedTuple):
    """What the sampler and the scorer hand through transformers' model to every layer; None where it does not apply."""

    paths_RL: Tensor | None
    places_M: Tensor | None
    fill_BP: Tensor | None
    slot: Tensor | None
    hidden_BL: Tensor | None


def take_trie(kwargs: dict[str, Any]) -> TrieInputs:
    """Take the trie's inputs out of a layer's keyword arguments."""
    return TrieInputs(*(kwargs.pop(name, None) for name in TrieInputs._fields))


def trie_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, M, head size) → (1, M, heads, head size) for a trie, `paths_RL` and `places_M` as in
    `trie.Trie`.

    fill_BP: nodes whose keys and values each of B rows starts its cache (`module.kv_cache`) with. slot: (1,) place in
    the cache for the one token of each row, query (B, heads, 1, head size) → (B, 1, heads, head size). hidden_BL: True
    where a row's place in the cache holds nothing for it.
    """
    paths_RL, places_M, fill_BP, slot, hidden_BL = take_trie(kwargs)
    scale = scaling or query.shape[-1] ** -0.5
    if slot is not None:
        assert hidden_BL is not None
        cache: Any = module.kv_cache
        cache[0].index_copy_(2, slot, key)
        cache[1].index_copy_(2, slot, value)
        return _attend(query, cache[0], cache[1], hidden_BL[:, None, None], scale).transpose(1, 2), None
    if paths_RL is None or places_M is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
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
    if query.is_cuda:
        out = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    else:
        future_LL = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        out = _attend(queries, keys, values, future_LL, scale)
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


def _attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """softmax over the key places that are not `hidden`: query (R, heads, Q, D), key and value (R, key heads, L, D).

    The query heads that share a key head are stacked, so keys and values need no copies. Softmax is in float32.
    """
    rows, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    stacked = query.reshape(rows, key.shape[1], groups * queries, size)
    scores = ((stacked * scale) @ key.transpose(2, 3)).unflatten(2, (groups, queries))
    # `hidden` is (Q, L), or (R, 1, 1, L): in either case it lacks the axis of the groups.
    scores = scores.masked_fill(hidden if hidden.dim() == 2 else hidden[:, :, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype).flatten(2, 3)
    return (weights @ value).reshape(rows, heads, queries, size)


AttentionInterface.register(TRIE_ATTENTION, trie_attention)
AttentionMaskInterface.register(TRIE_ATTENTION, sdpa_mask)
