"""How varied values are: effective numbers, and the pairs of terms that sentences hold."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any


def effective(counts: Counter[Any]) -> float:
    """2^H of the shares, H their entropy in bits: how many equally frequent values would be as varied. 0 for none."""
    total = sum(counts.values())
    if total == 0:
        return 0.0
    # Sorted, so that the sum does not depend on the order in which values were met.
    shares = sorted(n / total for n in counts.values() if n)
    return math.exp(-math.fsum(p * math.log(p) for p in shares))


def pair_counts(firsts: Iterable[tuple[str, ...] | None]) -> Counter[tuple[str, ...]]:
    """How often each combination occurs of a sentence's first term of each class; None stands for a sentence that
    lacks a class and is not counted."""
    return Counter(first for first in firsts if first is not None)
