"""Packing: many sequences that begin alike, laid out as one token trie in a single row.

The chat header is the same for every sample, the occupation for all of its samples, so a batch of padded rows repeats
most of its prompt tokens. Here each distinct (prefix, token) pair is one node; nodes lie in depth-first order, so the
descendants of node j are exactly j … end[j]−1 and "j is an ancestor of i, or i itself" is `j ≤ i < end[j]`. With that
as attention mask and the depth as position id, an unmodified causal transformer computes for every node what it would
compute for that prefix alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Trie:
    """M nodes for the sequences, and where each completion token is predicted.

    tokens_M: token ids. depths_M: position ids. ends_M: one past the last descendant. predictors_N: for each completion
    token, row by row, the node whose output predicts it (the node of the token before). paths_RL: the nodes of each row
    from the root on, 0 beyond its end. places_M: for each node one place in the flattened `paths_RL` that holds it.
    """

    tokens_M: Tensor
    depths_M: Tensor
    ends_M: Tensor
    predictors_N: Tensor
    paths_RL: Tensor
    places_M: Tensor


def build(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], width: int = 0) -> Trie:
    """The trie of prompt + completion, for any number of rows. The last completion token is predicted, never fed in.
    L is the longest row's length, or `width` if that is more.

    Raises ValueError on an empty prompt (nothing would predict the first token) or an empty completion.
    """
    if not all(map(len, prompts)) or not all(map(len, completions)):
        raise ValueError("every row needs at least one prompt token and one completion token")
    rows = [tuple(p) + tuple(c[:-1]) for p, c in zip(prompts, completions, strict=True)]
    lengths_R = np.fromiter(map(len, rows), np.int64, len(rows))
    width = max(width, int(lengths_R.max()))
    column_L = np.arange(width)
    real_RL = column_L < lengths_R[:, None]
    tokens_RL = np.full(real_RL.shape, -1)
    tokens_RL[real_RL] = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths_R.sum()))
    # Sorted, each row shares its longest common prefix with the row before: that is depth-first order.
    order_R = np.array(sorted(range(len(rows)), key=rows.__getitem__))
    real_RL, tokens_RL = real_RL[order_R], tokens_RL[order_R]
    alike_RL = np.zeros_like(real_RL)
    alike_RL[1:] = real_RL[1:] & (tokens_RL[1:] == tokens_RL[:-1])
    shared_R1 = np.logical_and.accumulate(alike_RL, axis=1).sum(1, keepdims=True)
    own_RL = real_RL & (column_L >= shared_R1)
    count = int(own_RL.sum())
    nodes_RL = np.zeros(real_RL.shape, np.int64)
    nodes_RL[own_RL] = np.arange(count)
    # What a row shares was made by the last row before it that has a node of its own in that place.
    maker_RL = np.maximum.accumulate(np.where(own_RL, np.arange(len(rows))[:, None], 0), axis=0)
    nodes_RL = np.where(real_RL, np.take_along_axis(nodes_RL, maker_RL, axis=0), 0)
    # A node's descendants end where the next row begins that does not share it.
    starts_R1 = own_RL.sum(1, keepdims=True).cumsum(0) - own_RL.sum(1, keepdims=True)
    ends_RL = np.full(real_RL.shape, count)
    ends_RL[:-1] = np.where(column_L >= shared_R1, starts_R1, count)[1:]
    ends_RL = np.minimum.accumulate(ends_RL[::-1], axis=0)[::-1]
    paths_RL = np.empty_like(nodes_RL)
    paths_RL[order_R] = nodes_RL
    last_R1 = np.fromiter(map(len, prompts), np.int64, len(rows))[:, None] - 1
    predicts_RL = (column_L >= last_R1) & (column_L < lengths_R[:, None])
    found = (
        tokens_RL[own_RL],
        np.broadcast_to(column_L, own_RL.shape)[own_RL],
        ends_RL[own_RL],
        paths_RL[predicts_RL],
        paths_RL,
        (order_R[:, None] * width + column_L)[own_RL],
    )
    return Trie(*map(torch.from_numpy, found))


def attends(ends_M: Tensor) -> Tensor:
    """(M, M) bool from `Trie.ends_M`: node i may attend to node j, its ancestor or itself."""
    index = torch.arange(len(ends_M), device=ends_M.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < ends_M[None, :])
