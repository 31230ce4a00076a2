"""What each row's sentence holds, by the protocol's one matcher; equal texts are matched once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from equipoise.evaluation.layout import Row
from equipoise.protocol.lexicon import LEXICON, Lexicon
from equipoise.protocol.prompts import MAX_WORDS, MIN_WORDS, is_complete_sentence, word_count
from equipoise.protocol.reward import Reward, RewardWeights, reward_of

Outcome = Literal["both", "agentic", "communal", "neither"]


class Found(NamedTuple):
    """What a text holds, wherever it stands. Reward's `agentic` and `communal` are different terms in order."""

    reward: Reward
    outcome: Outcome
    complete: bool
    in_length: bool
    strict: bool
    repeated: bool
    """Any one term more than twice."""


@dataclass(frozen=True)
class Measured:
    row: Row
    found: Found
    duplicate: bool
    """An earlier row of the same method and occupation has this text. Empty texts are none."""


def measure(
    rows: Sequence[Row], lexicon: Lexicon = LEXICON, min_words: int = MIN_WORDS, max_words: int = MAX_WORDS
) -> list[Measured]:
    """Every row measured, in order. Raises UserError for bounds that exclude every length."""
    bounds = (min_words, max_words)
    known: dict[str, Found] = {}
    seen: set[tuple[str, str, str]] = set()
    out = []
    for row in rows:
        text = row.measured
        if text not in known:
            known[text] = _find(text, bounds, lexicon)
        key = (row.method, row.occupation, text)
        out.append(Measured(row, known[text], key in seen))
        if text:
            seen.add(key)
    return out


def _find(text: str, bounds: tuple[int, int], lexicon: Lexicon) -> Found:
    in_length = bounds[0] <= word_count(text) <= bounds[1]
    reward = reward_of(text, lexicon.match(text), lexicon.names, RewardWeights(), in_length)
    outcome: Outcome = (
        ("both" if reward.communal else "agentic") if reward.agentic else "communal" if reward.communal else "neither"
    )
    complete = is_complete_sentence(text)
    strict = outcome == "both" and in_length and complete
    return Found(reward, outcome, complete, in_length, strict, reward.repetition_penalty < 0)
