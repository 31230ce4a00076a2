"""The mixed logit against integrals taken by brute force, and against what the numbers were drawn from."""

import numpy as np
import pytest
from scipy.special import expit, logsumexp

from equipoise.evaluation.compare import compare
from equipoise.evaluation.intervals import Array
from equipoise.evaluation.mixed_logit import LARGEST, Likelihood, _fitted, mixed_logit
from equipoise.evaluation.summary import occupation_estimates
from equipoise.protocol.task import PROTOCOL
from tests.evaluation.files import sample


def drawn(seed: int, occupations: int, n: int, point: tuple[float, float, float, float]) -> tuple[Array, Array]:
    """Successes and sentences of both methods, from (μ, δ, σ, τ)."""
    generator = np.random.default_rng(seed)
    mu, delta, sigma, tau = point
    u, v = generator.normal(0, sigma, occupations), generator.normal(0, tau, occupations)
    shares_OM = expit(np.stack([mu + u + (delta + v) / 2, mu + u - (delta + v) / 2], 1))
    return generator.binomial(n, shares_OM).astype(float), np.full((occupations, 2), float(n))


def brute_force(k_OM: Array, n_OM: Array, point: tuple[float, float, float, float]) -> float:
    """By the trapezoidal rule on a fine grid, on which a smooth integrand that vanishes at the ends is exact."""
    mu, delta, sigma, tau = point
    x, y = np.meshgrid(*[np.arange(-8, 8, 0.02)] * 2)
    total = 0.0
    for k_M, n_M in zip(k_OM, n_OM, strict=True):
        log = -(x * x + y * y) / 2 + 2 * np.log(0.02) - np.log(2 * np.pi)
        for k, n, sign in zip(k_M, n_M, (0.5, -0.5), strict=True):
            eta = mu + sigma * x + sign * (delta + tau * y)
            log = log + k * eta - n * np.logaddexp(0, eta)
        total += float(logsumexp(log))
    return total


@pytest.mark.parametrize("point", [(0.2, 0.7, 0.9, 0.6), (-2.0, -1.0, 1.5, 0.2), (0.0, 0.0, 0.3, 1.0)])
def test_the_likelihood_is_the_integral_over_both_effects(point: tuple[float, float, float, float]) -> None:
    k_OM, n_OM = drawn(0, 2, 30, (0.3, 0.8, 1.0, 0.5))
    value, gradient = Likelihood(k_OM, n_OM)(np.array(point))
    assert value == pytest.approx(brute_force(k_OM, n_OM, point), abs=2e-5)
    likelihood = Likelihood(k_OM, n_OM)
    for i in range(4):
        step = np.eye(4)[i] * 1e-5
        slope = (likelihood(np.array(point) + step)[0] - likelihood(np.array(point) - step)[0]) / 2e-5
        assert gradient[i] == pytest.approx(slope, abs=1e-3)


def test_the_likelihood_does_not_depend_on_where_it_was_taken_before() -> None:
    k_OM, n_OM = drawn(3, 6, 200, (0.0, 1.0, 1.0, 0.5))
    point, far = np.array([0.1, 0.8, 0.7, 0.4]), np.array([-4.0, 6.0, 3.0, 3.0])
    used = Likelihood(k_OM, n_OM)
    used(far)
    assert used(point)[0] == pytest.approx(Likelihood(k_OM, n_OM)(point)[0], abs=1e-6)


