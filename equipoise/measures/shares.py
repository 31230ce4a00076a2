"""Shares of sentences: their intervals, and the least KL that a share needs."""

import math
from typing import NamedTuple


def kl_bound(c: float, p0: float) -> float:
    """Least KL(π‖π_ref), nats per sentence, of a policy that does with probability `c` what the reference does with
    probability `p0`: kl(c‖p0) = c·ln(c/p0) + (1−c)·ln((1−c)/(1−p0)), with 0·ln 0 = 0.

    Data-processing inequality (Cover & Thomas, Elements of Information Theory, 2nd ed., section 2.8). It is jointly
    convex, so it also bounds the mean over occupations by their mean rates. Infinite where the policy does what the
    reference never does, or always. ValueError for what is no probability.
    """
    if not (0 <= c <= 1 and 0 <= p0 <= 1):
        raise ValueError(f"kl_bound({c}, {p0}): both must be probabilities")
    total = 0.0
    for policy, reference in ((c, p0), (1 - c, 1 - p0)):
        if policy > 0:
            total += policy * math.log(policy / reference) if reference > 0 else math.inf
    return max(0.0, total)  # rounding can leave a hair below 0 at c = p0


Z_95 = 1.959964
"""95 % of a normal distribution lie within so many standard deviations of its mean."""


class Interval(NamedTuple):
    low: float
    high: float


def wilson(hits: int, n: int, z: float = Z_95) -> Interval:
    """Wilson's score interval of a proportion, by default 95 % (Wilson 1927, JASA 22, 209–212). No trials: (0, 1).

    The probabilities p with |hits/n − p| ≤ z·√(p(1−p)/n).
    """
    if n == 0:
        return Interval(0.0, 1.0)
    p, extra = hits / n, z * z / n
    centre = (p + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(p * (1 - p) / n + extra / (4 * n))
    # At the ends the bound is the share itself, which rounding would miss by a hair.
    return Interval(0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half)
