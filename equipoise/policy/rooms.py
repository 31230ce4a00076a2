"""The shapes that packs are padded to, so that CUDA graphs are recorded of few of them.

Recording a shape runs it twice from Python, which takes a small model longer than several steps. So a pack takes a
recorded shape that is a little too large for it, until so much has been computed in vain that its own pays for its
recording.
"""

from collections import Counter
from typing import NamedTuple

from equipoise.policy.graphs import round_up

BUCKET = 64
"""Nodes and tokens are padded to multiples of at least this."""
COST = 8e10
"""A recording costs as much as so many weights that are multiplied with a pack in vain: 10 passes of 8 billion weights,
0.3 to 0.5 s of 50 ms each."""
MOST_PASSES = 400
"""More passes in vain are never put up with. Those of a small model, which launches keep waiting, cost little."""
MOST = 1.5
"""A shape is never this many times larger than what it stands in for."""


class Room(NamedTuple):
    """What a padded pack has room for: nodes, tokens that are predicted, tokens of a row."""

    nodes: int
    tokens: int
    width: int

    def holds(self, other: "Room") -> bool:
        return all(mine >= its for mine, its in zip(self, other, strict=True))

    def is_far_above(self, other: "Room") -> bool:
        return self.nodes > MOST * other.nodes or self.tokens > MOST * other.tokens


class Rooms:
    """Which shapes are in use, for each number of rows, of a model with so many weights."""

    def __init__(self, weights: float) -> None:
        self.patience = min(MOST_PASSES, COST / weights)
        """Passes in vain after which a shape is recorded."""
        self._used: dict[int, list[Room]] = {}
        self._vain: Counter[tuple[int, Room]] = Counter()

    def take(self, rows: int, need: Room, most_tokens: int) -> Room:
        """The shape for a pack of so many rows that needs this much; decided by what has been asked for before. Rows of
        this number never need more than `most_tokens`."""
        used = self._used.setdefault(rows, [])
        if need in used:
            return need
        fitting = [room for room in used if room.holds(need) and not room.is_far_above(need)]
        if fitting:
            # Whole passes, of which a Counter takes parts as well.
            self._vain[rows, need] += 1 - need.nodes / min(fitting).nodes  # type: ignore[assignment]
            if self._vain[rows, need] <= self.patience:
                return min(fitting)
        # Where there is none yet, those that come after will as often be larger: a step of each size to spare.
        spare = not fitting and need.tokens < bucket(most_tokens)
        room = Room(bucket(need.nodes + 1), bucket(need.tokens + 1), need.width) if spare else need
        used.append(room)
        return room

    def clear(self) -> None:
        """Forget all of them, as their recordings are forgotten."""
        self._used.clear()
        self._vain.clear()


def bucket(n: int) -> int:
    """n rounded up by a quarter at most, to a multiple of BUCKET."""
    return round_up(n, max(BUCKET, 1 << max(0, n.bit_length() - 3)))
