"""Shares of draws with their intervals, and a first look beside the public study's."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.errors import UserError
from equipoise.measures.shares import Z_95, wilson
from equipoise.measures.variety import effective, pair_counts
from equipoise.methods.completions import Key
from equipoise.protocol.plural import plural
from equipoise.protocol.reward import Event
from equipoise.protocol.task import PROTOCOL, Task

STUDY = "99.87 ± 0.15 % both classes, entropy 3.284 bits, 100 pairs, perplexity 67.8, n 15,000"
"""What the public study (arXiv 2510.22084) reports of its own: LoRA on 750 template sentences."""


def share(successes: int, draws: int) -> dict[str, Any]:
    """A share with its counts and Wilson interval; its value is null without draws."""
    low, high = wilson(successes, draws)
    value = successes / draws if draws else None
    return {"value": value, "low": low, "high": high, "accepted": successes, "drawn": draws}


def yields(texts: Mapping[Key, str], task: Task, event: Event) -> dict[str, Any]:
    """The share that passes: of all draws, of each occupation's, and as an estimate of p0.

    An occupation that has enough is drawn no more, so all draws together weigh the hard ones heavily. For p0, every
    occupation counts alike: it is the share among the first D draws of each, D being the fewest that any has.
    """
    passed: dict[str, list[int]] = {occupation: [] for occupation in task.names}
    drawn = dict.fromkeys(task.names, 0)
    for key, text in texts.items():
        drawn[key.occupation] += 1
        if task.complies(text, event):
            passed[key.occupation].append(key.run_id)
    first = min(drawn.values())
    balanced = share(sum(run <= first for runs in passed.values() for run in runs), first * len(task.names))
    p0 = {
        "value": balanced["value"],
        "low": balanced["low"],
        "high": balanced["high"],
        "n": balanced["drawn"],
        "event": event,
        "how": f"share of the first {plural(first, 'draw', one='')} of each of "
        f"{plural(len(task.names), 'occupation')}, 95 % Wilson interval",
    }
    return {
        "p0": p0 if first else None,
        "yield": share(sum(map(len, passed.values())), sum(drawn.values())),
        "yields": {occupation: share(len(passed[occupation]), drawn[occupation]) for occupation in task.names},
    }


def mean_over_occupations(values: Mapping[Key, float]) -> dict[str, float]:
    """{value, low, high} of the mean, every occupation with equally many values; the interval is normal, with the
    variance within occupations (those of the values are all there are, not a sample). Raises UserError for one value,
    of which there is no interval."""
    groups: dict[str, list[float]] = {}
    for key, value in values.items():
        groups.setdefault(key.occupation, []).append(value)
    runs = {len(group) for group in groups.values()}
    assert len(runs) == 1, "every occupation has equally many values"
    mean = statistics.fmean(values.values())
    n = runs.pop()
    if n > 1:
        variance = sum(statistics.variance(group) / n for group in groups.values()) / len(groups) ** 2
    elif len(values) > 1:
        variance = statistics.variance(values.values()) / len(values)
    else:
        raise UserError("one sentence tells nothing of how far others lie: ask for more with --kl-sentences")
    half = Z_95 * math.sqrt(variance)
    return {"value": mean, "low": mean - half, "high": mean + half}


def first_look(texts: Sequence[str], task: Task) -> str:
    """What a model's sentences come to, in one line; for the default task below the public study's result for
    supervised fine-tuning.

    Entropy is that of the terms' occurrences in bits, the mean over the classes; pairs are of a sentence's first terms.
    """
    matches = [task.match(text) for text in texts]
    complete = sum(match.complete for match in matches)
    pairs = pair_counts(match.first for match in matches)
    entropy = 0.0
    for each in task.classes:
        counts = Counter({term: sum(match.counts.get(term, 0) for match in matches) for term in each.terms})
        entropy += math.log2(effective(counts) or 1.0)
    share = 100 * complete / len(texts) if texts else 0.0
    line = (
        f"this model       {share:.2f} % {task.all_classes}, entropy {entropy / len(task.classes):.3f} bits, "
        f"{len(pairs)} {task.pair_noun}, perplexity: equipoise evaluate, n {len(texts):,}"
    )
    return f"the study's SFT  {STUDY}\n{line}" if task == PROTOCOL else line
