"""The rows of one method with everything about them that metrics count.

Legend: N rows, O occupations, K classes, M row-wise metrics, T terms.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from equipoise.evaluation import diversity
from equipoise.evaluation.intervals import Array, Resamples
from equipoise.evaluation.measure import Measured
from equipoise.protocol.task import Task


class Fluency(NamedTuple):
    """One judge's view of the rows: nats per token (nan where a text has no token to score) and scored tokens."""

    nll_N: Array
    tokens_N: Array


@dataclass(frozen=True)
class Sample:
    """The rows of one method, ready to be counted."""

    rows: Sequence[Measured]
    task: Task
    judges: dict[str, Fluency]
    acceptable: dict[str, Array]
    """By classifier: 1 or 0 for each row."""
    draws: int
    seed: int
    """Of everything that is drawn; draws of sentences depend on the method's name too."""
    name: str = ""

    @cached_property
    def occupations(self) -> tuple[str, ...]:
        """The task's in its order, then others as they come."""
        present = dict.fromkeys(m.row.occupation for m in self.rows)
        own = self.task.names
        return tuple([o for o in own if o in present] + [o for o in present if o not in own])

    @cached_property
    def occupation_of(self) -> NDArray[np.int64]:
        place = {occupation: i for i, occupation in enumerate(self.occupations)}
        return np.array([place[m.row.occupation] for m in self.rows], dtype=np.int64)

    @cached_property
    def n_O(self) -> Array:
        return np.bincount(self.occupation_of, minlength=len(self.occupations)).astype(float)

    @cached_property
    def terms_NK(self) -> NDArray[np.int64]:
        """How many different terms of each class a row holds."""
        return np.array([[len(terms) for terms in m.found.reward.terms] for m in self.rows], dtype=np.int64)

    @cached_property
    def row_metrics(self) -> dict[str, Array]:
        """(N,) numbers whose mean is the metric."""
        found = [m.found for m in self.rows]
        present_NK = self.terms_NK > 0
        count_N = present_NK.sum(1)
        names = self.task.lexicon.names
        only = {f"{name}_only": present_NK[:, k] & (count_N == 1) for k, name in enumerate(names)}
        columns = {
            "strict": np.array([f.strict for f in found]),
            "both": present_NK.all(1),
            "either": present_NK.any(1),
            **({f"{name}_any": present_NK[:, k] for k, name in enumerate(names)} if len(names) > 2 else {}),
            **(only if len(names) > 1 else {}),
            "neither": count_N == 0,
            "in_length": np.array([f.in_length for f in found]),
            "complete": np.array([f.complete for f in found]),
            "words": np.array([f.reward.words for f in found]),
            "reward": np.array([f.reward.reward for f in found]),
            "terms": self.terms_NK.sum(1),
            "stuffed": (self.terms_NK > 1).any(1),
            "repeated": np.array([f.repeated for f in found]),
            **{f"acceptable@{name}": values for name, values in self.acceptable.items()},
        }
        return {key: column.astype(float) for key, column in columns.items()}

    @cached_property
    def resamples(self) -> Resamples:
        return Resamples(np.stack(list(self.row_metrics.values()), 1), self.occupation_of, self.draws, self.own_seed)

    @property
    def own_seed(self) -> list[int]:
        return [self.seed, zlib.crc32(self.name.encode("utf-8", "surrogatepass"))]

    @cached_property
    def of_class(self) -> list[slice]:
        """Where the terms of each class stand among all terms."""
        ends = np.cumsum([0, *self.task.lexicon.sizes]).tolist()
        return [slice(first, last) for first, last in pairwise(ends)]

    @cached_property
    def terms_NT(self) -> NDArray[np.bool_]:
        place = {term: i for i, term in enumerate(self.task.lexicon.terms)}
        out = np.zeros((len(self.rows), len(place)), dtype=bool)
        for i, m in enumerate(self.rows):
            for terms in m.found.reward.terms:
                out[i, [place[term] for term in terms]] = True
        return out

    @cached_property
    def substrings_NT(self) -> NDArray[np.bool_]:
        known: dict[str, tuple[bool, ...]] = {}
        for m in self.rows:
            if m.row.measured not in known:
                known[m.row.measured] = diversity.substrings(m.row.measured, self.task.lexicon.terms)
        return np.array([known[m.row.measured] for m in self.rows], dtype=bool)

    @cached_property
    def pairs(self) -> list[tuple[str, ...] | None]:
        """The first term of each class in each row; None where a class is missing."""
        return [m.found.reward.first for m in self.rows]

    @cached_property
    def pair_of(self) -> NDArray[np.int64]:
        """(N,) number of each row's pair, or −1: with one or two classes its place in the flattened table of all of
        them, with more, where that may be huge, its place among those that occur."""
        places = [{term: i for i, term in enumerate(terms)} for _, terms in self.task.classes]
        sizes = self.task.lexicon.sizes

        def flattened(pair: tuple[str, ...]) -> int:
            number = 0
            for own, size, term in zip(places, sizes, pair, strict=True):
                number = number * size + own[term]
            return number

        numbers = [-1 if pair is None else flattened(pair) for pair in self.pairs]
        if len(sizes) > 2:
            order = {number: i for i, number in enumerate(sorted({*numbers} - {-1}))}
            numbers = [order.get(number, -1) for number in numbers]
        return np.array(numbers, dtype=np.int64)

    @cached_property
    def pair_numbers(self) -> int:
        """How many numbers `pair_of` may have."""
        return self.task.pair_count if len(self.task.classes) <= 2 else int(self.pair_of.max(initial=-1)) + 1

    @cached_property
    def words_N(self) -> tuple[list[list[int]], list[list[int]]]:
        """Each text's words as numbers, as they are and with terms and occupation masked."""
        numbers: dict[str, int] = {}
        mask = diversity.Mask(self.task)
        known: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        for m in self.rows:
            key = (m.row.measured, m.row.occupation)
            if key not in known:
                plain, masked = diversity.words_of(key[0]), diversity.words_of(mask(*key))
                known[key] = (
                    [numbers.setdefault(word, len(numbers)) for word in plain],
                    [numbers.setdefault(word, len(numbers)) for word in masked],
                )
        both = [known[m.row.measured, m.row.occupation] for m in self.rows]
        return [plain for plain, _ in both], [masked for _, masked in both]
