"""Which checkpoint is exported: an evaluation at every multiple of save-every, and the rule that compares two.

The challenger replaces the best so far if

1. the best's strict success is below what the sampling error of the highest strict success seen so far allows (the
   lower end of its 95 % Wilson interval) and the challenger's is higher; or
2. the challenger's is not below it, and it has at least 2 % more effective pairs; or
3. as 2, with pairs within 2 % of each other and a lower KL to the reference model.

Where the user trains on a function of their own, `rank` is what it says of the evaluation's sentences, and the higher
one is better, whatever the rest.
"""

from collections.abc import Mapping
from typing import Any

from equipoise.measures.shares import wilson

PAIRS_APART = 1.02  # a factor: nearer than that, two numbers of effective pairs count as one

Evaluation = dict[str, float]
"""`step` and what `evaluate` measures."""


def admissible(strict: float, highest: float, n: float) -> bool:
    """Whether a strict success is within the sampling error of the highest seen, each of `n` sentences."""
    return strict >= min(highest, wilson(round(highest * n), int(n)).low)


def better(challenger: Mapping[str, float], best: Mapping[str, float], highest: float) -> bool:
    """Whether the challenger replaces the best; `highest` is the highest strict success so far, its own included."""
    if "rank" in challenger and "rank" in best:
        return challenger["rank"] > best["rank"]
    good, n = challenger["strict"], challenger["n"]
    if not admissible(best["strict"], highest, n):
        return good > best["strict"]
    if not admissible(good, highest, n):
        return False
    ours, theirs = challenger["effective_pairs"], best["effective_pairs"]
    if max(ours, theirs) > PAIRS_APART * min(ours, theirs):
        return ours > theirs
    return challenger["kl"] < best["kl"]


class Choice:
    """The best evaluation so far; part of every checkpoint."""

    def __init__(self) -> None:
        self.best: Evaluation | None = None
        self.highest = 0.0

    @property
    def step(self) -> int | None:
        """Of the best."""
        return int(self.best["step"]) if self.best else None

    def consider(self, challenger: Evaluation) -> bool:
        """Take part in the comparison; whether it is the best now."""
        self.highest = max(self.highest, challenger["strict"])
        if self.best is None or better(challenger, self.best, self.highest):
            self.best = challenger
            return True
        return False

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "highest": self.highest}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best, self.highest = state["best"], state["highest"]
