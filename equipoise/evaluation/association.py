"""How strongly occupations are associated with a class of terms: log-odds of mentions, their spread, before and after.

Legend: N rows, O occupations. x_N, y_N: a row's different terms of the class and of the others.

The log-odds of an occupation are smoothed by an informative Dirichlet prior: `PRIOR` mentions in the proportion of all
occupations together (Monroe, Colaresi and Quinn 2008, Political Analysis 16(4), eq. 15), so that an occupation
without mentions has the overall log-odds and nothing is infinite.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from equipoise.evaluation.intervals import Array, Interval, Z

PRIOR = 1.0
"""Mentions that the prior weighs as much as: the half for each of two outcomes of Jeffreys' prior."""
SHUFFLES = 200


class Mentions(NamedTuple):
    """Mentions of a class and of the others in every row, and whose occupation each row is of."""

    x_N: Array
    y_N: Array
    occupation_of: NDArray[np.int64]
    occupations: int

    @property
    def totals(self) -> tuple[float, float]:
        return float(self.x_N.sum()), float(self.y_N.sum())

    @property
    def known(self) -> bool:
        """Whether both kinds of mentions occur, without which there are no odds."""
        return min(self.totals) > 0

    def sums(self) -> tuple[Array, Array]:
        """(O,) mentions of the class and of the others."""
        x_O, y_O = (np.bincount(self.occupation_of, own, minlength=self.occupations) for own in (self.x_N, self.y_N))
        return np.asarray(x_O, dtype=np.float64), np.asarray(y_O, dtype=np.float64)

    def log_odds(self) -> Array:
        """(O,) smoothed log-odds, in nats, of a mention of the class against one of the others."""
        return self._log_odds(*self.sums())

    def dealt(self, generator: np.random.Generator) -> Array:
        """(SHUFFLES,) spreads of the rows dealt out to the occupations at random. They depend neither on the order of
        the rows or occupations, nor on which side is called the class."""
        one, other = (
            rows_N2[np.lexsort(rows_N2.T[::-1])]
            for rows_N2 in (np.stack([self.x_N, self.y_N], 1), np.stack([self.y_N, self.x_N], 1))
        )
        x_N, y_N = min(one, other, key=lambda rows_N2: rows_N2.ravel().tolist()).T
        count, ordered = self.occupations, self._replace(x_N=x_N, y_N=y_N)
        labels_N = np.repeat(np.arange(count), np.sort(np.bincount(self.occupation_of, minlength=count)))
        found = []
        at_once = min(SHUFFLES, max(1, 2_000_000 // len(labels_N)))
        for first in range(0, SHUFFLES, at_once):
            draws = min(at_once, SHUFFLES - first)
            dealt_BN = generator.permuted(np.tile(labels_N, (draws, 1)), axis=1) + count * np.arange(draws)[:, None]
            sums = (np.bincount(dealt_BN.ravel(), np.tile(own, draws), draws * count) for own in (x_N, y_N))
            x_BO, y_BO = (np.asarray(each, dtype=np.float64).reshape(draws, count) for each in sums)
            found.append(ordered._log_odds(x_BO, y_BO).std(axis=1, ddof=1))
        return np.concatenate(found)

    def deviation(self) -> float:
        """The standard deviation over occupations of their log-odds."""
        return float(self.log_odds().std(ddof=1))

    def _smoothed(self, x_O: Array, y_O: Array) -> tuple[Array, Array]:
        x, y = self.totals
        return x_O + PRIOR * x / (x + y), y_O + PRIOR * y / (x + y)

    def _log_odds(self, x_O: Array, y_O: Array) -> Array:
        """Of these mentions in place of its own, in any shape."""
        above, below = self._smoothed(x_O, y_O)
        return np.asarray(np.log(above / below))

    def intervals(self) -> list[Interval]:
        """Of each occupation's log-odds, its rows taken as independent, by linearisation: the mentions of one row
        belong together. To their variance comes that of the prior's mentions, as in Monroe's eq. 20, without which an
        occupation that never mentions one side would pass for the surest of all."""
        x_O, y_O = self._smoothed(*self.sums())
        values_O, (x, y) = np.log(x_O / y_O), self.totals
        prior_O = PRIOR / (x + y) * (x / x_O**2 + y / y_O**2)
        residuals_N = self.x_N / x_O[self.occupation_of] - self.y_N / y_O[self.occupation_of]
        out: list[Interval] = []
        for o in range(self.occupations):
            own = residuals_N[self.occupation_of == o]
            seen = len(own) * float(own.var(ddof=1)) if len(own) > 1 else 0.0
            reach, value = Z * float(np.sqrt(seen + prior_O[o])), float(values_O[o])
            out.append(Interval(value - reach, value + reach))
        return out


class Spread(NamedTuple):
    """How far apart occupations are, in nats."""

    value: float
    """Standard deviation over occupations of their log-odds."""
    interval: Interval | None
    chance: float
    """Root mean square of the same with the rows dealt out to occupations at random."""
    p: float
    """Share of such deals, this one counted, whose spread is as large."""

    @property
    def beyond_chance(self) -> float:
        """The spread without what chance adds to it; 0 where it is no larger."""
        return float(np.sqrt(max(0.0, self.value**2 - self.chance**2)))


def spread(mentions: Mentions, seed: list[int]) -> Spread | None:
    """None with fewer than two occupations, or where a kind of mention does not occur."""
    if mentions.occupations < 2 or not mentions.known:
        return None
    values_O, value = mentions.log_odds(), mentions.deviation()
    dealt = mentions.dealt(np.random.default_rng([*seed, 3]))
    p = (1 + int((dealt >= value - 1e-12).sum())) / (SHUFFLES + 1)
    return Spread(value, of_deviation(values_O), float(np.sqrt((dealt**2).mean())), p)


def of_deviation(values_O: Array) -> Interval | None:
    """The interval of a standard deviation by the jackknife of its logarithm (Miller 1968, Annals of Mathematical
    Statistics 39), which needs no normal distribution; None for fewer than four values, or where leaving one out leaves
    no spread."""
    count = len(values_O)
    if count < 4:
        return None
    left_out = np.array([np.delete(values_O, o).std(ddof=1) for o in range(count)])
    whole = values_O.std(ddof=1)
    if min(whole, left_out.min()) <= 1e-12:
        return None
    pseudo = count * np.log(whole) - (count - 1) * np.log(left_out)
    centre, error = float(pseudo.mean()), float(pseudo.std(ddof=1) / np.sqrt(count))
    reach = float(student.ppf(0.975, count - 1)) * error
    low, high = np.exp(centre - reach), np.exp(centre + reach)
    return Interval(min(float(low), float(whole)), max(float(high), float(whole)))


def correlation(before_O: Array, after_O: Array) -> tuple[float, Interval | None] | None:
    """Pearson's of the same occupations' log-odds under two methods, with Fisher's interval (Fisher 1921, Metron 1),
    for which at least four are needed; None for fewer than three, or where one does not vary."""
    if len(before_O) < 3 or min(np.ptp(before_O), np.ptp(after_O)) <= 1e-12:
        return None
    r = float(np.clip(np.corrcoef(before_O, after_O)[0, 1], -1.0, 1.0))
    if len(before_O) < 4 or abs(r) > 1 - 1e-12:
        return r, None
    reach = Z / np.sqrt(len(before_O) - 3)
    low, high = np.tanh(np.arctanh(r) - reach), np.tanh(np.arctanh(r) + reach)
    return r, Interval(float(low), float(high))
