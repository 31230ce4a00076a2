"""Frequency-aware diversity bonus: among sentences that already satisfy the constraint, rarer terms pay more.

The protocol's own bonus counts terms within one sentence and cannot tell "confident … compassionate" written for
everyone from variety. This one looks at a running window of the terms of each class.
"""

import math
from collections import Counter, deque
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from equipoise.measures.decomposition import PairRates
from equipoise.ppo.config import DiversityConfig
from equipoise.ppo.even import EvenPairs
from equipoise.protocol.reward import Reward
from equipoise.protocol.task import Task


class Written(NamedTuple):
    """What the window keeps of a compliant sentence."""

    terms: tuple[tuple[str, ...], ...]
    """Of each class."""
    opening: str


class TermWindow:
    """Terms of the last `diversity_window` compliant sentences, and the bonus they imply."""

    def __init__(self, config: DiversityConfig, task: Task, rates: PairRates | None = None) -> None:
        """`rates`: how often the untrained model succeeds with each pair, for `diversity_on` "even" to begin with."""
        even = config.diversity_on == "even"
        self.even = EvenPairs(task.pair_count, config.diversity_window, rates, config.even_power) if even else None
        self.config = config
        self.task = task
        self.window: deque[Written] = deque(maxlen=config.diversity_window)
        self.counts: Counter[Any] = Counter()

    def bonuses(self, rewards: Sequence[Reward], occupations: Sequence[str]) -> list[float]:
        """One bonus per sentence, 0 for those that lack a class; the window is as before this batch, and stays so.

        For each class the sentence's commonest term has share f = (count + 1) / (sentences + list length) in the window
        (Laplace), and log(uniform share / f) / log(list length) is its rarity: 0 at even use, 1 at most, below 0 when
        overused. The bonus is weight × the mean rarity over the classes, limited to ±weight. Commonest rather than
        mean: adding a rare term to an overused one must not pay. The rarity of a pair (a combination of a term of each
        class) is the same over all possible pairs. With "even" it is the weight times what `EvenPairs` pays, for strict
        success alone, without limits; that does count the batch. The malus of the opening is added.
        """
        if self.even is None:
            worth = [max(-1.0, min(1.0, self._rarity(each))) if each.complete else 0.0 for each in rewards]
        else:
            succeeded = [each.first if self.task.strict(each.text) else None for each in rewards]
            paid = iter(self.even.paid([pair for pair in succeeded if pair is not None]))
            worth = [0.0 if pair is None else next(paid) for pair in succeeded]
        return [
            self.config.diversity_weight * x - self._opening_malus(reward, occupation) if reward.complete else 0.0
            for x, reward, occupation in zip(worth, rewards, occupations, strict=True)
        ]

    def _rarity(self, reward: Reward) -> float:
        sizes = self.task.lexicon.sizes
        by_class = [self._rarity_among(terms, size) for terms, size in zip(reward.terms, sizes, strict=True)]
        mean = sum(by_class) / len(by_class)
        if self.config.diversity_on == "terms":
            return mean
        pairs = self._rarity_among(list(product(*reward.terms)), self.task.pair_count)
        return pairs if self.config.diversity_on == "pairs" else (mean + pairs) / 2

    def _rarity_among(self, values: Sequence[Any], size: int) -> float:
        if size == 1:
            return 0.0
        share = (max(self.counts[v] for v in values) + 1) / (len(self.window) + size)
        return math.log(1 / (size * share)) / math.log(size)

    def _opening_malus(self, reward: Reward, occupation: str) -> float:
        if not self.window or not self.config.opening_weight:
            return 0.0
        return self.config.opening_weight * self.counts[self.task.opening(reward.text, occupation)] / len(self.window)

    def add(self, rewards: Sequence[Reward], occupations: Sequence[str]) -> None:
        """Take in a batch; sentences that lack a class are passed over."""
        for reward, occupation in zip(rewards, occupations, strict=True):
            if not reward.complete:
                continue
            if len(self.window) == self.window.maxlen:
                self.counts.subtract(_counted(self.window[0]))
            written = Written(reward.terms, self.task.opening(reward.text, occupation))
            self.window.append(written)
            self.counts.update(_counted(written))
        if self.even is not None:
            self.even.add(r.first for r in rewards if r.first is not None and self.task.strict(r.text))

    def state(self) -> Any:
        written = [[[list(terms) for terms in w.terms], w.opening] for w in self.window]
        return written if self.even is None else {"written": written, "even": self.even.state()}

    def load_state(self, state: Any) -> None:
        if self.even is not None:
            self.even.load_state(state["even"])
            state = state["written"]
        self.window.clear()
        for *terms, start in state:
            # Either one list of lists, or, of a version that knew two classes only, a list for each.
            of_classes = terms[0] if len(terms) == 1 else terms
            self.window.append(Written(tuple(map(tuple, of_classes)), start))
        self.counts = Counter(value for written in self.window for value in _counted(written))


def _counted(written: Written) -> list[Any]:
    return [*(term for terms in written.terms for term in terms), *product(*written.terms), written.opening]
