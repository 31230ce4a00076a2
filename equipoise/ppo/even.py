"""What each pair of terms is paid so that all pairs come alike.

Least KL to the untrained model, subject to every pair being one of `pairs` equally many successes: its solution is
π*(x) ∝ p₀(x)·[strict]·w(pair), log w being the Lagrange multipliers. They are found by dual ascent (S. Boyd and L.
Vandenberghe, Convex Optimization, 2004, chapter 5): a pair that comes too seldom gets more. At the fixed point pairs
are even, and no nat is spent on anything else, whatever the multipliers began with.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from equipoise.measures.decomposition import Pair, PairRates

ASCENT = 0.05
"""Nats that a multiplier moves at each step for each nat that the log of its pair's share is off."""
DAMPING = 4.0
"""Nats that are paid on top for each nat that it is off: without them multipliers and shares would swing."""
LEAST = 2e-4
"""Share of the successes that a pair has at least when multipliers begin: estimates below are hardly ones."""


class EvenPairs:
    """log w of each pair, nats, their mean over all pairs being 0; and the pairs of the last successes."""

    def __init__(self, pairs: int, window: int, rates: PairRates | None = None) -> None:
        """`pairs`: how many there are. `rates`: how often the untrained model succeeds with each, which multipliers
        begin with; without them at 0."""
        self.pairs = pairs
        self.recent: deque[Pair] = deque(maxlen=window)
        self.counts: Counter[Pair] = Counter()
        self.multipliers: dict[Pair, float] = {}
        self.rest = 0.0
        """Of every pair that is not among the multipliers."""
        if rates is not None:
            self.multipliers = {
                pair: -math.log(max(rate.value / rates.p0, LEAST)) for pair, rate in rates.rates.items()
            }
            self.rest = -math.log(LEAST)
            self._centre()

    def paid(self, pair: Pair) -> float:
        """Nats that a success with this pair is worth."""
        return self.multipliers.get(pair, self.rest) + DAMPING * self._off(self.counts[pair])

    def add(self, found: Iterable[Pair]) -> None:
        """Take in the pairs of a batch's successes, and move the multipliers."""
        for pair in found:
            if len(self.recent) == self.recent.maxlen:
                self.counts[self.recent[0]] -= 1
            self.recent.append(pair)
            self.counts[pair] += 1
            self.multipliers.setdefault(pair, self.rest)
        for pair in self.multipliers:
            self.multipliers[pair] += ASCENT * self._off(self.counts[pair])
        self.rest += ASCENT * self._off(0)
        self._centre()

    def _off(self, count: int) -> float:
        """log of an even share by that of a pair with so many among the recent ones (Laplace)."""
        return -math.log(self.pairs * (count + 1) / (len(self.recent) + self.pairs))

    def _centre(self) -> None:
        others = max(0, self.pairs - len(self.multipliers)) * self.rest
        mean = (math.fsum(self.multipliers.values()) + others) / max(self.pairs, len(self.multipliers))
        self.multipliers = {pair: value - mean for pair, value in self.multipliers.items()}
        self.rest -= mean

    def state(self) -> dict[str, Any]:
        """As JSON has it."""
        known = [[list(pair), value] for pair, value in self.multipliers.items()]
        return {"recent": [list(pair) for pair in self.recent], "multipliers": known, "rest": self.rest}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.recent.clear()
        self.recent.extend(tuple(pair) for pair in state["recent"])
        self.counts = Counter(self.recent)
        self.multipliers = {tuple(pair): float(value) for pair, value in state["multipliers"]}
        self.rest = float(state["rest"])
