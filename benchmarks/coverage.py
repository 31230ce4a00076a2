"""How often the 95 % intervals of `equipoise evaluate` hold the truth, by simulation: python benchmarks/coverage.py

Each line is one kind of data: 20 occupations (unless it says otherwise) drawn anew each time from a population, and
sentences within them. The truth is the population's. Nominal is 95 %.
"""

import sys
from collections.abc import Callable, Iterator

import numpy as np
from scipy.special import expit

from equipoise.evaluation.association import Mentions, of_deviation
from equipoise.evaluation.diversity import entropy
from equipoise.evaluation.intervals import Array, Resamples, clustered_wilson, jackknife, median, two_level
from equipoise.evaluation.mixed_logit import mixed_logit
from equipoise.evaluation.significance import sign_flip

Draw = Callable[[np.random.Generator], Array]


def beta(mean: float, sd: float, count: int) -> Draw:
    size = mean * (1 - mean) / sd**2 - 1
    return lambda rng: rng.beta(mean * size, (1 - mean) * size, count)


def same(mean: float, count: int) -> Draw:
    return lambda rng: np.full(count, mean)


SHARES: dict[str, tuple[Draw, int, float]] = {
    "alike, 0.5": (same(0.5, 20), 250, 0.5),
    "alike, 0.95": (same(0.95, 20), 250, 0.95),
    "alike, 0.995": (same(0.995, 20), 250, 0.995),
    "alike, 0.9, 10 sentences": (same(0.9, 20), 10, 0.9),
    "alike, 0.7, 5 occupations": (same(0.7, 5), 250, 0.7),
    "different, 0.9 ± 0.08": (beta(0.9, 0.08, 20), 250, 0.9),
    "different, 0.5 ± 0.2": (beta(0.5, 0.2, 20), 250, 0.5),
    "different, 0.05 ± 0.05": (beta(0.05, 0.05, 20), 250, 0.05),
    "different, 0.99 ± 0.01": (beta(0.99, 0.01, 20), 250, 0.99),
    "different, 0.7 ± 0.15, 5 occupations": (beta(0.7, 0.15, 5), 250, 0.7),
}


def of_shares(draw: Draw, n: int, truth: float, times: int, rng: np.random.Generator) -> float:
    """Clustered Wilson."""
    held = 0
    for _ in range(times):
        shares = draw(rng)
        found = clustered_wilson(rng.binomial(n, shares).astype(float), np.full(len(shares), float(n)))
        held += found.low <= truth <= found.high
    return held / times


MEANS: dict[str, tuple[float, bool]] = {
    "alike": (0.0, False),
    "a little different": (0.05, False),
    "different": (0.3, False),
    "different, skewed": (0.3, True),
}


def _sentences(between: float, skewed: bool, n: int, rng: np.random.Generator) -> tuple[Array, np.ndarray]:
    """Skewed values around each occupation's own mean, all in all 3."""
    shift = rng.exponential(1, 20) - 1 if skewed else rng.standard_normal(20)
    values = 3 + between * shift[:, None] + 0.8 * (rng.exponential(1, (20, n)) - 1)
    return values.ravel(), np.repeat(np.arange(20), n)


def of_means(between: float, skewed: bool, times: int, rng: np.random.Generator, n: int = 50) -> float:
    """Two-level bootstrap-t."""
    held = 0
    for i in range(times):
        values, occupation_of = _sentences(between, skewed, n, rng)
        drawn = Resamples(values[:, None], occupation_of, 500, [i])
        (found,) = two_level(drawn.means_OM, drawn.n_O, drawn.drawn_OBM, i)
        assert found is not None
        held += found.low <= 3 <= found.high
    return held / times


def of_medians(between: float, times: int, rng: np.random.Generator, n: int = 50) -> float:
    """Woodruff; occupations' means are normal, so the median over all is that of a known mixture, taken from 2 million
    sentences."""
    many = np.random.default_rng(0)
    skew = 0.8 * (many.exponential(1, 2_000_000) - 1)
    truth = float(np.median(3 + between * many.standard_normal(2_000_000) + skew))
    held = 0
    for _ in range(times):
        values, occupation_of = _sentences(between, False, n, rng)
        found = median(values, occupation_of)
        held += found.low <= truth <= found.high
    return held / times


def of_differences(between: float, times: int, rng: np.random.Generator, n: int = 50) -> tuple[float, float]:
    """Two-level bootstrap-t of paired differences of shares, and how often the sign-flip test rejects equal methods."""
    held = rejected = 0
    for i in range(times):
        shares = np.clip(0.8 + between * rng.standard_normal(20), 0, 1)
        a, b = (rng.random((20, n)) < shares[:, None] for _ in range(2))
        occupation_of = np.repeat(np.arange(20), n)
        drawn = [Resamples(x.reshape(-1, 1).astype(float), occupation_of, 500, [i, k]) for k, x in enumerate((a, b))]
        differences = drawn[0].means_OM - drawn[1].means_OM
        (found,) = two_level(differences, np.ones(20), drawn[0].drawn_OBM - drawn[1].drawn_OBM, i)
        assert found is not None
        held += found.low <= 0 <= found.high
        p, _ = sign_flip(differences[:, 0])
        rejected += p is not None and p <= 0.05
    return held / times, rejected / times


