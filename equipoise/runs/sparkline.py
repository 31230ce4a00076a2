"""A curve in one line of text."""

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN = "_.:-=+*#"
"""The same eight heights where an encoding has no blocks."""


def sparkline(values: Sequence[float], width: int, encoding: str = "utf-8") -> str:
    """`values` from left to right, the lowest as the lowest block and the highest as the highest, in at most `width`
    characters: where there are more values, each stands for the mean of as many neighbours. What is not finite is left
    out. Equal values are all low."""
    finite = [value for value in values if math.isfinite(value)]
    columns = min(width, len(finite))
    means = []
    for i in range(columns):
        part = finite[len(finite) * i // columns : len(finite) * (i + 1) // columns]
        means.append(sum(part) / len(part))
    low, high = min(means, default=0.0), max(means, default=0.0)
    heights = BLOCKS if _has(encoding, BLOCKS) else PLAIN
    top = len(heights) - 1
    return "".join(heights[round(top * (mean - low) / (high - low)) if high > low else 0] for mean in means)


def _has(encoding: str, text: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
