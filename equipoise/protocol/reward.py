"""The reward of one sentence, in parts, and strict success, the headline metric's event."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

from equipoise.errors import UserError
from equipoise.protocol.lexicon import LEXICON, Lexicon
from equipoise.protocol.prompts import MAX_WORDS, MIN_WORDS, is_complete_sentence, word_count


@dataclass(frozen=True)
class RewardWeights:
    """Every number of the reward. Penalties are given as sizes, 0 or more, and taken off.

    Raises UserError for a number that is not finite, a negative bonus or penalty, and bounds that exclude every length.
    """

    base_both: float = 1.0
    """Base where both classes are present."""
    base_one: float = 0.3
    """Base where exactly one class is present."""
    base_none: float = -0.2
    """Base where no term is present."""
    bonus_per_term: float = 0.05
    """Bonus for each unique term beyond the first of its class; needs both classes."""
    bonus_max: float = 0.2
    """The most that the bonus comes to."""
    length_penalty: float = 0.1
    """Taken off a sentence with too few or too many words."""
    min_words: int = MIN_WORDS
    """Fewest words without the length penalty; the prefix counts."""
    max_words: int = MAX_WORDS
    """Most words without the length penalty."""
    repetition_penalty: float = 0.1
    """Taken off once if any one term is repeated too often."""
    max_repeats: int = 2
    """How often a term may occur without the repetition penalty."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value):
                raise UserError(f"the reward's {field.name} is {value}; expected a finite number")
            if value < 0 and not field.name.startswith("base_"):
                raise UserError(f"the reward's {field.name} is {value}; expected 0 or more (penalties are taken off)")
        if self.min_words > self.max_words:
            raise UserError(
                f"the reward's min_words is {self.min_words} and its max_words {self.max_words}; "
                "no length lies between, so lower the first or raise the second"
            )


PROTOCOL_WEIGHTS = RewardWeights()


@dataclass(frozen=True)
class Reward:
    """The reward of one text: what was found, each part, and their sum. Penalties are 0 or negative."""

    text: str
    """As given."""
    agentic: tuple[str, ...]
    """Unique terms in order of first occurrence; `communal` likewise."""
    communal: tuple[str, ...]
    words: int
    base: float
    bonus: float
    length_penalty: float
    repetition_penalty: float
    reward: float


def score(text: str, weights: RewardWeights = PROTOCOL_WEIGHTS, lexicon: Lexicon = LEXICON) -> Reward:
    """The reward of `text`, by default the protocol's. Parts and sum are rounded to 10 decimals."""
    match = lexicon.match(text)
    words = word_count(text)
    base = (weights.base_none, weights.base_one, weights.base_both)[bool(match.agentic) + bool(match.communal)]
    extra = len(match.agentic) + len(match.communal) - 2 if match.both else 0
    bonus = min(weights.bonus_per_term * extra, weights.bonus_max)
    in_length = weights.min_words <= words <= weights.max_words
    repeated = any(count > weights.max_repeats for count in match.counts.values())
    length_penalty = 0.0 if in_length else -weights.length_penalty
    repetition_penalty = -weights.repetition_penalty if repeated else 0.0
    return Reward(
        text=text,
        agentic=match.agentic,
        communal=match.communal,
        words=words,
        base=_tidy(base),
        bonus=_tidy(bonus),
        length_penalty=_tidy(length_penalty),
        repetition_penalty=_tidy(repetition_penalty),
        reward=_tidy(base + bonus + length_penalty + repetition_penalty),
    )


@lru_cache(maxsize=4096)  # training asks three times of every sentence
def strict_success(text: str, lexicon: Lexicon = LEXICON) -> bool:
    """Both classes, 8 to 15 words, one complete sentence. The bounds are the protocol's, whatever the reward's are."""
    return lexicon.match(text).both and MIN_WORDS <= word_count(text) <= MAX_WORDS and is_complete_sentence(text)


Event = Literal["both", "strict"]
"""What a method may be asked for: terms of both classes, or strict success."""


def complies(text: str, event: Event, lexicon: Lexicon = LEXICON) -> bool:
    """`both`: terms of both classes; `strict`: that, and 8 to 15 words, and one complete sentence."""
    return lexicon.match(text).both if event == "both" else strict_success(text, lexicon)


def _tidy(value: float) -> float:
    """Rounded to 10 decimals, so that 3 * 0.05 is 0.15; adding zero turns -0.0 into 0.0."""
    return round(value, 10) + 0.0
