"""Paired tests over occupations. What cannot be tested says why instead of giving a number."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, wilcoxon
from statsmodels.stats.proportion import proportion_effectsize
from statsmodels.stats.weightstats import ttost_paired

from equipoise.evaluation.results import Equivalence
from equipoise.protocol.plural import plural

Array = NDArray[np.float64]

EXACT = 30
"""Up to this many occupations that differ, all sign patterns are counted."""
EXACT_RANKS = 200
"""Up to this many occupations that differ, all sign patterns of their ranks are counted, ties included."""
_DRAWS = 100_000
_LEVEL = 0.05


def sign_flip(differences: Array, seed: int = 0) -> tuple[float | None, str]:
    """Two-sided p-value of the mean difference under random signs, and a note (Fisher's randomisation test).

    Exact for up to EXACT differences other than 0, by meeting in the middle: the share of all 2^n patterns whose sum is
    at least as far from 0 as the observed one. Above that, of _DRAWS seeded patterns, the observed one counted in.
    Differences of 0 change no sum and are left out. The least p that n differences allow is 2^(1−n).
    """
    sizes = np.abs(differences[differences != 0])
    n = len(sizes)
    if len(differences) < 2:
        return None, "cannot be tested: fewer than two occupations in common"
    if n == 0:
        return None, "cannot be tested: the methods are equal in every occupation"
    observed = abs(float(differences.sum()))
    slack = 1e-9 * float(sizes.sum())  # sums that are equal on paper must count as equal
    note = ""
    if 2.0 ** (1 - n) > _LEVEL:
        note = f"with {plural(n, 'occupation')} that differ{'s' * (n == 1)} no p below {2.0 ** (1 - n):.3g} is possible"
    if n > EXACT:
        generator = np.random.default_rng(seed)
        extreme, step = 0, max(1, 4_000_000 // n)
        for first in range(0, _DRAWS, step):
            signs = 2.0 * generator.integers(0, 2, (min(step, _DRAWS - first), n), dtype=np.int8) - 1
            extreme += int((np.abs(signs @ sizes) >= observed - slack).sum())
        return (extreme + 1) / (_DRAWS + 1), note
    left, right = _all_sums(sizes[: n // 2]), np.sort(_all_sums(sizes[n // 2 :]))
    # The distribution is symmetric: both tails together are twice the upper one, and no more than everything.
    upper = len(right) - np.searchsorted(right, observed - slack - left, side="left")
    return min(2 * float(upper.sum()) / 2.0**n, 1.0), note


def _all_sums(sizes: Array) -> Array:
    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums - size, sums + size])
    return sums


def signed_rank(differences: Array) -> float | None:
    """Wilcoxon's signed-rank test, two-sided, differences of 0 left out; None where fewer than two are left.

    Exact for up to EXACT_RANKS differences: twice the share of all 2^n patterns of signs whose sum of positive ranks is
    at least as far out as the observed one, tied sizes having their mean rank. Above that its normal approximation.
    """
    # Ranks need equal sizes to be equal, not off by rounding.
    kept = np.round(differences, 12)
    kept = kept[kept != 0]
    if len(kept) < 2:
        return None
    if len(kept) > EXACT_RANKS:
        return float(wilcoxon(kept, method="asymptotic").pvalue)
    ranks = np.rint(2 * rankdata(np.abs(kept))).astype(int)  # doubled, so that mean ranks are whole
    chances = np.zeros(ranks.sum() + 1)  # of each sum of the ranks with a positive sign
    chances[0] = 1.0
    for rank in ranks:
        moved = np.zeros_like(chances)
        moved[rank:] = chances[: len(chances) - rank]
        chances = (chances + moved) / 2
    observed = int(ranks[kept > 0].sum())
    return min(1.0, 2 * min(float(chances[: observed + 1].sum()), float(chances[observed:].sum())))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction (1979, Scandinavian Journal of Statistics 6) of those that exist."""
    # Not statsmodels', which collects garbage at each call: a quarter of a second with many rows in memory.
    ordered = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    out: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, i) in enumerate(ordered):
        least = max(least, min((len(ordered) - rank) * p, 1.0))
        out[i] = least
    return out


def cohens_h(share_a: float, share_b: float) -> float:
    """2·asin√a − 2·asin√b (Cohen 1988, chapter 6): 0.2 small, 0.5 medium, 0.8 large; at most π."""
    return float(proportion_effectsize(share_a, share_b))


def cliffs_delta(a: Array, b: Array) -> float | None:
    """P(a > b) − P(a < b) over all pairs of values, −1 to 1 (Cliff 1993, Psychological Bulletin 114)."""
    if not len(a) or not len(b):
        return None
    ordered = np.sort(b)
    below = np.searchsorted(ordered, a, side="left").sum()
    above = (len(b) - np.searchsorted(ordered, a, side="right")).sum()
    return float((below - above) / (len(a) * len(b)))


def non_inferiority(a: Array, b: Array, margin: float) -> Equivalence:
    """Two one-sided paired t-tests of a − b against ±margin, where lower is better (Schuirmann 1987)."""
    differences = a - b
    if len(differences) < 2:
        return Equivalence(margin, None, None, None, None, "cannot be tested: fewer than two occupations in common")
    if float(np.ptp(differences)) <= 1e-12 * max(1.0, float(np.abs(differences).max())):
        note = "cannot be tested: the difference is the same in every occupation"
        return Equivalence(margin, None, None, None, None, note)
    p_equivalent, _, (_, p_upper, _) = ttost_paired(a, b, -margin, margin)
    p_worse, p_either = float(p_upper), float(p_equivalent)
    return Equivalence(margin, p_worse, p_either, p_worse < _LEVEL, p_either < _LEVEL, "")
