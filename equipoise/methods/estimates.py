"""Shares of draws with their intervals, and a first look beside the public study's."""

import math
import statistics
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from equipoise.methods.completions import Key
from equipoise.protocol.lexicon import LEXICON, OCCUPATIONS
from equipoise.protocol.reward import Event, complies

Z_95 = NormalDist().inv_cdf(0.975)

STUDY = "99.87 ± 0.15 % both classes, entropy 3.284 bits, 100 pairs, perplexity 67.8, n 15,000"
"""What the public study (arXiv 2510.22084) reports of its own: LoRA on 750 template sentences."""


def wilson(successes: int, draws: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a probability (E. B. Wilson 1927, JASA 22), by default of 95 %.

    The probabilities p with |p̂ − p| ≤ z·√(p(1−p)/draws); (0, 1) without draws.
    """
    if draws == 0:
        return 0.0, 1.0
    share, extra = successes / draws, z * z / draws
    middle = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt(share * (1 - share) / draws + extra / (4 * draws)) / (1 + extra)
    # At the ends the bound is the share itself, which rounding would miss by a hair.
    return (0.0 if successes == 0 else middle - half, 1.0 if successes == draws else middle + half)


def share(successes: int, draws: int) -> dict[str, Any]:
    """A share with its counts and Wilson interval; its value is null without draws."""
    low, high = wilson(successes, draws)
    value = successes / draws if draws else None
    return {"value": value, "low": low, "high": high, "accepted": successes, "drawn": draws}


def yields(texts: Mapping[Key, str], event: Event) -> dict[str, Any]:
    """The share that passes: of all draws, of each occupation's, and as an estimate of p0.

    An occupation that has enough is drawn no more, so all draws together weigh the hard ones heavily. For p0, every
    occupation counts alike: it is the share among the first D draws of each, D being the fewest that any has.
    """
    passed: dict[str, list[int]] = {occupation: [] for occupation in OCCUPATIONS}
    drawn = dict.fromkeys(OCCUPATIONS, 0)
    for key, text in texts.items():
        drawn[key.occupation] += 1
        if complies(text, event):
            passed[key.occupation].append(key.run_id)
    first = min(drawn.values())
    balanced = share(sum(run <= first for runs in passed.values() for run in runs), first * len(OCCUPATIONS))
    p0 = {
        "value": balanced["value"],
        "low": balanced["low"],
        "high": balanced["high"],
        "n": balanced["drawn"],
        "event": event,
        "how": f"share of the first {first:,} draws of each of {len(OCCUPATIONS)} occupations, 95 % Wilson interval",
    }
    return {
        "p0": p0 if first else None,
        "yield": share(sum(map(len, passed.values())), sum(drawn.values())),
        "yields": {occupation: share(len(passed[occupation]), drawn[occupation]) for occupation in OCCUPATIONS},
    }


def mean_over_occupations(values: Mapping[Key, float]) -> dict[str, float]:
    """{value, low, high} of the mean, every occupation with equally many values; the interval is normal, with the
    variance within occupations (the twenty are all there are, not a sample)."""
    groups = [[v for key, v in values.items() if key.occupation == o] for o in OCCUPATIONS]
    assert len({len(group) for group in groups}) == 1
    value = statistics.fmean(values.values())
    n = len(groups[0])
    if n > 1:
        variance = sum(statistics.variance(group) / n for group in groups) / len(groups) ** 2
    else:
        variance = statistics.variance(values.values()) / len(values)
    half = Z_95 * math.sqrt(variance)
    return {"value": value, "low": value - half, "high": value + half}


def beside_the_study(texts: Sequence[str]) -> str:
    """Two lines: the public study's result for supervised fine-tuning, and the same numbers of `texts`.

    Entropy is that of the terms' occurrences in bits, the mean of both lists; pairs are of a sentence's first terms.
    """
    matches = [LEXICON.match(text) for text in texts]
    both = [match for match in matches if match.both]
    pairs = {(match.agentic[0], match.communal[0]) for match in both}
    entropy = sum(
        _entropy([sum(match.counts.get(term, 0) for match in matches) for term in terms])
        for terms in (LEXICON.agentic, LEXICON.communal)
    )
    share = 100 * len(both) / len(texts) if texts else 0.0
    return (
        f"the study's SFT  {STUDY}\n"
        f"this model       {share:.2f} % both classes, entropy {entropy / 2:.3f} bits, {len(pairs)} pairs, perplexity: "
        f"equipoise evaluate, n {len(texts):,}"
    )


def _entropy(counts: Sequence[int]) -> float:
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts if count) if total else 0.0
