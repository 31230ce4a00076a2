"""Wilson's interval against published numbers and its definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.measures.shares import Z_95, wilson


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


@pytest.mark.parametrize("n", [1, 7, 10, 49, 3000])
def test_where_all_or_none_succeed_the_bound_is_exact(n: int) -> None:
    assert wilson(n, n).high == 1.0 and wilson(0, n).low == 0.0
