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
from equipoise.protocol.plural import plural

PAIRS_APART = 1.02  # a factor: nearer than that, two numbers of effective pairs count as one

Evaluation = dict[str, float]
"""`step` and what `evaluate` measures."""


def least_admissible(highest: float, n: float) -> float:
    """The strict success down to which another is within the sampling error of the highest, each of `n` sentences."""
    return min(highest, wilson(round(highest * n), int(n)).low)


def admissible(strict: float, highest: float, n: float) -> bool:
    """Whether a strict success is within the sampling error of the highest seen, each of `n` sentences."""
    return strict >= least_admissible(highest, n)


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


def words(found: Mapping[str, float], pairs: str) -> str:
    """What an evaluation found; `pairs` is what the task calls them."""
    rank = f"rank {found['rank']:.4g}, " if "rank" in found else ""
    return (
        f"{rank}strict success {100 * found['strict']:.1f} % of {plural(found['n'], 'sentence')}, "
        f"{found['effective_pairs']:.1f} effective {pairs}, KL to the reference {found['kl']:z.2f} nats per sentence"
    )


def because(best: Mapping[str, float], top: Mapping[str, float], pairs: str) -> str:
    """The rule that made `best` the best evaluation, with the numbers that it compared; `top` has the highest strict
    success."""
    if "rank" in best:
        return "the highest rank of all evaluations, by the function that was trained on or given to compare them"
    if "step" not in top or top["step"] == best["step"]:
        return "no evaluation had a higher strict success"
    return (
        f"the highest strict success, {100 * top['strict']:.1f} %, was step {top['step']:.0f}'s, but from "
        f"{100 * least_admissible(top['strict'], best['n']):.1f} % up (its 95 % Wilson interval) another is within its "
        f"sampling error, and within it more effective {pairs} decide ({best['effective_pairs']:.1f} here, "
        f"{top['effective_pairs']:.1f} there), or where they are within {100 * (PAIRS_APART - 1):.0f} % the lower KL "
        f"({best['kl']:z.2f} here, {top['kl']:z.2f} there)"
    )


class Choice:
    """The best evaluation so far, and the one with the highest strict success; part of every checkpoint."""

    def __init__(self) -> None:
        self.best: Evaluation | None = None
        self.top: Evaluation | None = None

    @property
    def highest(self) -> float:
        """The highest strict success so far."""
        return self.top["strict"] if self.top else 0.0

    @property
    def step(self) -> int | None:
        """Of the best."""
        return int(self.best["step"]) if self.best else None

    def consider(self, challenger: Evaluation) -> bool:
        """Take part in the comparison; whether it is the best now."""
        if self.top is None or challenger["strict"] > self.top["strict"]:
            self.top = challenger
        if self.best is None or better(challenger, self.best, self.highest):
            self.best = challenger
            return True
        return False

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "top": self.top}

    def load_state(self, state: Mapping[str, Any]) -> None:
        # Checkpoints of earlier versions have the number alone.
        self.best, self.top = state["best"], state["top"] if "top" in state else {"strict": state["highest"]}
