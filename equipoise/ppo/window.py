"""The last sentences of a run, as far as the running measures look back; part of every checkpoint."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Sentence(NamedTuple):
    """One sampled sentence and what was measured of it."""

    text: str
    occupation: str
    terms: tuple[tuple[str, ...], ...]
    """Of each class, in order of first occurrence."""
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
    def complete(self) -> bool:
        """Whether every class is present."""
        return all(self.terms)

    @property
    def partial(self) -> bool:
        """Whether some classes are present and others are not."""
        return any(self.terms) and not all(self.terms)

    @property
    def pair(self) -> tuple[str, ...] | None:
        """The first term of each class; None unless every class is present."""
        return tuple(terms[0] for terms in self.terms) if self.complete else None

    @property
    def term_count(self) -> int:
        """Different terms."""
        return sum(map(len, self.terms))


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
        return [list(s) for s in self.sentences]

    def load_state(self, state: Sequence[Sequence[Any]]) -> None:
        self.sentences.clear()
        for text, occupation, *rest in state:
            if len(rest) == len(Sentence._fields) - 1:  # of a version that had a column for each of two classes
                rest = [rest[:2], *rest[2:]]
            terms, *numbers = rest
            self.sentences.append(Sentence(text, occupation, tuple(map(tuple, terms)), *numbers))
