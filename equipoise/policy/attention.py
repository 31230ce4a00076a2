"""Attention over a packed trie without its M × M mask, through transformers' attention interface.

Linear layers run on the M nodes, each once; attention runs row by row. A row of R gathers the nodes on its path, at most
L of them, so R·L² scores replace M². Written out rather than left to `scaled_dot_product_attention`, whose backward pass
on a CPU was measured at six times this one's. Without a trie (sampling, padded scoring) everything is as with `sdpa`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TRIE_ATTENTION = "equipoise_trie"
# Model types whose attention is softmax(QKᵀ·scale + causal mask)·V and nothing more (no soft cap, no sinks, no window).
PLAIN_ATTENTION = ("llama", "olmo2", "qwen2", "qwen3", "smollm3")


def trie_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    paths_RL: Tensor | None = None,
    places_M: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, heads, M, head size) → (1, M, heads, head size). `paths_RL` and `places_M` as in `trie.Trie`."""
    if paths_RL is None or places_M is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows, length = paths_RL.shape
    groups = query.shape[1] // key.shape[1]  # query heads that share one key head

    def spread(x: Tensor) -> Tensor:
        per_node = x[0].transpose(0, 1)  # (M, heads, head size)
        return per_node.index_select(0, paths_RL.reshape(-1)).unflatten(0, (rows, length)).transpose(1, 2)

    # Query heads of one group are stacked, so that keys and values need no copies. Beyond its end a row repeats node 0;
    # causality keeps that from every real place before it.
    queries = spread(query).unflatten(1, (-1, groups)).flatten(2, 3)  # (R, key heads, groups·L, head size)
    scores = (queries @ spread(key).transpose(2, 3)).float() * (scaling or query.shape[-1] ** -0.5)
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1).repeat(groups, 1)
    weights = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1).to(value.dtype)
    out = (weights @ spread(value)).unflatten(2, (groups, length)).flatten(1, 2)  # (R, heads, L, head size)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, places_M)[None], None


AttentionInterface.register(TRIE_ATTENTION, trie_attention)
AttentionMaskInterface.register(TRIE_ATTENTION, sdpa_mask)
