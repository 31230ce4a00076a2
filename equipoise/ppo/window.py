"""The last sentences of a run, as far as the running measures look back; part of every checkpoint."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


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
