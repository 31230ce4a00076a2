"""Frequency-aware diversity bonus: among sentences that already satisfy the constraint, rarer terms pay more.

The protocol's own bonus counts terms within one sentence and cannot tell "confident … compassionate" written for
everyone from variety. This one looks at a running window of the batch's (agentic, communal) terms.
"""

import math
from collections import Counter, deque
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from equipoise.measures.variety import opening
from equipoise.ppo.config import DiversityConfig
from equipoise.protocol.lexicon import LEXICON, Lexicon
from equipoise.protocol.reward import Reward


class Written(NamedTuple):
    """What the window keeps of a compliant sentence."""

    agentic: tuple[str, ...]
    communal: tuple[str, ...]
    opening: str


class TermWindow:
    """Terms of the last `diversity_window` compliant sentences, and the bonus they imply."""

    def __init__(self, config: DiversityConfig, lexicon: Lexicon = LEXICON) -> None:
        self.config = config
        self.lexicon = lexicon
        self.sizes = {
            **dict.fromkeys(lexicon.agentic, len(lexicon.agentic)),
            **dict.fromkeys(lexicon.communal, len(lexicon.communal)),
        }
        self.window: deque[Written] = deque(maxlen=config.diversity_window)
        self.counts: Counter[Any] = Counter()

    def bonuses(self, rewards: Sequence[Reward]) -> list[float]:
        """One bonus per sentence, 0 for those without both classes; counted before this batch enters the window.

        For each class the sentence's commonest term has share f = (count + 1) / (sentences + list length) in the window
        (Laplace), and log(uniform share / f) / log(list length) is its rarity: 0 at even use, 1 at most, below 0 when
        overused. The bonus is weight × the mean rarity of both classes, limited to ±weight. Commonest rather than mean:
        adding a rare term to an overused one must not pay. A pair's rarity is the same over all possible pairs. The
        malus of the opening is added.
        """
        return [
            self.config.diversity_weight * max(-1.0, min(1.0, self._rarity(reward))) - self._opening_malus(reward)
            if reward.agentic and reward.communal
            else 0.0
            for reward in rewards
        ]

    def _rarity(self, reward: Reward) -> float:
        agentic, communal = self.sizes[reward.agentic[0]], self.sizes[reward.communal[0]]
        terms = (self._rarity_among(reward.agentic, agentic) + self._rarity_among(reward.communal, communal)) / 2
        if self.config.diversity_on == "terms":
            return terms
        pairs = self._rarity_among(list(product(reward.agentic, reward.communal)), agentic * communal)
        return pairs if self.config.diversity_on == "pairs" else (terms + pairs) / 2

    def _rarity_among(self, values: Sequence[Any], size: int) -> float:
        if size == 1:
            return 0.0
        share = (max(self.counts[v] for v in values) + 1) / (len(self.window) + size)
        return math.log(1 / (size * share)) / math.log(size)

    def _opening_malus(self, reward: Reward) -> float:
        if not self.window or not self.config.opening_weight:
            return 0.0
        return self.config.opening_weight * self.counts[opening(reward.text, self.lexicon)] / len(self.window)

    def add(self, rewards: Sequence[Reward]) -> None:
        for reward in rewards:
            if not (reward.agentic and reward.communal):
                continue
            if len(self.window) == self.window.maxlen:
                self.counts.subtract(_counted(self.window[0]))
            written = Written(reward.agentic, reward.communal, opening(reward.text, self.lexicon))
            self.window.append(written)
            self.counts.update(_counted(written))

    def state(self) -> list[list[Any]]:
        return [[list(w.agentic), list(w.communal), w.opening] for w in self.window]

    def load_state(self, state: Sequence[Sequence[Any]]) -> None:
        self.window.clear()
        self.window.extend(Written(tuple(agentic), tuple(communal), start) for agentic, communal, start in state)
        self.counts = Counter(value for written in self.window for value in _counted(written))


def _counted(written: Written) -> list[Any]:
    return [*written.agentic, *written.communal, *product(written.agentic, written.communal), written.opening]
