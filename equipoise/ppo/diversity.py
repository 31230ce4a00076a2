"""Frequency-aware diversity bonus: among sentences that already satisfy the constraint, rarer terms pay more.

The protocol's own bonus counts terms within one sentence and cannot tell "confident … compassionate" written for
everyone from variety. This one looks at a running window of the batch's (agentic, communal) terms.
"""

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from equipoise.errors import UserError
from equipoise.protocol.lexicon import LEXICON, Lexicon
from equipoise.protocol.reward import Reward


@dataclass(frozen=True)
class DiversityConfig:
    diversity_weight: float = 0.0
    """Largest bonus of a sentence, and the most one whose terms are overused can lose. 0 turns it off."""
    diversity_window: int = 1024
    """Compliant sentences over which the terms' frequencies are counted."""

    def __post_init__(self) -> None:
        if self.diversity_window < 1:
            raise UserError(f"diversity-window {self.diversity_window} must be at least 1; 1024 is the default")


class TermWindow:
    """Terms of the last `diversity_window` compliant sentences, and the bonus they imply."""

    def __init__(self, config: DiversityConfig, lexicon: Lexicon = LEXICON) -> None:
        self.config = config
        self.sizes = {
            **dict.fromkeys(lexicon.agentic, len(lexicon.agentic)),
            **dict.fromkeys(lexicon.communal, len(lexicon.communal)),
        }
        self.window: deque[tuple[str, ...]] = deque(maxlen=config.diversity_window)
        self.counts: Counter[str] = Counter()

    def bonuses(self, rewards: Sequence[Reward]) -> list[float]:
        """One bonus per sentence, 0 for those without both classes; counted before this batch enters the window.

        For each class the sentence's commonest term has share f = (count + 1) / (sentences + list length) in the window
        (Laplace), and log(uniform share / f) / log(list length) is its rarity: 0 at even use, 1 at most, below 0 when
        overused. The bonus is weight × the mean rarity of both classes, limited to ±weight. Commonest rather than mean:
        adding a rare term to an overused one must not pay.
        """
        out = []
        for reward in rewards:
            both = bool(reward.agentic and reward.communal)
            rarities = [self._rarity(terms) for terms in (reward.agentic, reward.communal)] if both else [0.0]
            mean = sum(rarities) / len(rarities)
            out.append(self.config.diversity_weight * max(-1.0, min(1.0, mean)))
        return out

    def _rarity(self, terms: Sequence[str]) -> float:
        size = self.sizes[terms[0]]
        if size == 1:
            return 0.0
        share = (max(self.counts[t] for t in terms) + 1) / (len(self.window) + size)
        return math.log(1 / (size * share)) / math.log(size)

    def add(self, rewards: Sequence[Reward]) -> None:
        for reward in rewards:
            if not (reward.agentic and reward.communal):
                continue
            if len(self.window) == self.window.maxlen:
                self.counts.subtract(self.window[0])
            terms = (*reward.agentic, *reward.communal)
            self.window.append(terms)
            self.counts.update(terms)

    def state(self) -> list[list[str]]:
        return [list(terms) for terms in self.window]

    def load_state(self, state: Sequence[Sequence[str]]) -> None:
        self.window.clear()
        self.window.extend(tuple(terms) for terms in state)
        self.counts = Counter(term for terms in self.window for term in terms)
