"""Weights of a sample so that its margins are what they should be, and how many of each of its members to take.

With q(i) ∝ w_i·u(row i)·v(column i) such that all rows, and all columns, come alike, q is of all distributions with
these margins the nearest to w: iterative proportional fitting (W. Deming and F. Stephan 1940; I-projection: I. Csiszár
1975).
"""

import math
import random
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

Kind = TypeVar("Kind", bound=Hashable)

SWEEPS = 200
CLOSE = 1e-6
"""A margin is met when it is off by no more than this share of it."""


def raked(
    log_weights: Sequence[float],
    rows: Sequence[Hashable],
    columns: Sequence[Hashable] | None = None,
    wanted: Mapping[Hashable, float] | None = None,
) -> list[float]:
    """Shares, of sum 1, in proportion to the weights within each (row, column), the rows alike and, where `columns` are
    given, these alike too, or in the proportions that are `wanted`. Where no factors give both, the rows are met.
    Raises ValueError without a weight."""
    if not log_weights:
        raise ValueError("nothing to weigh")
    kinds = columns if columns is not None else [None] * len(rows)
    cells: dict[tuple[Hashable, Hashable], list[float]] = defaultdict(list)
    for weight, row, column in zip(log_weights, rows, kinds, strict=True):
        cells[row, column].append(weight)
    top = {cell: max(own) for cell, own in cells.items()}
    inner = {cell: math.fsum(math.exp(x - top[cell]) for x in own) for cell, own in cells.items()}
    level = max(top[cell] + math.log(inner[cell]) for cell in cells)
    mass = {cell: math.exp(top[cell] + math.log(inner[cell]) - level) for cell in cells}
    mass = {cell: max(value, 1e-300) for cell, value in mass.items()}
    for _ in range(SWEEPS if columns is not None else 1):
        off = _fit(mass, 1, wanted) if columns is not None else 0.0
        off = max(off, _fit(mass, 0))
        if off < CLOSE:
            break
    shares = [
        mass[cell] * math.exp(weight - top[cell]) / inner[cell]
        for weight, cell in zip(log_weights, zip(rows, kinds, strict=True), strict=True)
    ]
    total = math.fsum(shares)
    return [share / total for share in shares]


def _fit(
    mass: dict[tuple[Hashable, Hashable], float], place: int, proportions: Mapping[Hashable, float] | None = None
) -> float:
    """Scale the cells in place until the margins of rows (0) or columns (1) are alike, or have these proportions; by
    how much one was off."""
    found = margins(list(mass.values()), [cell[place] for cell in mass])
    wanted = dict.fromkeys(found, 1 / len(found))
    if proportions is not None:
        total = math.fsum(proportions[name] for name in found)
        wanted = {name: proportions[name] / total for name in found}
    for cell in mass:
        mass[cell] *= wanted[cell[place]] / found[cell[place]]
    return max(abs(value / wanted[name] - 1) for name, value in found.items())


def margins(shares: Sequence[float], columns: Sequence[Kind]) -> dict[Kind, float]:
    """What the shares of each column sum to."""
    found: dict[Kind, float] = defaultdict(float)
    for share, column in zip(shares, columns, strict=True):
        found[column] += share
    return dict(found)


class Taken(NamedTuple):
    places: list[int]
    """Of the sample's members, each as often as it is taken."""
    cut: float
    """Share of the distribution that is missing, because some would have been taken too often."""


def systematic(shares: Sequence[float], strata: Sequence[Any], count: int, most: int, seed: int) -> Taken:
    """About `count` members, each `count` times its share, rounded up or down at random (systematic resampling, the
    members of a stratum side by side and else in random order, so that every stratum gets its share to within one;
    J. Carpenter, P. Clifford and P. Fearnhead 1999), and no more than `most` times. Strata must be sortable."""
    generator = random.Random(seed)
    order = list(range(len(shares)))
    generator.shuffle(order)
    order.sort(key=strata.__getitem__)
    place, passed, cut = generator.random(), 0.0, 0
    places: list[int] = []
    for i in order:
        passed += shares[i] * count
        times = max(0, math.ceil(passed - place))
        place += times
        places += [i] * min(times, most)
        cut += max(0, times - most)
    return Taken(places, cut / count)


def size(shares: Sequence[float]) -> float:
    """Kish's effective sample size of shares that sum to 1."""
    return 1 / math.fsum(share * share for share in shares)
