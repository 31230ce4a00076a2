"""What each pair of terms is paid so that all pairs come alike, or nearly so.

Least KL to the untrained model, subject to every pair having the share of successes that is wanted of it: its solution
is π*(x) ∝ p₀(x)·[strict]·w(pair), log w being the Lagrange multipliers. They are found by dual ascent (S. Boyd and L.
Vandenberghe, Convex Optimization, 2004, chapter 5): a pair that comes too seldom gets more. At the fixed point pairs
are even, and no nat is spent on anything else, whatever the multipliers began with.

What is wanted of a pair is proportional to a power of its share under the untrained model: 0 for all alike. Of all
distributions with so much entropy these are the nearest (as in `measures.decomposition.least_variety`), so a power a
little above 0 gives up few effective pairs for the rarest ones, which cost the most.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from equipoise.measures.decomposition import Pair, PairRates

ASCENT = 0.1
"""Nats that a multiplier moves at each step for each nat that the log of its pair's share is off."""
DAMPING = 1.5
"""Nats that are paid on top for each nat that it is off. Without them multipliers and shares would swing; with more
they do where steps are so large that the policy goes most of the way to what pays best in one (docs/LOG.md)."""
GAINS_BEFORE = (0.05, 4.0)
"""Both, in states that do not hold them."""
UNKNOWN = 2e-4
"""Share of the successes that multipliers begin as if a pair had whose rate is not known. Those that are begin with it,
however rare: where it is known within a half it is within a nat of what dual ascent finds (docs/LOG.md)."""


class EvenPairs:
    """log w of each pair, nats, their mean over all pairs being 0; and the pairs of the last successes."""

    def __init__(self, pairs: int, window: int, rates: PairRates | None = None, power: float = 0.0) -> None:
        """`pairs`: how many there are. `rates`: how often the untrained model succeeds with each, which multipliers
        begin with; without them at 0, and all pairs are wanted alike. `power`: see above."""
        self.pairs = pairs
        self.ascent, self.damping = ASCENT, DAMPING
        self.recent: deque[Pair] = deque(maxlen=window)
        self.counts: Counter[Pair] = Counter()
        self.multipliers: dict[Pair, float] = {}
        self.rest = 0.0
        """Of every pair that is not among the multipliers."""
        self.wanted: dict[Pair, float] = {}
        """Share of the successes that each is to have."""
        self.wanted_rest = 1 / pairs
        """Of every pair that is not among these."""
        if rates is not None:
            shares = {pair: rate.value / rates.p0 for pair, rate in rates.rates.items() if rate.value > 0}
            least = min(shares.values(), default=1.0)  # what pairs that were never seen have at the most
            powers = {pair: share**power for pair, share in shares.items()}
            total = math.fsum(powers.values()) + max(0, pairs - len(shares)) * least**power
            self.wanted = {pair: x / total for pair, x in powers.items()}
            self.wanted_rest = least**power / total
            self.multipliers = {pair: math.log(self.wanted[pair] / x) for pair, x in shares.items()}
            self.rest = math.log(self.wanted_rest / UNKNOWN)
            self._centre()

    def paid(self, found: Sequence[Pair]) -> list[float]:
        """Nats that each of a batch's successes is worth, the batch being counted among the recent ones; nothing
        changes. Counted only for the next batch, what is paid would answer to the policy of one to two steps before,
        and large steps would swing about what is wanted (docs/LOG.md)."""
        recent = deque(self.recent, maxlen=self.recent.maxlen)
        recent.extend(found)
        counts = Counter(recent)
        worth = {
            pair: self.multipliers.get(pair, self.rest) + self.damping * self._off(pair, counts, len(recent))
            for pair in set(found)
        }
        return [worth[pair] for pair in found]

    def add(self, found: Iterable[Pair]) -> None:
        """Take in the pairs of a batch's successes, and move the multipliers."""
        for pair in found:
            if len(self.recent) == self.recent.maxlen:
                self.counts[self.recent[0]] -= 1
            self.recent.append(pair)
            self.counts[pair] += 1
            self.multipliers.setdefault(pair, self.rest)
        for pair in self.multipliers:
            self.multipliers[pair] += self.ascent * self._off(pair, self.counts, len(self.recent))
        self.rest += self.ascent * self._off(None, self.counts, len(self.recent))
        self._centre()

    def _off(self, pair: Pair | None, counts: Counter[Pair], total: int) -> float:
        """log of the share that is wanted of a pair by that which it has among those counted, `total` in all, as if
        `pairs` successes more had come as wanted; None stands for a pair that never came."""
        wanted = self.wanted_rest if pair is None else self.wanted.get(pair, self.wanted_rest)
        count = 0 if pair is None else counts[pair]
        return math.log(wanted * (total + self.pairs) / (count + self.pairs * wanted))

    def _centre(self) -> None:
        others = max(0, self.pairs - len(self.multipliers)) * self.rest
        mean = (math.fsum(self.multipliers.values()) + others) / max(self.pairs, len(self.multipliers))
        self.multipliers = {pair: value - mean for pair, value in self.multipliers.items()}
        self.rest -= mean

    def state(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "recent": [list(pair) for pair in self.recent],
            "multipliers": _listed(self.multipliers),
            "rest": self.rest,
            "wanted": _listed(self.wanted),
            "wanted_rest": self.wanted_rest,
            "gains": [self.ascent, self.damping],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.recent.clear()
        self.recent.extend(tuple(pair) for pair in state["recent"])
        self.counts = Counter(self.recent)
        self.multipliers = {tuple(pair): float(value) for pair, value in state["multipliers"]}
        self.rest = float(state["rest"])
        self.ascent, self.damping = state.get("gains", GAINS_BEFORE)
        if "wanted" in state:  # without, a state of before it was kept: what the rates of now say
            self.wanted = {tuple(pair): float(value) for pair, value in state["wanted"]}
            self.wanted_rest = float(state["wanted_rest"])


def _listed(values: Mapping[Pair, float]) -> list[Any]:
    return [[list(pair), value] for pair, value in values.items()]
