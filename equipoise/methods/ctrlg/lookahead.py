"""The look-ahead: how probable it is, under the HMM, that what follows completes a valid sentence.

R rows (automaton states that have a look-ahead of their own; the last two `done` and `dead`), H states of the HMM, S
symbols, C token classes, T tokens. With r tokens left after a token, `f` the row after it, and `j` the HMM state that
emitted it:

    U_r[f, k] = Σ_s P(s | k) · W_{r−1}[next(f, s), k]        the next symbol is emitted from k
    W_r[f, j] = Σ_k P(k | j) · U_r[f, k],   W_r[done] = 1,   W_0[f] = 1 where the limit may cut, else 0

Symbols with the same effect are summed first, and states that agree on a group of classes share the sum.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.methods.ctrlg.hmm import HMM
from equipoise.methods.ctrlg.lift import TokenAutomaton

_CHUNK = 1 << 25  # numbers in one intermediate result
TILE = 128
"""Symbols that one product on a GPU takes at a time."""
LEAST = torch.finfo(torch.float32).tiny
"""What a probability counts as at least: too small for a float is no reason to forbid."""


class _Edges(NamedTuple):
    """Distinct rows of the transition table, restricted to a group of classes, by number of edges: per bucket the rows
    and, (X, degree), which set of classes leads where."""

    row_of_R: Tensor
    rows: int
    buckets: list[tuple[Tensor, Tensor, Tensor]]


def look_ahead(automaton: TokenAutomaton, hmm: HMM, class_S: Tensor, steps: int) -> Tensor:
    """(steps, R, H) float32: W_r for r = 0 … steps − 1, on the HMM's device. class_S: (S,) class of each symbol."""
    device = hmm.emission_SH.device
    hidden, count = hmm.emission_SH.shape[1], len(automaton.next_RC)
    sets: dict[bytes, int] = {}
    groups = [_edges(automaton, automaton.glued_C == glued, sets, device) for glued in (False, True)]
    packed = np.stack([np.frombuffer(key, dtype=np.uint8) for key in sets])
    member_MC = torch.from_numpy(np.unpackbits(packed, axis=1, count=automaton.next_RC.shape[1])).to(device).float()
    mass_CH = torch.zeros(member_MC.shape[1], hidden, device=device).index_add_(0, class_S, hmm.emission_SH)
    mass_MH = member_MC @ mass_CH
    look_TRH = torch.zeros(steps, count, hidden, device=device)
    look_TRH[:, -2] = 1
    look_TRH[0, torch.from_numpy(automaton.accepts_R).to(device)] = 1
    for r in range(1, steps):
        before_RH = look_TRH[r - 1]
        total_RH = torch.zeros(count - 2, hidden, device=device)
        for edges in groups:
            sums_XH = torch.zeros(edges.rows, hidden, device=device)
            for rows, set_XD, target_XD in edges.buckets:
                size = max(1, _CHUNK // (set_XD.shape[1] * hidden))
                for part in torch.arange(len(rows), device=device).split(size):
                    sums_XH[rows[part]] = (mass_MH[set_XD[part]] * before_RH[target_XD[part]]).sum(1)
            total_RH += sums_XH[edges.row_of_R]
        look_TRH[r, :-2] = total_RH @ hmm.transition_HH.T
    return look_TRH


def _edges(automaton: TokenAutomaton, of_C: NDArray[np.bool_], sets: dict[bytes, int], device: torch.device) -> _Edges:
    dead = len(automaton.next_RC) - 1
    table_RC = np.where(of_C, automaton.next_RC[:-2], dead)
    rows_XC, row_of_R = np.unique(table_RC, axis=0, return_inverse=True)
    by_degree: dict[int, list[tuple[int, list[int], list[int]]]] = {}
    for number, row_C in enumerate(rows_XC):
        targets = [target for target in np.unique(row_C) if target != dead]
        chosen = [sets.setdefault(np.packbits(row_C == target).tobytes(), len(sets)) for target in targets]
        if targets:
            width = 1 << (len(targets) - 1).bit_length()
            spare = width - len(targets)  # a spare edge leads to `dead`, whose look-ahead is 0
            edge = (number, chosen + [0] * spare, [int(t) for t in targets] + [dead] * spare)
            by_degree.setdefault(width, []).append(edge)
    buckets = [tuple(torch.tensor(x, device=device) for x in zip(*edges, strict=True)) for edges in by_degree.values()]
    return _Edges(torch.from_numpy(row_of_R).to(device), len(rows_XC), buckets)  # type: ignore[arg-type]


class Layout(NamedTuple):
    """How symbols are grouped for guidance. Most symbols belong to a few large classes, whose look-ahead is one matrix
    product each; where a state sends a symbol elsewhere than its group's class goes, it is an exception of that state.

    order_S: symbols, group by group. sizes_G: symbols in each group. class_G: each group's class. exceptions_AK: per
    state, places in order_S, filled up with S.
    """

    order_S: NDArray[np.int64]
    sizes_G: list[int]
    class_G: NDArray[np.int64]
    exceptions_AK: NDArray[np.int32]


def layout(automaton: TokenAutomaton, class_S: NDArray[np.int64], groups: int = 12, smallest: int = 24) -> Layout:
    """At most `groups` groups, around the classes with the most symbols, none but the first with under `smallest`."""
    # How many words begin on the way makes a difference too.
    goes_AC = automaton.next_BC.astype(np.int64) * (int(automaton.words_BC.max()) + 1) + automaton.words_BC
    counts_C = np.bincount(class_S, minlength=goes_AC.shape[1])
    counts_C[0] = 0  # what is never allowed needs no group
    largest = np.argsort(-counts_C, kind="stable")[:groups]
    class_G = np.array([c for i, c in enumerate(largest) if i == 0 or counts_C[c] >= smallest])
    allowed_AC = automaton.next_BC != len(goes_AC) - 1
    allowed_AC[-2:] = False  # after the end nothing matters
    differs_GC = np.stack([((goes_AC != goes_AC[:, g : g + 1]) & allowed_AC).sum(0) for g in class_G])
    group_C = differs_GC.argmin(0)
    group_S = group_C[class_S]
    order_S = np.argsort(group_S, kind="stable")
    class_O = class_S[order_S]
    differs_AC = (goes_AC != goes_AC[:, class_G[group_C]]) & allowed_AC
    places_C: dict[int, list[int]] = {}
    for place, c in enumerate(class_O.tolist()):
        places_C.setdefault(c, []).append(place)
    lists = [[p for c in np.flatnonzero(row).tolist() for p in places_C.get(c, ())] for row in differs_AC]
    width = max(1, *map(len, lists))
    exceptions_AK = np.full((len(goes_AC), width), len(class_S), dtype=np.int32)
    for state, places in enumerate(lists):
        exceptions_AK[state, : len(places)] = places
    sizes_G = np.bincount(group_S, minlength=len(class_G)).tolist()
    return Layout(order_S, sizes_G, class_G.astype(np.int64), exceptions_AK)


def tiles(arranged: Layout) -> Tensor:
    """(3, N) int32: where each tile of a GPU's products begins and ends among the symbols, and its group's class."""
    found, begin = [], 0
    for size, class_ in zip(arranged.sizes_G, arranged.class_G.tolist(), strict=True):
        end = begin + size
        found += [(first, min(first + TILE, end), class_) for first in range(begin, end, TILE)]
        begin = end
    return torch.tensor(found, dtype=torch.int32).T.contiguous()
