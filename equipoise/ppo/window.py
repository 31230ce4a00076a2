"""The last sentences of a run, as far as the running measures look back; part of every checkpoint."""

import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from equipoise.protocol.lexicon import LEXICON, Lexicon


class Sentence(NamedTuple):
    """One sampled sentence and what was measured of it."""

    text: str
    occupation: str
    agentic: tuple[str, ...]
    communal: tuple[str, ...]
    words: int
    tokens: int
    finished: bool
    """Ended with a stop token, rather than at the limit of new tokens."""
    strict: bool
    reward: float
    """The protocol's."""
    kl: float
    """log π − log π_ref of the completion: k1 of KL(π‖π_ref), nats."""
    nll: float
    """Negative log-likelihood under the reference model given the prompt, nats per token of the completion."""

    @property
    def both(self) -> bool:
        return bool(self.agentic and self.communal)


class Window:
    """The last `size` sentences, oldest first."""

    def __init__(self, size: int) -> None:
        self.sentences: deque[Sentence] = deque(maxlen=size)

    def add(self, sentences: Iterable[Sentence]) -> None:
        self.sentences.extend(sentences)

    def __len__(self) -> int:
        return len(self.sentences)

    def mean(self, values: Iterable[float]) -> float:
        """Mean of one value a sentence; 0 when there is none."""
        return math.fsum(values) / len(self.sentences) if self.sentences else 0.0

    def state(self) -> list[list[Any]]:
        return [[list(value) if isinstance(value, tuple) else value for value in s] for s in self.sentences]

    def load_state(self, state: Sequence[Sequence[Any]]) -> None:
        self.sentences.clear()
        for row in state:
            values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in row]
            self.sentences.append(Sentence._make(values))


def effective(counts: Counter[Any]) -> float:
    """2^H of the shares, H their entropy in bits: how many equally frequent values would be as varied. 0 for none."""
    total = sum(counts.values())
    if total == 0:
        return 0.0
    # Sorted, so that the sum does not depend on the order in which values were met.
    shares = sorted(n / total for n in counts.values() if n)
    return math.exp(-math.fsum(p * math.log(p) for p in shares))


def pair_counts(terms: Iterable[tuple[Sequence[str], Sequence[str]]]) -> Counter[tuple[str, str]]:
    """How often each (first agentic, first communal) pair occurs among the sentences that have both."""
    return Counter((agentic[0], communal[0]) for agentic, communal in terms if agentic and communal)


def masked(text: str, occupation: str, lexicon: Lexicon = LEXICON) -> str:
    """The sentence's mould: lower case, every term as "*", the occupation as "_"."""
    mould = lexicon.mark(text, ("\0", "\0"), ("\0", "\0"))
    mould = re.sub("\0[^\0]*\0", "*", mould).lower()
    return re.sub(rf"\b{re.escape(occupation.lower())}\b", "_", mould)