def _nats(counts: Array) -> Array:
    return entropy(counts) * np.log(2)


PAIRS: dict[str, tuple[Array, float]] = {
    "uniform, alike": (np.full(100, 0.01), 0),
    "uniform, different": (np.full(100, 0.01), 30),
    "Zipf, alike": (1 / np.arange(1, 101) / (1 / np.arange(1, 101)).sum(), 0),
    "Zipf, different": (1 / np.arange(1, 101) / (1 / np.arange(1, 101)).sum(), 30),
    "five pairs, alike": (np.array([0.6, 0.2, 0.1, 0.05, 0.05]), 0),
    "five pairs, different": (np.array([0.6, 0.2, 0.1, 0.05, 0.05]), 30),
}


def of_effective(shares: Array, alike: float, times: int, rng: np.random.Generator, n: int = 250) -> float:
    """Jackknife."""
    truth, held = float(2 ** entropy(shares)), 0
    for _ in range(times):
        own = [np.maximum(rng.dirichlet(shares * alike), 0) if alike else shares for _ in range(20)]
        counts = np.array([rng.multinomial(n, p / p.sum()) for p in own], dtype=float)
        found = jackknife(_nats, counts, 100)
        assert found is not None
        held += found.low <= truth + 1e-9 and truth - 1e-9 <= found.high
    return held / times


SPREADS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng: rng.normal(0, 1, 20), 1.0),
    "normal, 5 occupations": (lambda rng: rng.normal(0, 1, 5), 1.0),
    "Laplace": (lambda rng: rng.laplace(0, 1, 20), 2**0.5),
    "exponential": (lambda rng: rng.exponential(1, 20), 1.0),
}


def of_spreads(draw: Draw, truth: float, times: int, rng: np.random.Generator) -> float:
    """Jackknife of the logarithm of a standard deviation over occupations."""
    found = [of_deviation(draw(rng)) for _ in range(times)]
    return sum(each is not None and each.low <= truth <= each.high for each in found) / times


def of_log_odds(holds: float, share: float, times: int, rng: np.random.Generator, n: int = 250) -> float:
    """Delta, of each of ten occupations that are alike: a sentence holds a term with probability `holds`, of the class
    with probability `share`, and three in ten of those hold one of either side."""
    truth = float(np.log((share + 0.3 * (1 - share)) / (1 - share + 0.3 * share)))
    held = 0
    for _ in range(times):
        some, first, both = (rng.random(10 * n) < p for p in (holds, share, 0.3))
        x_N, y_N = (some & (own | both) for own in (first, ~first))
        own = Mentions(x_N.astype(float), y_N.astype(float), np.repeat(np.arange(10), n), 10)
        held += sum(each.low <= truth <= each.high for each in own.intervals())
    return held / (10 * times)


def of_mixed_logits(count: int, times: int, rng: np.random.Generator, n: int = 250) -> tuple[float, float]:
    """Of equal methods: how often the interval of the log-odds holds 0, and how often the test rejects."""
    held = rejected = 0
    for _ in range(times):
        u, v = rng.normal(0, 1, count), rng.normal(0, 0.5, count)
        successes = rng.binomial(n, expit(np.stack([u + v / 2, u - v / 2], 1))).astype(float)
        found = mixed_logit(successes, np.full((count, 2), float(n)))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0 <= found.high
        rejected += found.p <= 0.05
    return held / times, rejected / times


def lines(times: int, seed: int = 0) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for name, (draw, n, truth) in SHARES.items():
        yield f"share, {name}: {of_shares(draw, n, truth, 5 * times, rng):.1%}"
    for name, (between, skewed) in MEANS.items():
        yield f"mean, {name}: {of_means(between, skewed, times, rng):.1%}"
    for between in (0.0, 0.3):
        yield f"median, occupations ± {between}: {of_medians(between, times, rng):.1%}"
    for between in (0.0, 0.1):
        covered, rejected = of_differences(between, times, rng)
        yield f"difference of equal methods, occupations ± {between}: {covered:.1%}; rejected {rejected:.1%}"
    for name, (shares, alike) in PAIRS.items():
        yield f"effective pairs, {name}: {of_effective(shares, alike, times, rng):.1%}"
    for name, (draw, truth) in SPREADS.items():
        yield f"spread, {name}: {of_spreads(draw, truth, 5 * times, rng):.1%}"
    for holds, share in ((0.05, 0.1), (0.2, 0.3), (1.0, 0.5)):
        yield f"log-odds, {holds:.0%} hold a term: {of_log_odds(holds, share, times, rng):.1%}"
    for count in (20, 5):
        covered, rejected = of_mixed_logits(count, times, rng)
        yield f"mixed logit of equal methods, {count} occupations: {covered:.1%}; rejected {rejected:.1%}"


if __name__ == "__main__":
    for line in lines(int(sys.argv[1]) if len(sys.argv) > 1 else 1000):
        print(line, flush=True)
