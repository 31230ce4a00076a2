"""Packing: many sequences that begin alike, laid out as one token trie in a single row.

The chat header is the same for every sample, the occupation for all of its samples, so a batch of padded rows repeats
most of its prompt tokens. Here each distinct (prefix, token) pair is one node; nodes lie in depth-first order, so the
descendants of node j are exactly j … end[j]−1 and "j is an ancestor of i, or i itself" is `j ≤ i < end[j]`. With that
as attention mask and the depth as position id, an unmodified causal transformer computes for every node what it would
compute for that prefix alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    tokens: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    path: list[int] = []  # node ids from the root to the current row's last token
    previous: tuple[int, ...] = ()
    paths: list[list[int]] = [[] for _ in rows]
    places: list[int] = []
    width = max(width, *map(len, rows))
    # Sorted, each row shares its longest common prefix with the row before: that is depth-first order.
    for r in sorted(range(len(rows)), key=rows.__getitem__):
        row = rows[r]
        shared = 0
        for a, b in zip(row, previous, strict=False):
            if a != b:
                break
            shared += 1
        for closed in path[shared:]:
            ends[closed] = len(tokens)
        path[shared:] = range(len(tokens), len(tokens) + len(row) - shared)
        tokens.extend(row[shared:])
        depths.extend(range(shared, len(row)))
        ends.extend([0] * (len(row) - shared))
        places.extend(range(r * width + shared, r * width + len(row)))
        paths[r] = path.copy()
        previous = row
    for closed in path:
        ends[closed] = len(tokens)
    return Trie(
        torch.tensor(tokens),
        torch.tensor(depths),
        torch.tensor(ends),
        torch.tensor([node for p, nodes in zip(prompts, paths, strict=True) for node in nodes[len(p) - 1 :]]),
        torch.tensor([nodes + [0] * (width - len(nodes)) for nodes in paths]),
        torch.tensor(places),
    )


def attends(ends_M: Tensor) -> Tensor:
    """(M, M) bool from `Trie.ends_M`: node i may attend to node j, its ancestor or itself."""
    index = torch.arange(len(ends_M), device=ends_M.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < ends_M[None, :])
