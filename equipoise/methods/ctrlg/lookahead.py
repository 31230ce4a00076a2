"""The look-ahead: how probable it is, under the HMM, that what follows completes a valid sentence.

F + 2 automaton states (the last two `done` and `dead`), H states of the HMM, S symbols, C token classes, T tokens.
With r tokens left after a token, `f` the automaton's state after it, and `j` the HMM state that emitted it:

    U_r[f, k] = Σ_s P(s | k) · W_{r−1}[next(f, s), k]        the next symbol is emitted from k
    W_r[f, j] = Σ_k P(k | j) · U_r[f, k],   W_r[done] = 1,   W_0[f] = 0 otherwise

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


class _Edges(NamedTuple):
    """Distinct rows of the transition table, restricted to a group of classes, by number of edges: per bucket the rows
    and, (rows, degree), which set of classes leads where."""

    row_of_F: Tensor
    rows: int
    buckets: list[tuple[Tensor, Tensor, Tensor]]


def look_ahead(automaton: TokenAutomaton, hmm: HMM, class_S: Tensor, steps: int) -> Tensor:
    """(steps, F + 2, H) float32: W_r for r = 0 … steps − 1, on the HMM's device. class_S: (S,) class of each symbol."""
    device = hmm.emission_SH.device
    hidden, states = hmm.emission_SH.shape[1], len(automaton.next_FC)
    sets: dict[bytes, int] = {}
    groups = [_edges(automaton, automaton.glued_C == glued, sets, device) for glued in (False, True)]
    packed = np.stack([np.frombuffer(key, dtype=np.uint8) for key in sets])
    member_MC = torch.from_numpy(np.unpackbits(packed, axis=1, count=automaton.next_FC.shape[1])).to(device).float()
    mass_CH = torch.zeros(member_MC.shape[1], hidden, device=device).index_add_(0, class_S, hmm.emission_SH)
    mass_MH = member_MC @ mass_CH
    look_TFH = torch.zeros(steps, states, hidden, device=device)
    look_TFH[:, automaton.done] = 1
    for r in range(1, steps):
        before_FH = look_TFH[r - 1]
        total_FH = torch.zeros(automaton.done, hidden, device=device)
        for edges in groups:
            sums_RH = torch.zeros(edges.rows, hidden, device=device)
            for rows, set_RD, target_RD in edges.buckets:
                size = max(1, _CHUNK // (set_RD.shape[1] * hidden))
                for part in torch.arange(len(rows), device=device).split(size):
                    sums_RH[rows[part]] = (mass_MH[set_RD[part]] * before_FH[target_RD[part]]).sum(1)
            total_FH += sums_RH[edges.row_of_F]
        look_TFH[r, : automaton.done] = total_FH @ hmm.transition_HH.T
    return look_TFH


def _edges(automaton: TokenAutomaton, of_C: NDArray[np.bool_], sets: dict[bytes, int], device: torch.device) -> _Edges:
    table_FC = np.where(of_C, automaton.next_FC[: automaton.done], automaton.dead)
    rows_RC, row_of_F = np.unique(table_FC, axis=0, return_inverse=True)
    by_degree: dict[int, list[tuple[int, list[int], list[int]]]] = {}
    for number, row_C in enumerate(rows_RC):
        targets = [target for target in np.unique(row_C) if target != automaton.dead]
        chosen = [sets.setdefault(np.packbits(row_C == target).tobytes(), len(sets)) for target in targets]
        if targets:
            width = 1 << (len(targets) - 1).bit_length()
            spare = width - len(targets)  # a spare edge leads to `dead`, whose look-ahead is 0
            edge = (number, chosen + [0] * spare, [int(t) for t in targets] + [automaton.dead] * spare)
            by_degree.setdefault(width, []).append(edge)
    buckets = [tuple(torch.tensor(x, device=device) for x in zip(*edges, strict=True)) for edges in by_degree.values()]
    return _Edges(torch.from_numpy(row_of_F).to(device), len(rows_RC), buckets)  # type: ignore[arg-type]


class Layout(NamedTuple):
    """How symbols are grouped for guidance. Most symbols belong to a few large classes, whose look-ahead is one matrix
    product each; where a state sends a symbol elsewhere than its group's class goes, it is an exception of that state.

    order_S: symbols, group by group. sizes_G: symbols in each group. class_G: each group's class. exceptions_FK: per
    state, places in order_S, filled up with S.
    """

    order_S: NDArray[np.int64]
    sizes_G: list[int]
    class_G: NDArray[np.int64]
    exceptions_FK: NDArray[np.int32]


def layout(automaton: TokenAutomaton, class_S: NDArray[np.int64], groups: int = 12, smallest: int = 24) -> Layout:
    """At most `groups` groups, around the classes with the most symbols, none but the first with under `smallest`."""
    next_FC, live = automaton.next_FC, automaton.done
    counts_C = np.bincount(class_S, minlength=next_FC.shape[1])
    counts_C[0] = 0  # what is never allowed needs no group
    largest = np.argsort(-counts_C, kind="stable")[:groups]
    class_G = np.array([c for i, c in enumerate(largest) if i == 0 or counts_C[c] >= smallest])
    goes_FC = next_FC[:live]
    allowed_FC = goes_FC != automaton.dead
    differs_GC = np.stack([((goes_FC != goes_FC[:, g : g + 1]) & allowed_FC).sum(0) for g in class_G])
    group_C = differs_GC.argmin(0)
    group_S = group_C[class_S]
    order_S = np.argsort(group_S, kind="stable")
    class_O = class_S[order_S]
    differs_FC = (goes_FC != goes_FC[:, class_G[group_C]]) & allowed_FC
    places_C: dict[int, list[int]] = {}
    for place, c in enumerate(class_O.tolist()):
        places_C.setdefault(c, []).append(place)
    lists = [[p for c in np.flatnonzero(row).tolist() for p in places_C.get(c, ())] for row in differs_FC]
    width = max(1, *map(len, lists))
    exceptions_FK = np.full((len(next_FC), width), len(class_S), dtype=np.int32)
    for state, places in enumerate(lists):
        exceptions_FK[state, : len(places)] = places
    sizes_G = np.bincount(group_S, minlength=len(class_G)).tolist()
    return Layout(order_S, sizes_G, class_G.astype(np.int64), exceptions_FK)
