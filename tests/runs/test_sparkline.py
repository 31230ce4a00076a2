"""A curve in one line."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.runs.sparkline import BLOCKS, PLAIN, sparkline


def test_heights_by_hand() -> None:
    # Sevenths of the way from the lowest to the highest.
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 60) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.19, 0.9], 60) == "▁█" and sparkline([0.9, 0.19], 60) == "█▁"
    # Two columns for four values: their means are 1 and 6.
    assert sparkline([0, 2, 5, 7], 2) == "▁█"
    assert sparkline([3.0, 3.0], 60) == "▁▁" and sparkline([], 60) == "" and sparkline([math.nan, 1.0], 60) == "▁"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "no such encoding"])
def test_plain_characters_where_there_are_no_blocks(encoding: str) -> None:
    line = sparkline(range(8), 60, encoding)
    assert line == PLAIN and line.isascii() and len(PLAIN) == len(BLOCKS)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=300), st.integers(1, 80))
def test_a_line_is_never_longer_than_it_may_be(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values)) and set(line) <= set(BLOCKS)
