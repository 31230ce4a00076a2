"""The metrics that depend on how many rows there are: of any rows of a method, and at equal n."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from equipoise.evaluation import diversity
from equipoise.evaluation.catalogue import depends_on_n
from equipoise.evaluation.counted import Sample
from equipoise.evaluation.results import Estimate
from equipoise.measures.variety import effective, pair_counts

SUBSAMPLES = 10
"""Draws that a metric at equal n is averaged over."""


def dependent_on_n(sample: Sample, rows: NDArray[np.int64]) -> dict[str, float | None]:
    """The metrics that depend on how many rows there are, of the given rows."""
    pairs = pair_counts(sample.pairs[i] for i in rows)
    plain, masked = ([words[i] for i in rows] for words in sample.words_N)
    out: dict[str, float | None] = {
        "pairs/unique": float(len(pairs)),
        "pairs/effective": effective(pairs) if pairs else None,
        "unique_texts": len({sample.rows[i].row.measured for i in rows}) / len(rows),
        "distinct/1": diversity.distinct(plain, 1),
        "distinct/2": diversity.distinct(plain, 2),
        "distinct/3": diversity.distinct(plain, 3),
        "masked/unique": len({tuple(words) for words in masked}) / len(rows),
        "masked/distinct_2": diversity.distinct(masked, 2),
        **_divergences(sample, rows),
        **_study(sample, rows),
    }
    assert out.keys() == set(depends_on_n(sample.task))
    return out


def _divergences(sample: Sample, rows: NDArray[np.int64]) -> dict[str, float | None]:
    terms_NT, occupation_of = sample.terms_NT[rows], sample.occupation_of[rows]
    terms_OT = np.zeros((len(sample.occupations), terms_NT.shape[1]))
    np.add.at(terms_OT, occupation_of, terms_NT)
    terms_T = terms_OT.sum(0)
    named = zip(sample.task.lexicon.names, sample.of_class, strict=True)
    return {
        **{f"jsd/uniform_{name}": diversity.to_uniform(terms_T[own]) for name, own in named},
        "jsd/occupations": diversity.between(terms_OT),
    }


def _study(sample: Sample, rows: NDArray[np.int64]) -> dict[str, float | None]:
    hits_NT = sample.substrings_NT[rows]
    bits = [float(diversity.entropy(hits_NT[:, own].astype(float).sum(0))) for own in sample.of_class]
    names = sample.task.lexicon.names
    return {
        **{f"study/entropy_{name}": own for name, own in zip(names, bits, strict=True)},
        "study/entropy": sum(bits) / len(bits),
        "study/pairs": float(_combinations(hits_NT, sample.of_class)),
    }


def _combinations(hits_NT: NDArray[np.bool_], of_class: Sequence[slice]) -> int:
    """How many different combinations of a term of each class stand in one text, all of its terms taken."""
    found: set[tuple[int, ...]] = set()
    for hits in np.unique(hits_NT, axis=0):
        found.update(product(*(np.flatnonzero(hits[own]).tolist() for own in of_class)))
    return len(found)


def at_equal_n(sample: Sample, n: int) -> dict[str, Estimate]:
    """The same at n rows: the mean over SUBSAMPLES seeded subsamples, or all rows where there are no more."""
    if n >= len(sample.rows):
        draws = [dependent_on_n(sample, np.arange(len(sample.rows)))]
        note = "all rows"
    else:
        draws = [dependent_on_n(sample, subsample(sample, n, sample.seed + i)) for i in range(SUBSAMPLES)]
        note = f"mean of {SUBSAMPLES} subsamples"
    out = {}
    for key in draws[0]:
        values = [v for draw in draws if (v := draw[key]) is not None]
        mean = float(np.mean(values)) if values else None
        out[key] = Estimate(mean, n=n, note=note if values else "nothing to count")
    return out


def subsample(sample: Sample, n: int, seed: int) -> NDArray[np.int64]:
    """n rows at random without replacement, the occupations in their proportions; all rows where there are no more."""
    generator = np.random.default_rng([seed, 1])
    order = generator.permutation(len(sample.rows))
    taken = np.zeros(len(sample.occupations))
    share = np.empty(len(order))
    for i in order:
        o = sample.occupation_of[i]
        share[i] = (taken[o] + generator.random()) / sample.n_O[o]
        taken[o] += 1
    return np.sort(np.argsort(share, kind="stable")[:n])
