"""95 % intervals whose unit is the occupation, chosen for their coverage: benchmarks/coverage.py measures it.

Legend: O occupations, B bootstrap draws, K occupations of one draw, M statistics, n_O sentences per occupation.

Why not the usual percentile bootstrap: with 20 occupations it covers 91 to 93 %, and drawing sentences within drawn
occupations counts the variation of sentences twice, which covers up to 99 %. Studentising cures both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from equipoise.measures.shares import wilson

Array = NDArray[np.float64]

Z = 1.959963984540054
"""Within so many standard deviations lie 95 % of a normal distribution."""
LEAST_FOR_BOOTSTRAP = 6
"""Fewer occupations cannot be drawn in enough different ways; the t interval is used."""
_MOST_DRAWN = 2_000_000
"""Occupations × draws: with thousands of occupations fewer draws do, and memory has an end."""
LEAST_DESIGN_EFFECT = 0.25
"""Occupations that are more alike than independent rows could be say nothing about independence."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    note: str = ""

    @property
    def is_point(self) -> bool:
        """Whether it has no width: nothing differed that its width could come from, which says nothing of how sure the
        value is. Rounding leaves 1e-16 of a width."""
        return self.high - self.low <= 1e-9 * max(1.0, abs(self.low), abs(self.high))


NO_SPREAD = "no interval: occupations do not differ, so nothing tells how sure it is"
"""The note of a value whose interval would have no width."""


def clustered_wilson(successes_O: Array, n_O: Array) -> Interval:
    """Wilson's interval of the pooled share with n divided by the design effect, and Student's t for the normal.

    The design effect is the share's variance over occupations, by linearisation of the ratio Σ successes / Σ n, over
    that of independent rows. With t of O − 1 degrees of freedom this is the modified Wilson interval of Dean and Pagano
    (2015, Journal of Survey Statistics and Methodology 3). It works where a bootstrap has nothing to draw: at 0 and 1.
    """
    total, count = float(n_O.sum()), len(n_O)
    share = float(successes_O.sum()) / total
    if count < 2:
        ends = wilson(round(float(successes_O.sum())), round(total), Z)
        return Interval(*ends, "one occupation: rows as independent")
    independent = share * (1 - share) / max(total - 1, 1)
    effect = 1.0
    if independent > 0:
        effect = max(ratio_error(successes_O, n_O) ** 2 / independent, LEAST_DESIGN_EFFECT)
    z, n = student.ppf(0.975, count - 1), total / effect
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(min(max(float(centre - half), 0.0), share), max(min(float(centre + half), 1.0), share))


def ratio_error(sums_O: Array, n_O: Array) -> float:
    """Standard error of Σ sums / Σ n over occupations, by linearisation; sd / √O where all n are equal."""
    count = len(n_O)
    residuals = sums_O - n_O * (sums_O.sum() / n_O.sum())
    return float(np.sqrt(count / (count - 1) * (residuals**2).sum()) / n_O.sum())


def median(values: Array, occupation_of: NDArray[np.int64]) -> Interval:
    """The pooled median's interval: that of the share of rows at or below it, read off the quantiles (Woodruff 1952,
    JASA 47). `values` must not be empty."""
    count = int(occupation_of.max()) + 1
    n_O = np.bincount(occupation_of, minlength=count).astype(float)
    below_O = np.bincount(occupation_of, values <= np.median(values), minlength=count).astype(float)
    present = n_O > 0
    # Ties may put much more than half at or below; what is wanted is how far the share of one half may be off.
    share = clustered_wilson(below_O[present], n_O[present])
    centre = float(below_O.sum() / n_O.sum())
    low, high = 0.5 - (centre - share.low), 0.5 + (share.high - centre)
    ends = np.quantile(values, [max(low, 0.0), min(high, 1.0)], method="inverted_cdf")
    middle = float(np.median(values))
    return Interval(min(float(ends[0]), middle), max(float(ends[1]), middle), share.note)