@pytest.mark.parametrize("point", [(7.8, 0.0, 12.0, 11.5), (-9.0, 8.4, 11.9, 10.9), (0.0, 2.0, 11.0, 0.1)])
def test_nor_does_it_where_effects_are_strong(point: tuple[float, float, float, float]) -> None:
    """Newton's steps to the likeliest effects then lead from one side to the other and back."""
    k_OM, n_OM = drawn(4, 20, 250, (-3.0, 1.0, 4.0, 3.0))
    used = Likelihood(k_OM, n_OM)
    fresh = used(np.array(point))[0]
    for far in ((-4.0, 6.0, 3.0, 3.0), (12.0, -24.0, 12.0, 12.0), (0.0, 0.0, 0.0, 0.0)):
        used(np.array(far))
        assert used(np.array(point))[0] == pytest.approx(fresh, abs=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_a_test_of_methods_that_are_far_apart_somewhere_does_not_depend_on_which_comes_first(seed: int) -> None:
    """Where a fit ended beside the maximum, p was 0.0002 in one order and 0.24 in the other, with no word of it."""
    generator = np.random.default_rng(seed)
    k_OM, n_OM = drawn(seed, int(generator.integers(5, 20)), int(generator.integers(50, 300)), (-4.0, 0.5, 3.0, 2.0))
    k_OM[0] = n_OM[0, 0], 0
    a, b = mixed_logit(k_OM, n_OM), mixed_logit(k_OM[:, ::-1], n_OM[:, ::-1])
    assert a is not None and b is not None
    assert a.p == pytest.approx(b.p, abs=2e-3) and 0 <= a.p <= 1
    assert a.log_odds is not None and b.log_odds is not None
    assert a.log_odds == pytest.approx(-b.log_odds, abs=0.05)


def test_what_the_numbers_were_drawn_from_is_found() -> None:
    found = mixed_logit(*drawn(1, 300, 200, (0.5, 0.8, 1.0, 0.5)))
    assert found is not None
    assert found.log_odds == pytest.approx(0.8, abs=0.1)
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.8 < found.high
    assert found.sd_occupation == pytest.approx(1.0, abs=0.12)
    assert found.sd_difference == pytest.approx(0.5, abs=0.1)
    assert found.p < 1e-10


def test_without_effects_of_occupations_it_is_the_odds_ratio_of_the_sums() -> None:
    k_OM, n_OM = np.tile([30.0, 20.0], (10, 1)), np.full((10, 2), 40.0)  # no occupation differs from another
    found = mixed_logit(k_OM, n_OM)
    assert found is not None
    assert found.log_odds == pytest.approx(np.log(30 / 10 * 20 / 20), abs=1e-3)
    assert found.sd_occupation == pytest.approx(0, abs=0.02)
    # The usual standard error of a log odds ratio, and Student's t of nine degrees of freedom.
    error = np.sqrt(1 / 300 + 1 / 100 + 1 / 200 + 1 / 200)
    assert (found.high or 0) - (found.log_odds or 0) == pytest.approx(2.2622 * error, rel=1e-3)


def test_with_the_methods_swapped_the_log_odds_are_mirrored() -> None:
    k_OM, n_OM = drawn(2, 12, 100, (-1.0, 0.6, 1.0, 0.4))
    a, b = mixed_logit(k_OM, n_OM), mixed_logit(k_OM[:, ::-1], n_OM[:, ::-1])
    assert a is not None
    assert b is not None
    assert a.log_odds == pytest.approx(-(b.log_odds or 0), abs=1e-4)
    assert a.low == pytest.approx(-(b.high or 0), abs=1e-3)
    assert (a.p, a.sd_occupation) == pytest.approx((b.p, b.sd_occupation), abs=1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_no_point_around_is_likelier(seed: int) -> None:
    """Nor one further away. A deviation of 0 is level to its sides without being a maximum, and the optimiser stops at
    slopes that it calls flat."""
    generator = np.random.default_rng(seed)
    tau = (0.0, 0.1, 0.3, 0.6)[seed % 4]
    k_OM, n_OM = drawn(seed, int(generator.integers(4, 21)), int(generator.integers(20, 201)), (-1.0, 0.6, 1.0, tau))
    likelihood = Likelihood(k_OM, n_OM)
    made = _fitted(likelihood, True)
    assert made.found
    others = [made.point + generator.normal(0, size, 4) for size in (0.01, 0.1, 0.5) for _ in range(30)]
    others += [np.array([*made.point[:3], x]) for x in (0.0, 0.05, 0.15, 0.3, 0.8)]
    others += [np.array([*made.point[:2], x, made.point[3]]) for x in (0.0, 0.05, 0.15, 0.3, 0.8)]
    assert max(likelihood(point)[0] for point in others) <= made.value + 1e-4


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("seed", [20, 21, 22, 23])
def test_the_maximum_is_found_where_occupations_are_nearly_all_or_nothing(seed: int, free: bool) -> None:
    """Quadrature is coarse there, and Fisher's slope not quite that of its value."""
    k_OM, n_OM = drawn(seed, 19, 290, (6.0, -1.0, 3.0, 2.0))
    likelihood = Likelihood(k_OM, n_OM)
    made = _fitted(likelihood, free)
    assert made.found
    moves = np.random.default_rng(seed).normal(0, 0.3, (60, 4)) * (1, free, 1, 1)
    assert max(likelihood(made.point + move)[0] for move in moves) <= made.value + 1e-4


def test_a_method_that_never_succeeds_has_a_test_and_no_odds_ratio() -> None:
    k_OM, n_OM = drawn(4, 20, 250, (0.0, 0.0, 1.0, 0.5))
    k_OM[:, 1] = 0
    found = mixed_logit(k_OM, n_OM)
    assert found is not None
    assert (found.log_odds, found.low, found.high) == (None, None, None)
    assert found.p < 1e-6
    assert "the odds ratio has no end" in found.note


def test_where_nothing_differs_there_is_nothing_to_fit() -> None:
    n_OM = np.full((5, 2), 10.0)
    assert mixed_logit(np.zeros((5, 2)), n_OM) is None
    assert mixed_logit(n_OM, n_OM) is None
    assert mixed_logit(np.array([[3.0, 4.0]]), np.array([[9.0, 9.0]])) is None


def test_methods_that_differ_much_in_few_occupations_are_no_certain_difference() -> None:
    """Sentences of one occupation do not pass for independent: 2,000 of each, and four occupations of eight decide."""
    k_OM = np.array([[240.0, 20.0]] * 5 + [[20.0, 240.0]] * 3)
    found = mixed_logit(k_OM, np.full((8, 2), 250.0))
    assert found is not None
    assert found.p > 0.3
    assert found.sd_difference > 2


def test_it_stands_beside_the_paired_tests_of_events_alone() -> None:
    texts = [
        (o, f"The {o} was {'bold and caring' if i % 3 else 'here'} all day at work.")
        for o in PROTOCOL.names[:6]
        for i in range(6)
    ]
    samples = {
        "a": sample(texts),
        "b": sample([(o, t.replace("caring", "calm")) for o, t in texts[: -3 * 6]] + texts[-3 * 6 :]),
    }
    compared = compare(samples, {name: occupation_estimates(own) for name, own in samples.items()}, 0.3)
    assert {c.metric for c in compared if c.mixed is not None} == {"strict", "both"}
    (strict,) = (c for c in compared if c.metric == "strict")
    assert strict.mixed is not None
    assert strict.mixed.log_odds is not None
    assert strict.difference is not None
    assert strict.mixed.log_odds < 0  # b − a, the later one first
    assert strict.difference < 0


@pytest.mark.parametrize(
    ("successes", "what"),
    [
        ([[10, 10], [0, 0], [10, 10], [0, 0]], "deviation of occupations"),  # all or nothing by occupation
        ([[10, 0], [0, 10]], "deviation of the difference"),  # the methods the other way round in each
    ],
)
def test_what_has_no_end_in_the_data_is_told_and_not_passed_for_an_estimate(
    successes: list[list[float]], what: str
) -> None:
    made = mixed_logit(np.array(successes, float), np.full((len(successes), 2), 10.0))
    assert made is not None and max(made.sd_occupation or 0, made.sd_difference or 0) == LARGEST
    assert made.note == f"without end in these data, here at the largest looked for: {what}"
