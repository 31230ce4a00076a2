"""Tests against enumeration and other libraries; what cannot be tested says so."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import permutation_test, ttest_1samp, wilcoxon
from statsmodels.stats.multitest import multipletests

from equipoise.evaluation.significance import cliffs_delta, cohens_h, holm, non_inferiority, sign_flip, signed_rank

tenths = st.integers(-20, 20).map(lambda x: x / 10)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(tenths, min_size=2, max_size=9))
def test_sign_flip_counts_all_patterns(differences: list[float]) -> None:
    p, note = sign_flip(np.array(differences))
    if not any(differences):
        assert p is None and "equal in every occupation" in note
        return
    exact = [round(10 * d) for d in differences]
    sums = [
        abs(sum(s * d for s, d in zip(signs, exact, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(exact))
    ]
    assert p == pytest.approx(sum(s >= abs(sum(exact)) for s in sums) / len(sums))


def test_twenty_occupations_that_agree_give_the_least_p_there_is() -> None:
    p, note = sign_flip(np.random.default_rng(0).uniform(0.5, 1, 20))
    assert p == 2.0**-19 and note == ""


def test_sign_flip_is_scipys_permutation_test() -> None:
    d = np.random.default_rng(1).normal(0.4, 1, 12)
    other = permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(d)[0] == pytest.approx(other.pvalue)


def test_five_occupations_cannot_reach_significance_and_that_is_said() -> None:
    p, note = sign_flip(np.ones(5))
    assert p == 0.0625 and "no p below 0.0625" in note


def test_many_occupations_are_drawn_with_a_seed_and_agree_with_counting() -> None:
    d = np.random.default_rng(2).normal(0.25, 1, 31)
    p, _ = sign_flip(d, 0)
    assert p == sign_flip(d, 0)[0] and p is not None and 0 < p < 1
    normal = math.erfc(abs(d.sum()) / math.sqrt((d**2).sum()) / math.sqrt(2))
    assert p == pytest.approx(normal, abs=0.01)


def test_equal_methods_are_told_apart_in_at_most_five_of_a_hundred() -> None:
    rng = np.random.default_rng(3)
    p = [sign_flip(rng.binomial(250, 0.9, 20) / 250 - rng.binomial(250, 0.9, 20) / 250)[0] for _ in range(1500)]
    assert sum(x is not None and x <= 0.05 for x in p) / len(p) <= 0.055


@pytest.mark.parametrize(
    "differences",
    [[0.1, -0.2, 0.3, 0.4, -0.5, 0.6, 0.7], list(np.linspace(-0.3, 1, 20)), list(np.linspace(-0.3, 1, 50))],
)
def test_signed_rank_is_scipys_without_zeros(differences: list[float]) -> None:
    expected = wilcoxon(differences, method="exact").pvalue
    assert signed_rank(np.array([*differences, 0.0, 0.0])) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    "differences",
    [
        [0.1, 0.1, 0.1, 0.1],  # of 16 patterns two are as far out: 2/16
        [0.1, 0.2, 0.1, 0.3, -0.1, 0.2, 0.5, 0.2],
        [0.1 + 0.2, 0.3, -0.3, 0.3, 0.6, 0.0, -0.1],  # the first two sizes are equal but for rounding
    ],
)
def test_signed_rank_with_ties_counts_every_pattern_of_signs(differences: list[float]) -> None:
    """By hand: mean ranks from comparisons, and all 2^n sums of those with a positive sign."""
    kept = [round(d, 9) for d in differences if d]
    ranks = [sum(abs(b) < abs(a) for b in kept) + (1 + sum(abs(b) == abs(a) for b in kept)) / 2 for a in kept]
    sums = [
        sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=len(kept))
    ]
    observed = sum(r for r, d in zip(ranks, kept, strict=True) if d > 0)
    tails = sum(s <= observed for s in sums), sum(s >= observed for s in sums)
    assert signed_rank(np.array(differences)) == pytest.approx(min(1.0, 2 * min(tails) / len(sums)))


def test_signed_rank_of_many_is_the_normal_approximation() -> None:
    differences = np.random.default_rng(0).normal(0.1, 1, 300)
    assert signed_rank(differences) == pytest.approx(float(wilcoxon(differences, method="asymptotic").pvalue))
    exact, near = signed_rank(differences[:200]), wilcoxon(differences[:200], method="asymptotic").pvalue
    assert exact == pytest.approx(float(near), rel=0.01)


def test_signed_rank_of_all_ties_is_finite_and_of_nothing_none() -> None:
    assert signed_rank(np.full(20, 0.5)) == pytest.approx(2 / 2**20)
    assert signed_rank(np.zeros(20)) is None and signed_rank(np.array([0.3, 0.0])) is None


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03], [0.5, 0.5, 0.9, 0.001, 0.02], [0.2], [0.01, 0.01]])
def test_holm_is_statsmodels_and_leaves_out_what_could_not_be_tested(p_values: list[float]) -> None:
    expected = [float(p) for p in multipletests(p_values, method="holm")[1]]
    assert holm(p_values) == pytest.approx(expected)
    assert holm([None, *p_values, None]) == [None, *holm(p_values), None]
    assert holm([None]) == [None]


@settings(deadline=None)  # the machine may be busy
@given(st.lists(tenths, min_size=1, max_size=8), st.lists(tenths, min_size=1, max_size=8))
def test_cliffs_delta_counts_pairs(a: list[float], b: list[float]) -> None:
    wins = sum((x > y) - (x < y) for x in a for y in b)
    assert cliffs_delta(np.array(a), np.array(b)) == pytest.approx(wins / (len(a) * len(b)))


def test_cohens_h_of_all_against_none_is_pi() -> None:
    assert cohens_h(1, 0) == pytest.approx(math.pi)
    assert cohens_h(0.5, 0.5) == 0
    assert cohens_h(0.3, 0.6) == pytest.approx(2 * math.asin(math.sqrt(0.3)) - 2 * math.asin(math.sqrt(0.6)))


def test_non_inferiority_is_two_one_sided_t_tests() -> None:
    rng = np.random.default_rng(4)
    b = rng.normal(3, 0.5, 20)
    a = b + rng.normal(0.15, 0.2, 20)
    found = non_inferiority(a, b, 0.3)
    upper = ttest_1samp(a - b, 0.3, alternative="less").pvalue
    lower = ttest_1samp(a - b, -0.3, alternative="greater").pvalue
    assert found.p_noninferior == pytest.approx(upper)
    assert found.p_equivalent == pytest.approx(max(upper, lower))
    assert found.noninferior is bool(upper < 0.05)


def test_a_much_worse_method_is_not_non_inferior_and_a_much_better_one_is() -> None:
    b = np.linspace(2, 3, 20)
    noise = np.tile([0.05, -0.05], 10)
    assert non_inferiority(b + 1 + noise, b, 0.3).noninferior is False
    better = non_inferiority(b - 1 + noise, b, 0.3)
    assert better.noninferior is True and better.equivalent is False


@pytest.mark.parametrize("values", [np.ones(1), np.ones(20), np.zeros(0)])
def test_what_cannot_be_tested_says_so(values: np.ndarray) -> None:
    found = non_inferiority(values, values, 0.3)
    assert found.p_noninferior is None and found.noninferior is None and "cannot be tested" in found.note
    p, note = sign_flip(np.zeros(len(values)))
    assert p is None and "cannot be tested" in note


def test_thousands_of_differences_fit_into_memory() -> None:
    p, _ = sign_flip(np.tile([1.0, -1.0, 0.5], 1000))
    assert p is not None and p < 1e-4