def draws_made(wanted: int, occupations: int) -> int:
    """How many draws of a bootstrap are made of those asked for."""
    return max(200, min(wanted, _MOST_DRAWN // occupations))


class Resamples:
    """Means of sentences drawn anew within each occupation, from which draws of occupations are put together.

    means_OM: each occupation's means. drawn_OBM: the same for B draws of its n_O sentences with replacement. Everything
    follows from `seed`, whatever else is computed before.
    """

    def __init__(self, rows_M: Array, occupation_of: NDArray[np.int64], draws: int, seed: Sequence[int]) -> None:
        """rows_M: one row of M numbers for each sentence. occupation_of: 0 … O−1 for each, every one present."""
        generator = np.random.default_rng(seed)
        count = int(occupation_of.max()) + 1
        width = rows_M.shape[1]
        self.n_O = np.bincount(occupation_of, minlength=count).astype(float)
        draws = draws_made(draws, count)
        self.means_OM = np.empty((count, width))
        self.drawn_OBM = np.empty((count, draws, width))
        for o in range(count):
            own = rows_M[occupation_of == o]
            self.means_OM[o] = own.mean(0)
            # In parts of at most 2 million numbers, whatever n is.
            step = max(1, 2_000_000 // len(own))
            for first in range(0, draws, step):
                part = min(step, draws - first)
                index = generator.integers(0, len(own), (part, len(own)), dtype=np.int32)
                index += np.arange(part, dtype=np.int32)[:, None] * np.int32(len(own))
                times = np.bincount(index.ravel(), minlength=part * len(own)).reshape(part, len(own))
                self.drawn_OBM[o, first : first + part] = times @ own / len(own)


def drawn_occupations(count: int, draws: int, seed: int) -> NDArray[np.int64]:
    """(B, K) occupations with replacement, K = count."""
    return np.random.default_rng([seed, count]).integers(0, count, (draws, count))


def put_together(drawn_OBM: Array, chosen_BK: NDArray[np.int64]) -> Array:
    """(B, K, M): for each chosen occupation one of its draws of sentences, another one each time it is chosen."""
    draws, width = chosen_BK.shape
    which_BK = (np.arange(draws)[:, None] + 97 * np.arange(width)[None, :]) % drawn_OBM.shape[1]
    return drawn_OBM[chosen_BK, which_BK]


def two_level(
    means_OM: Array, n_O: Array, drawn_OBM: Array, seed: int, bounds: tuple[float, float] | None = None
) -> list[Interval | None]:
    """For each of M statistics the interval of Σ n·mean / Σ n by the two-level bootstrap-t; None for one occupation.

    Occupations are drawn with replacement and sentences within them; each draw is studentised by its own standard error
    over occupations, and the quantiles of that ratio replace Student's (Efron and Tibshirani 1993, chapter 12; two
    levels: Davison and Hinkley 1997, section 3.8). No end is nearer than Student's: where rare events make draws lumpy,
    the ratio's quantiles alone were measured to cover 91 %. Where occupations are few, or where so few of them differ
    that draws lose their spread, Student's quantiles alone are used.
    """
    count, draws = len(n_O), drawn_OBM.shape[1]
    if count < 2:
        return [None] * means_OM.shape[1]
    totals = n_O.sum()
    centre_M = (n_O[:, None] * means_OM).sum(0) / totals
    residuals_OM = n_O[:, None] * (means_OM - centre_M)
    error_M = np.sqrt(count / (count - 1) * (residuals_OM**2).sum(0)) / totals
    chosen_BK = drawn_occupations(count, draws, seed)
    n_BK = n_O[chosen_BK]
    totals_B = n_BK.sum(1)
    normal = float(student.ppf(0.975, count - 1))
    out: list[Interval | None] = []
    for m in range(means_OM.shape[1]):
        centre, error = float(centre_M[m]), float(error_M[m])
        tiny = 1e-12 * max(1.0, abs(centre))
        slots_BK = put_together(drawn_OBM[:, :, m : m + 1], chosen_BK)[..., 0]
        theta_B = (n_BK * slots_BK).sum(1) / totals_B
        residuals_BK = n_BK * (slots_BK - theta_B[:, None])
        errors_B = np.sqrt(count / (count - 1) * (residuals_BK**2).sum(1)) / totals_B
        usable = errors_B > tiny
        if error <= tiny:
            found = Interval(centre, centre, NO_SPREAD)
        elif count < LEAST_FOR_BOOTSTRAP or usable.mean() < 0.995:
            few = "few occupations" if count < LEAST_FOR_BOOTSTRAP else "few occupations differ"
            found = Interval(centre - normal * error, centre + normal * error, f"{few}: Student's t")
        else:
            ratio = (theta_B[usable] - centre) / errors_B[usable]
            low, high = np.quantile(ratio, [0.025, 0.975])
            found = Interval(centre - max(float(high), normal) * error, centre - min(float(low), -normal) * error)
        if bounds is not None:
            found = Interval(max(found.low, bounds[0]), min(found.high, bounds[1]), found.note)
        out.append(found)
    return out


OUTSIDE = "no interval: of so few sentences the number counted is surely too small"
"""The note of a jackknife's interval that had to be stretched to the plug-in value."""


def jackknife(statistic: Callable[[Array], Array], sums_OM: Array, most: float) -> Interval | None:
    """The interval of exp(statistic(Σ sums)) by leaving out one occupation at a time; None for one occupation.

    `statistic` takes (…, M) sums to (…) numbers, on a logarithmic scale: entropies. Plug-in entropies are too small,
    the more so the fewer the rows; the jackknife removes that bias (Quenouille 1956, Biometrika 43) and Student's t
    does the rest. The interval reaches to the plug-in value where that lies outside, and to `most` at the utmost.
    """
    kept = sums_OM[sums_OM.sum(1) > 0]
    count = len(kept)
    if count < 2:
        return None
    total = kept.sum(0)
    theta = float(statistic(total))
    left_out = statistic(total - kept)
    corrected = count * theta - (count - 1) * float(left_out.mean())
    error = float(np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum()))
    reach = float(student.ppf(0.975, count - 1)) * error
    low, high = np.exp(min(corrected - reach, theta)), np.exp(max(corrected + reach, theta))
    note = "" if corrected - reach - 1e-9 <= theta <= corrected + reach + 1e-9 else OUTSIDE
    return Interval(max(float(low), 1.0), min(float(high), most), note)


def mean_with_t(values: Sequence[float]) -> Interval | None:
    """Student's interval of a mean over occupations; None for fewer than two."""
    if len(values) < 2:
        return None
    centre, error = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    reach = float(student.ppf(0.975, len(values) - 1)) * error
    return Interval(centre - reach, centre + reach)
