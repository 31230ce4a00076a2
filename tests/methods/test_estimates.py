"""Intervals, yields and means: hand-worked numbers and the definitions."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.methods.completions import Key
from equipoise.methods.estimates import Z_95, beside_the_study, mean_over_occupations, wilson, yields
from equipoise.protocol.lexicon import AGENTIC, COMMUNAL, OCCUPATIONS

BOTH = "was bold and loyal."
NONE = "was there."


def test_wilson_gives_the_published_intervals() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3 (Wilson, no continuity correction).
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    # PROTOCOL's 9 of 2,560, and a saturated 5,000 of 5,000.
    assert wilson(9, 2560) == pytest.approx((0.001851, 0.006668), abs=1e-6)
    assert wilson(5000, 5000) == pytest.approx((0.99923, 1.0), abs=5e-6)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_bounds_are_where_the_share_is_z_standard_errors_away(counts: tuple[int, int]) -> None:
    successes, draws = counts
    share = successes / draws
    low, high = wilson(successes, draws)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(share - bound) == pytest.approx(Z_95 * math.sqrt(bound * (1 - bound) / draws), abs=1e-9)
    assert (1 - high, 1 - low) == pytest.approx(wilson(draws - successes, draws), abs=1e-12)


def test_yields_count_every_draw_but_p0_every_occupation_alike() -> None:
    # Four draws for the nurse, of which 1 and 4 pass; two for everyone else, of which the pilot's second passes.
    texts = {Key(o, i): NONE for o in OCCUPATIONS for i in (1, 2)} | {Key("nurse", 3): NONE}
    texts |= {Key("nurse", 1): BOTH, Key("nurse", 4): BOTH, Key("pilot", 2): BOTH}
    known = yields(texts, "both")
    assert (known["yield"]["accepted"], known["yield"]["drawn"]) == (3, 42)
    assert known["yields"]["nurse"]["value"] == 0.5 and known["yields"]["chef"]["accepted"] == 0
    assert known["p0"]["value"] == 2 / 40 and known["p0"]["n"] == 40  # the first two draws of each
    assert (known["p0"]["low"], known["p0"]["high"]) == wilson(2, 40)
    assert yields(texts, "strict")["yield"]["accepted"] == 0


def test_without_a_draw_of_each_occupation_there_is_no_p0() -> None:
    known = yields({Key("nurse", 1): BOTH}, "both")
    assert known["p0"] is None and known["yields"]["chef"]["value"] is None


def test_a_mean_over_occupations_has_the_error_of_the_values_within_them() -> None:
    # Means 0 and 10 by turns; values one apart from each: variance 2 within each occupation, two values each.
    values = {Key(o, r): 10.0 * (i % 2) + (-1) ** r for i, o in enumerate(OCCUPATIONS) for r in (1, 2)}
    found = mean_over_occupations(values)
    half = 1.959964 * math.sqrt(20 * (2 / 2)) / 20
    assert found["value"] == pytest.approx(5.0)
    assert (found["low"], found["high"]) == pytest.approx((5 - half, 5 + half), abs=1e-6)


def test_uniform_terms_have_the_studys_greatest_entropy() -> None:
    texts = [f"The nurse was {a} and {c}." for a, c in zip(AGENTIC, COMMUNAL, strict=True)]
    shown = beside_the_study([*texts, "The nurse was there."])
    # log2 10 = 3.322; ten of eleven.
    assert "90.91 % both classes, entropy 3.322 bits, 10 pairs" in shown and "n 11" in shown
    assert "99.87 ± 0.15" in shown and "3.284" in shown and "67.8" in shown
