"""The bound, what p0 is, and the front."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from equipoise.evaluation.counted import Fluency
from equipoise.evaluation.frontier import base_rate, bound, drawn_medians, frontier, members
from equipoise.evaluation.results import Estimate
from equipoise.evaluation.side import Side
from equipoise.measures.shares import kl_bound
from tests.evaluation.files import sample


def test_the_bound_is_about_5_6_nats_for_the_protocols_base_rate() -> None:
    assert kl_bound(1, 9 / 2560) == pytest.approx(math.log(2560 / 9))
    assert 5.6 < kl_bound(1, 0.0035) < 5.7
    assert kl_bound(0.3, 0.3) == 0
    assert kl_bound(0.5, 0) == math.inf and kl_bound(0, 0) == 0


@settings(deadline=None)  # the machine may be busy
@given(st.floats(0, 1), st.floats(0.001, 0.999))
def test_the_bound_is_the_divergence_of_two_coins(c: float, p: float) -> None:
    assert kl_bound(c, p) == pytest.approx(entropy([c, 1 - c], [p, 1 - p]), abs=1e-9)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.floats(0.01, 1), min_size=4, max_size=4), st.lists(st.floats(0.01, 1), min_size=4, max_size=4))
def test_no_distribution_is_nearer_than_the_bound_and_conditioning_attains_it(p: list[float], q: list[float]) -> None:
    base, other = np.array(p) / sum(p), np.array(q) / sum(q)
    assert entropy(other, base) >= kl_bound(float(other[:2].sum()), float(base[:2].sum())) - 1e-9
    conditioned = np.r_[base[:2] / base[:2].sum(), 0, 0]
    assert entropy(conditioned, base) == pytest.approx(kl_bound(1, float(base[:2].sum())))


def test_the_bounds_interval_follows_from_p0s() -> None:
    p0 = Estimate(0.0035, 0.0016, 0.0066, 2560, "wilson")
    found = bound(0.95, p0)
    assert found.low == pytest.approx(kl_bound(0.95, 0.0066)) and found.high == pytest.approx(kl_bound(0.95, 0.0016))
    assert bound(0.003, p0).low == 0
    never = bound(1.0, Estimate(0.0, 0.0, 0.0012, 2560, "wilson"))
    assert never.value is None and never.high is None and never.low == pytest.approx(math.log(1 / 0.0012))
    assert "observed as 0" in never.note


def test_p0_is_the_named_base_then_the_costs_files_then_prompt_only() -> None:
    metrics = {
        "Prompt-Only": {"both": Estimate(0.01, 0.0, 0.03, 100, "clustered-wilson", (0.002, 0.05))},
        "X": {"both": Estimate(0.5, 0.4, 0.6, 100, "clustered-wilson", (0.4, 0.6))},
    }
    side = Side("X", {}, None, Estimate(0.004, 0.003, 0.005, 9000, "given", note="yield"), "both")
    assert base_rate("both", {"X": [side]}, metrics, None) == (side.p0, "costs file of X: yield")
    for event in ("strict", "both, finished within 32 tokens", ""):  # of anything else it is no estimate
        other = Side("X", {}, None, side.p0, event)
        assert base_rate("both", {"X": [other]}, metrics, None)[1].startswith("100 rows of Prompt-Only")
        assert base_rate("both", {"X": [other]}, {"X": metrics["X"]}, None)[0] is None
    p0, source = base_rate("both", {}, metrics, None)
    assert p0 is not None and (p0.value, p0.low, p0.high) == (0.01, 0.002, 0.05)
    assert source == "100 rows of Prompt-Only, taken for the untrained model because of its name; --base overrules"
    p0, source = base_rate("both", {"X": [side]}, metrics, "X")
    assert p0 is not None and p0.value == 0.5 and source == "100 rows of X, which --base names"
    p0, source = base_rate("both", {}, metrics | {"Base": metrics["X"]}, None)
    assert p0 is None and "Prompt-Only and Base are all called as the untrained model may be" in source
    p0, source = base_rate("both", {}, {"X": metrics["X"]}, None)
    assert p0 is None and "--base" in source


def test_the_front_is_what_no_other_dominates() -> None:
    front = members(np.array([0.9, 0.9, 0.5, 0.4, 0.9]), np.array([3.0, 3.1, 2.0, 2.0, 3.0]))
    assert front.tolist() == [True, False, True, False, True]


def test_a_method_of_fewer_than_thirty_sentences_is_on_no_front_and_keeps_no_other_off() -> None:
    """Of four that all comply and are the most fluent the front knows nothing; one sentence more than 29 suffices."""

    def front(n: int) -> dict[str, tuple[bool, bool]]:
        samples, metrics = {}, {}
        for name, count, nll, share in (("few", n, 1.0, 1.0), ("many", 40, 2.0, 0.5)):
            texts = [(("nurse", "pilot")[i % 2], f"The nurse was bold and caring {i}.") for i in range(count)]
            samples[name] = sample(texts, judges={"j": Fluency(np.full(count, nll), np.ones(count, int))})
            metrics[name] = {
                "both": Estimate(share, n=count, wilson=(0.1, 1.0)),
                "nll/median@j": Estimate(nll, n=count),
            }
        found = frontier("both", samples, metrics, {}, dict.fromkeys(samples), None, "j")
        return {p.method: (p.member, p.support is not None) for p in found.pareto}

    assert front(29) == {"few": (False, False), "many": (True, True)}
    assert front(30) == {"few": (True, True), "many": (False, True)}


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_drawn_medians_have_the_distribution_of_medians_of_draws(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    own = sample([("nurse", f"x {i}") for i in range(n)], judges={"j": Fluency(values, np.ones(n, int))}, draws=20_000)
    drawn = drawn_medians(own, "j", ["nurse"])
    assert drawn is not None
    plain = np.median(np.random.default_rng(9).choice(values, (20_000, n)), axis=1)
    for q in (0.1, 0.5, 0.9):
        assert np.quantile(drawn[0], q) == pytest.approx(np.quantile(plain, q), abs=1e-9)
    assert drawn[0].mean() == pytest.approx(plain.mean(), abs=0.03)
