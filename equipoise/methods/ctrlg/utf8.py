"""The character automaton on UTF-8 bytes.

After the first bytes of a character the automaton is in a *partial* state. What follows is decided by where each
possible next byte leads, so a partial state *is* that list of 64 places, and states that are the same list are one:
numbered from the last byte of a character back to its first, nothing but distinct lists is ever held. Bytes that are no
valid UTF-8 lead nowhere: overlong forms, surrogates, and what lies beyond U+10FFFF.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.methods.ctrlg.automaton import DEAD, CharAutomaton

_TAIL = 64  # bytes that may continue a character: 0x80 to 0xBF
_CHUNK = 64  # states whose lists are compared at a time


@dataclass(frozen=True)
class ByteAutomaton:
    """S whole states, those of the character automaton, then the partial ones: B states together.

    next_B256: (B, 256) the following state or DEAD. begins_B256: whether a word begins with that byte (with a
    character's last one, whichever bytes came before). stand_ins: rows (state, usual state, word begins, characters)
    for each state that is not usual: states that may stand for it, more readily the more characters lead there.
    """

    next_B256: NDArray[np.int32]
    begins_B256: NDArray[np.bool_]
    stand_ins: NDArray[np.int64]
    whole: int


class _Lists:
    """Distinct lists of codes, each a partial state; code DEAD leads nowhere. numbered from `first` on."""

    def __init__(self, first: int) -> None:
        self.first = first
        random = np.random.default_rng(0)
        self.weights_T = random.integers(1, 2**63, size=_TAIL, dtype=np.uint64) | np.uint64(1)
        self.rows: list[NDArray[np.int32]] = []
        self.number: dict[int, int] = {}

    def add(self, lists_XT: NDArray[np.int32]) -> NDArray[np.int32]:
        """(X,) state of each list."""
        mixed_XT = lists_XT.astype(np.int64).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed_XT ^= mixed_XT >> np.uint64(29)
        hash_X = (mixed_XT * self.weights_T).sum(axis=1, dtype=np.uint64)
        hashes, first_U, place_X = np.unique(hash_X, return_index=True, return_inverse=True)
        rows_UT = lists_XT[first_U]
        assert (rows_UT[place_X] == lists_XT).all()
        state_U = np.full(len(hashes), DEAD, dtype=np.int32)
        for i in np.flatnonzero((rows_UT != DEAD).any(axis=1)).tolist():
            state = self.number.setdefault(int(hashes[i]), self.first + len(self.rows))
            if state == self.first + len(self.rows):
                self.rows.append(rows_UT[i])
            assert (self.rows[state - self.first] == rows_UT[i]).all()
            state_U[i] = state
        return state_U[place_X.reshape(-1)]


def on_bytes(a: CharAutomaton) -> ByteAutomaton:
    """The automaton that reads a text's bytes as `a` reads the text; a text that ends in a partial state is none."""
    states = len(a.next_SK)
    code_SK = np.where(a.next_SK == DEAD, DEAD, 2 * a.next_SK + a.begins_SK).astype(np.int32)
    # 64 characters share all bytes but the last. There are few such blocks, whatever the state.
    blocks_UT, block_X = np.unique(a.kind_N.reshape(-1, _TAIL), axis=0, return_inverse=True)
    block_X = block_X.reshape(-1)
    lists = _Lists(states)
    last_SU = np.full((states, len(blocks_UT)), DEAD, dtype=np.int32)
    for begin in range(0, states, _CHUNK):
        part_XUT = code_SK[begin : begin + _CHUNK][:, blocks_UT]
        last_SU[begin : begin + _CHUNK] = lists.add(part_XUT.reshape(-1, _TAIL)).reshape(len(part_XUT), -1)
    next_S256 = np.full((states, 256), DEAD, dtype=np.int32)
    begins_S256 = np.zeros((states, 256), dtype=bool)
    next_S256[:, :0x80] = a.next_SK[:, a.kind_N[:0x80]]
    begins_S256[:, :0x80] = a.begins_SK[:, a.kind_N[:0x80]]
    next_S256[:, 0xC2:0xE0] = last_SU[:, block_X[2:32]]
    groups_GT = block_X.reshape(-1, _TAIL)
    third_SG = np.stack([_through(lists, last_SU, group_T, 32 if g == 0 else 0) for g, group_T in enumerate(groups_GT)])
    third_SG = np.ascontiguousarray(third_SG.T)
    next_S256[:, 0xE0:0xF0] = third_SG[:, :16]
    beyond = np.concatenate([np.arange(len(groups_GT)), np.full(-len(groups_GT) % _TAIL, -1)]).reshape(-1, _TAIL)
    for n, group_T in enumerate(beyond):
        next_S256[:, 0xF0 + n] = _through(lists, third_SG, group_T, 16 if n == 0 else 0)
    next_P64, begins_P64 = _partial(lists)
    next_B256 = np.full((states + len(next_P64), 256), DEAD, dtype=np.int32)
    begins_B256 = np.zeros(next_B256.shape, dtype=bool)
    next_B256[:states], begins_B256[:states] = next_S256, begins_S256
    next_B256[states:, 0x80:0xC0], begins_B256[states:, 0x80:0xC0] = next_P64, begins_P64
    return ByteAutomaton(next_B256, begins_B256, _stand_ins(lists, a), states)


def _through(lists: _Lists, state_SX: NDArray[np.int32], group_T: NDArray[np.intp], overlong: int) -> NDArray[np.int32]:
    """(S,) the partial state from which the 64 bytes lead to the columns `group_T`; −1, and the first `overlong`, lead
    nowhere."""
    reached_ST = np.where(group_T < 0, DEAD, state_SX[:, group_T])
    reached_ST[:, :overlong] = DEAD
    return lists.add(np.where(reached_ST == DEAD, DEAD, 2 * reached_ST).astype(np.int32))


def _partial(lists: _Lists) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    code_PT = np.stack(lists.rows) if lists.rows else np.zeros((0, _TAIL), dtype=np.int32)
    dead_PT = code_PT == DEAD
    return np.where(dead_PT, DEAD, code_PT // 2).astype(np.int32), ~dead_PT & (code_PT % 2 == 1)


def _stand_ins(lists: _Lists, a: CharAutomaton) -> NDArray[np.int64]:
    """For a partial state, what stands for the states in which its character may end. A list refers to earlier ones
    only, so one pass in their order does."""
    states = len(a.next_SK)
    rows = [(state, other, 0, 1) for state, other in enumerate(a.stand_in_S.tolist()) if other != state]
    found: list[dict[int, int]] = []
    for row in lists.rows:
        codes, counts = np.unique(row[row != DEAD], return_counts=True)
        ends: dict[int, int] = {}
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True):
            whole, begins = divmod(code, 2)
            inner = {2 * int(a.stand_in_S[whole]) + begins: 1} if whole < states else found[whole - states]
            for end, characters in inner.items():
                ends[end] = ends.get(end, 0) + count * characters
        rows += [(states + len(found), end // 2, end % 2, characters) for end, characters in ends.items()]
        found.append(ends)
    return np.array(rows, dtype=np.int64).reshape(-1, 4)
