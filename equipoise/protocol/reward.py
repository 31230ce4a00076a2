"""The reward of one sentence, in parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from equipoise.errors import UserError
from equipoise.protocol.lexicon import Found, Match
from equipoise.protocol.prompts import word_count

Event = Literal["both", "strict"]
"""What a method may be asked for: terms of every class (`both`, whatever their number), or strict success."""


@dataclass(frozen=True)
class RewardWeights:
    """Every number of the reward but the bounds of length, which are the task's. Penalties are given as sizes, 0 or
    more, and taken off.

    Raises UserError for what is no finite number, and for a negative bonus or penalty.
    """

    base_both: float = 1.0
    """Base where every class is present."""
    base_one: float = 0.3
    """Base where some classes are present but not all."""
    base_none: float = -0.2
    """Base where no term is present."""
    bonus_per_term: float = 0.05
    """Bonus for each unique term beyond the first of its class; needs every class."""
    bonus_max: float = 0.2
    """The most that the bonus comes to."""
    length_penalty: float = 0.1
    """Taken off a sentence with too few or too many words."""
    repetition_penalty: float = 0.1
    """Taken off once if any one term is repeated too often."""
    max_repeats: int = 2
    """How often a term may occur without the repetition penalty."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(f"the reward's {field.name} is {value!r:.40}; expected a finite number")
            if value < 0 and not field.name.startswith("base_"):
                raise UserError(f"the reward's {field.name} is {value}; expected 0 or more (penalties are taken off)")


PROTOCOL_WEIGHTS = RewardWeights()


@dataclass(frozen=True)
class Reward(Found):
    """The reward of one text: what was found, each part, and their sum. Penalties are 0 or negative."""

    text: str
    """As given."""
    terms: tuple[tuple[str, ...], ...]
    """For each class its different terms, in order of first occurrence."""
    classes: tuple[str, ...]
    """The names of the classes."""
    words: int
    base: float
    bonus: float
    length_penalty: float
    repetition_penalty: float
    reward: float

    def document(self) -> dict[str, Any]:
        """The reward for a file: `text`, a key for each class with its terms, `words`, the parts, `reward`."""
        return {
            "text": self.text,
            **dict(zip(self.classes, self.terms, strict=True)),
            "words": self.words,
            "base": self.base,
            "bonus": self.bonus,
            "length_penalty": self.length_penalty,
            "repetition_penalty": self.repetition_penalty,
            "reward": self.reward,
        }


def reward_of(text: str, match: Match, classes: tuple[str, ...], weights: RewardWeights, in_length: bool) -> Reward:
    """The reward of `text`, in which `match` was found of these classes. Parts and sum are rounded to 10 decimals."""
    base = weights.base_both if match.complete else weights.base_one if match.some else weights.base_none
    extra = sum(len(terms) - 1 for terms in match.terms) if match.complete else 0
    bonus = min(weights.bonus_per_term * extra, weights.bonus_max)
    length_penalty = 0.0 if in_length else -weights.length_penalty
    repeated = any(count > weights.max_repeats for count in match.counts.values())
    repetition_penalty = -weights.repetition_penalty if repeated else 0.0
    return Reward(
        text=text,
        terms=match.terms,
        classes=classes,
        words=word_count(text),
        base=_tidy(base),
        bonus=_tidy(bonus),
        length_penalty=_tidy(length_penalty),
        repetition_penalty=_tidy(repetition_penalty),
        reward=_tidy(base + bonus + length_penalty + repetition_penalty),
    )


def _tidy(value: float) -> float:
    """Rounded to 10 decimals, so that 3 * 0.05 is 0.15; adding zero turns -0.0 into 0.0."""
    return round(value, 10) + 0.0
