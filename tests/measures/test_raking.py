"""Shares with even margins, and how many of each member are taken."""

import math
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.measures.raking import raked, size, systematic

logs = st.floats(-20, 20)
tables = st.integers(2, 4).flatmap(
    lambda columns: st.lists(st.lists(logs, min_size=columns, max_size=columns), min_size=2, max_size=5)
)


@given(tables, st.floats(-700, 700))
def test_rows_and_columns_come_alike_and_nothing_else_is_changed(table: list[list[float]], level: float) -> None:
    """The odds ratio of every two rows and columns stays: that, and the margins, make it the nearest there is."""
    rows, columns = len(table), len(table[0])
    cells = [(i, j) for i in range(rows) for j in range(columns)]
    shares = raked([table[i][j] + level for i, j in cells], [i for i, _ in cells], [j for _, j in cells])
    made = dict(zip(cells, shares, strict=True))
    for i in range(rows):
        assert math.fsum(made[i, j] for j in range(columns)) == pytest.approx(1 / rows, rel=1e-6)
    for j in range(columns):
        assert math.fsum(made[i, j] for i in range(rows)) == pytest.approx(1 / columns, rel=0.05)
    for i, j in cells:
        if min(made[i, j], made[0, 0], made[i, 0], made[0, j]) > 1e-300:
            odds = math.log(made[i, j]) + math.log(made[0, 0]) - math.log(made[i, 0]) - math.log(made[0, j])
            assert odds == pytest.approx(table[i][j] + table[0][0] - table[i][0] - table[0][j], abs=1e-6)


def test_without_columns_rows_alone_are_made_alike() -> None:
    shares = raked([math.log(x) for x in (1, 3, 5)], ["a", "a", "b"])
    assert shares == pytest.approx([1 / 8, 3 / 8, 1 / 2])
    assert size(shares) == pytest.approx(64 / (1 + 9 + 16))
    with pytest.raises(ValueError, match="nothing to weigh"):
        raked([], [])


def test_by_hand_in_a_table_of_two_by_two() -> None:
    """Margins of a half each and an odds ratio of 9: x²/(½−x)² = 9, so x = 3/8."""
    shares = raked([math.log(x) for x in (9, 1, 1, 1)], [0, 0, 1, 1], [0, 1, 0, 1])
    assert shares == pytest.approx([3 / 8, 1 / 8, 1 / 8, 3 / 8], rel=1e-5)


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=30), st.integers(1, 200), st.integers(0, 99))
def test_each_is_taken_as_often_as_its_share_says_to_within_one(weights: list[float], count: int, seed: int) -> None:
    shares = [w / math.fsum(weights) for w in weights]
    strata = [i % 3 for i in range(len(shares))]
    taken = systematic(shares, strata, count, count + 1, seed)
    times = Counter(taken.places)
    assert taken.cut == 0 and abs(len(taken.places) - count) <= 1
    for i, share in enumerate(shares):
        assert abs(times[i] - share * count) < 1 + 1e-9
    of_stratum: dict[int, float] = defaultdict(float)
    for i, share in enumerate(shares):
        of_stratum[strata[i]] += share
    for stratum, share in of_stratum.items():
        assert abs(sum(times[i] for i in times if strata[i] == stratum) - share * count) < 1 + 1e-9


def test_what_is_not_taken_because_it_would_come_too_often_is_said() -> None:
    taken = systematic([0.9, 0.05, 0.05], [0, 0, 0], 100, 30, 0)
    assert Counter(taken.places) == {0: 30, 1: 5, 2: 5} and taken.cut == pytest.approx(0.6)


def test_over_many_seeds_the_mean_is_the_share() -> None:
    times = Counter(i for seed in range(4000) for i in systematic([0.7, 0.2, 0.1], [0, 0, 0], 1, 1, seed).places)
    assert [times[i] / 4000 for i in range(3)] == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
