"""Every method against every other, paired over the occupations that both have."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from equipoise.evaluation.counted import Sample
from equipoise.evaluation.frontier import drawn_medians
from equipoise.evaluation.intervals import NO_SPREAD, Array, Interval, clustered_wilson, mean_with_t, two_level
from equipoise.evaluation.mixed_logit import mixed_logit
from equipoise.evaluation.results import Comparison, Estimate, MixedLogit
from equipoise.evaluation.significance import cliffs_delta, cohens_h, holm, non_inferiority, sign_flip, signed_rank
from equipoise.protocol.plural import plural

SHARES = ("strict", "both", "in_length", "complete")
MEANS = (*SHARES, "terms", "words")
EVENTS = ("strict", "both")
"""What a mixed logit is fitted to."""


def compare(
    samples: Mapping[str, Sample], occupations: Mapping[str, Mapping[str, Mapping[str, Estimate]]], margin: float
) -> tuple[Comparison, ...]:
    """Comparisons of each metric for each pair of methods, the later one first: a − b. A metric is a family."""
    judges = list(next(iter(samples.values())).judges)
    out: list[Comparison] = []
    for metric in (*MEANS, "pairs/effective", *(f"nll/median@{name}" for name in judges)):
        family = [_pair(metric, a, b, samples, occupations, margin) for b, a in itertools.combinations(samples, 2)]
        corrected = holm([c.p_sign_flip for c in family])
        out += [replace(c, p_holm=p) for c, p in zip(family, corrected, strict=True)]
    return tuple(out)


def _pair(
    metric: str,
    a: str,
    b: str,
    samples: Mapping[str, Sample],
    occupations: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    margin: float,
) -> Comparison:
    both = [o for o in samples[a].occupations if o in occupations[b]]
    left = {o: occupations[a][o][metric].value for o in both}
    right = {o: occupations[b][o][metric].value for o in both}
    common = [o for o in both if left[o] is not None and right[o] is not None]
    notes = []
    if len(common) < max(len(occupations[a]), len(occupations[b])):
        notes.append(f"over the {plural(len(common), 'occupation')} for which both have a value")
    n_a, n_b = len(samples[a].rows), len(samples[b].rows)
    if n_a != n_b:
        hint = ", and this metric grows with n" if metric == "pairs/effective" else ""
        notes.append(f"unequal n: {n_a} and {n_b}{hint}")
    values_a = np.array([left[o] for o in common], dtype=float)
    values_b = np.array([right[o] for o in common], dtype=float)
    differences = values_a - values_b
    p, note = sign_flip(differences, samples[a].seed)
    interval = _interval(metric, samples[a], samples[b], common, differences)
    if interval is not None and interval.is_point:
        interval, told = None, NO_SPREAD
    else:
        told = interval.note if interval is not None else ""
    if told:
        notes.append(told)
    if note:
        notes.append(note)
    judged = metric.startswith("nll/")
    share = metric in SHARES and len(common) > 0
    return Comparison(
        metric=metric,
        family=metric,
        a=a,
        b=b,
        difference=float(differences.mean()) if len(common) else None,
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        p_sign_flip=p,
        p_wilcoxon=signed_rank(differences),
        p_holm=None,
        cohens_h=cohens_h(float(values_a.mean()), float(values_b.mean())) if share else None,
        cliffs_delta=cliffs_delta(values_a, values_b),
        tost=non_inferiority(values_a, values_b, margin) if judged else None,
        n_occupations=len(common),
        note="; ".join(notes),
        mixed=_mixed(metric, samples[a], samples[b], common) if metric in EVENTS else None,
    )


def _mixed(metric: str, a: Sample, b: Sample, common: Sequence[str]) -> MixedLogit | None:
    """Of the sentences about the occupations that both methods have."""
    if not common:
        return None
    columns = []
    for sample in (a, b):
        places = [sample.occupations.index(o) for o in common]
        n_O = sample.n_O[places]
        ones_O = n_O * sample.resamples.means_OM[places, list(sample.row_metrics).index(metric)]
        columns.append((np.round(ones_O), n_O))
    successes_OM, n_OM = (np.stack(own, 1) for own in zip(*columns, strict=True))
    return mixed_logit(successes_OM, n_OM)


def _interval(metric: str, a: Sample, b: Sample, common: Sequence[str], differences: Array) -> Interval | None:
    """Two-level: the same occupations are drawn for both, sentences by themselves. None for one occupation."""
    if len(common) < 2:
        return None
    drawn = [_drawn(metric, sample, common) for sample in (a, b)]
    if drawn[0] is None or drawn[1] is None:
        # Drawing sentences with replacement loses kinds of pairs, so occupations alone are the sample.
        return mean_with_t(list(differences))
    bounds = (-1.0, 1.0) if metric in SHARES else None
    draws = min(drawn[0].shape[1], drawn[1].shape[1])
    drawn_OBM = (drawn[0][:, :draws] - drawn[1][:, :draws])[..., None]
    (interval,) = two_level(differences[:, None], np.ones(len(common)), drawn_OBM, a.seed, bounds)
    if interval is not None and "differ" in interval.note and metric in SHARES:
        return _newcombe(*(_clustered(metric, sample, common) for sample in (a, b)))
    return interval


def _clustered(metric: str, sample: Sample, common: Sequence[str]) -> tuple[float, Interval]:
    places = [sample.occupations.index(o) for o in common]
    n_O = sample.n_O[places]
    sums_O = n_O * sample.resamples.means_OM[places, list(sample.row_metrics).index(metric)]
    return float(sums_O.sum() / n_O.sum()), clustered_wilson(sums_O, n_O)


def _newcombe(a: tuple[float, Interval], b: tuple[float, Interval]) -> Interval:
    """The interval of a difference of shares from the two shares' own (Newcombe 1998, Statistics in Medicine 17), for
    where too few occupations differ to draw from. It takes them as independent, which is wide where they are paired."""
    (p, own), (q, other) = a, b
    low = p - q - float(np.hypot(p - own.low, other.high - q))
    high = p - q + float(np.hypot(own.high - p, q - other.low))
    return Interval(max(low, -1.0), min(high, 1.0), "few occupations differ: interval from the two shares' own")


def _drawn(metric: str, sample: Sample, common: Sequence[str]) -> Array | None:
    """(O, B) values of sentences drawn anew within each occupation."""
    if metric.startswith("nll/"):
        return drawn_medians(sample, metric.partition("@")[2], list(common))
    if metric not in MEANS:
        return None
    places = [sample.occupations.index(o) for o in common]
    column = list(sample.row_metrics).index(metric)
    return sample.resamples.drawn_OBM[places][:, :, column]
