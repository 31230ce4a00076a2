"""The trade-off: how far from the base model a compliance must be and is, and who is best in adherence or fluency."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from equipoise.evaluation.counted import Sample
from equipoise.evaluation.intervals import drawn_occupations, put_together
from equipoise.evaluation.results import FEWEST, Estimate, Frontier, FrontierPoint, KLParts, ParetoPoint
from equipoise.evaluation.side import Side
from equipoise.evaluation.wording import listed, untrained
from equipoise.measures.decomposition import Outcomes, Pair, PairRates, least_variety, pooled, split
from equipoise.measures.shares import kl_bound
from equipoise.measures.variety import effective

Event = Literal["strict", "both"]


def bound(compliance: float, p0: Estimate) -> Estimate:
    """kl(compliance‖p0) with the interval that p0's gives it. None for what is infinite."""
    assert p0.value is not None
    value = kl_bound(compliance, p0.value)
    low, high = None, None
    if p0.low is not None and p0.high is not None:
        ends = [kl_bound(compliance, p0.low), kl_bound(compliance, p0.high)]
        low = 0.0 if p0.low <= compliance <= p0.high else min(ends)
        high = max(*ends, value)
    note = "" if math.isfinite(value) else "p0 was observed as 0: only the lower end is known"
    return Estimate(
        _finite(value), _finite(low), _finite(high), p0.n, "none" if low is None else p0.interval, note=note
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def base_rate(
    event: Event, sides: Mapping[str, list[Side]], metrics: Mapping[str, Mapping[str, Estimate]], base: str | None
) -> tuple[Estimate | None, str]:
    """p0 and where it is from: the method named as the base, a side file, or a method that is called prompt-only."""
    named = base is not None
    if base is None:
        told = [(name, side.p0) for name, own in sides.items() for side in own if side.p0 and side.event == event]
        if told:
            name, p0 = max(told, key=lambda pair: pair[1].n)
            return p0, f"costs file of {name}" + (f": {p0.note}" if p0.note else "")
        called = untrained(metrics)
        missing = "no costs file gives p0 of this event, and"
        if len(called) > 1:
            alike = f"{listed(called)} are all called as the untrained model may be"
            return None, f"{missing} {alike}; name it with --base"
        if not called:
            return None, f"{missing} no method is called Prompt-Only; name the untrained one with --base"
        (base,) = called
    share = metrics[base][event]
    if share.wilson is None:
        return None, f"{base} has no sentences"
    how = "which --base names" if named else "taken for the untrained model because of its name; --base overrules"
    return Estimate(share.value, *share.wilson, n=share.n, interval="wilson"), f"{share.n:,} rows of {base}, {how}"


def frontier(
    event: Event,
    samples: Mapping[str, Sample],
    metrics: Mapping[str, Mapping[str, Estimate]],
    sides: Mapping[str, list[Side]],
    kl: Mapping[str, Estimate | None],
    base: str | None,
    judge: str | None,
) -> Frontier:
    p0, source = base_rate(event, sides, metrics, base)
    rates, pairs_event, pairs_source = base_pairs(event, sides)
    points = []
    for method, own in metrics.items():
        compliance, distance = own[event], kl[method]
        least = None if p0 is None or compliance.value is None else bound(compliance.value, p0)
        known = least is not None and least.value is not None and distance is not None and distance.value is not None
        excess = distance.value - least.value if known else None  # type: ignore[operator, union-attr]
        parts = None if rates is None else kl_parts([s.outcomes.get(pairs_event, {}) for s in sides[method]], rates)
        points.append(FrontierPoint(method, compliance, distance, least, excess, parts))
    pareto = () if judge is None else _pareto(event, samples, metrics, judge)
    curve = () if rates is None else tuple(least_variety(rates))
    return Frontier(event, p0, source, tuple(points), pareto, pairs_event, curve, pairs_source)


def base_pairs(event: Event, sides: Mapping[str, list[Side]]) -> tuple[PairRates | None, Event, str]:
    """How often the base model succeeds with each pair, at which event, and which side file says so: the one with most
    sentences, of `event` where there is one, else of the other."""
    other: Event = "both" if event == "strict" else "strict"
    for own in (event, other):
        told = [(name, side.pair_rates[own]) for name, s in sides.items() for side in s if own in side.pair_rates]
        if told:
            name, rates = max(told, key=lambda pair: pair[1].n)
            return rates, own, f"importance weights of {rates.n:,} sentences, in the costs file of {name}"
    return None, event, "no costs file tells how often the base model succeeds with each pair; Ctrl-G's does"


def kl_parts(samples: Sequence[Mapping[Pair | None, Outcomes]], rates: PairRates) -> KLParts | None:
    """Of the sentences of all of a method's files together; None where there are fewer than two."""
    seen = pooled(samples)
    n = sum(each.n for each in seen.values())
    if n < 2:
        return None
    made = split(seen, rates)
    counts = Counter({pair: each.n for pair, each in seen.items() if pair is not None})
    kl, compliance, variety, waste = (
        Estimate(part.value, part.low, part.high, n, "given")
        for part in (made.kl, made.compliance, made.variety, made.waste)
    )
    return KLParts(made.share, effective(counts), kl, compliance, variety, waste, made.unseen)


def members(adherence: np.ndarray, fluency: np.ndarray) -> np.ndarray:
    """(…, methods) bool: not dominated, where more adherence and a lower NLL are better."""
    a, f = adherence[..., :, None], fluency[..., :, None]
    b, g = adherence[..., None, :], fluency[..., None, :]
    dominated = ((b >= a) & (g <= f) & ((b > a) | (g < f))).any(-1)
    return np.asarray(~dominated)


def _pareto(
    event: Event, samples: Mapping[str, Sample], metrics: Mapping[str, Mapping[str, Estimate]], judge: str
) -> tuple[ParetoPoint, ...]:
    key = f"nll/median@{judge}"
    known = [m for m in metrics if metrics[m][event].value is not None and metrics[m][key].value is not None]
    able = [m for m in known if min(metrics[m][event].n, metrics[m][key].n) >= FEWEST]
    front: dict[str, bool] = {}
    support: dict[str, float] = {}
    if able:
        values = [[metrics[m][k].value or 0.0 for m in able] for k in (event, key)]
        front = dict(zip(able, members(np.array(values[0]), np.array(values[1])).tolist(), strict=True))
        support = dict(zip(able, _support(event, [samples[m] for m in able], judge) or [], strict=False))
    return tuple(
        ParetoPoint(m, metrics[m][event], metrics[m][key], judge, front.get(m, False), support.get(m)) for m in known
    )


def _support(event: Event, samples: list[Sample], judge: str) -> list[float] | None:
    """In which share of draws of occupations (of those common to all) and sentences each method is a member; fluency is
    there the mean over occupations of their medians."""
    common = [o for o in samples[0].occupations if all(o in s.occupations for s in samples)]
    drawn = [drawn_medians(s, judge, common) for s in samples]
    if len(common) < 2 or any(d is None for d in drawn):
        return None
    draws, seed = samples[0].draws, samples[0].seed
    chosen_BK = drawn_occupations(len(common), draws, seed)
    adherence, fluency = [], []
    for sample, medians_OB in zip(samples, drawn, strict=True):
        assert medians_OB is not None
        places = [sample.occupations.index(o) for o in common]
        column = list(sample.row_metrics).index(event)
        shares_OBM = sample.resamples.drawn_OBM[places][:, :, column : column + 1]
        adherence.append(put_together(shares_OBM, chosen_BK)[..., 0].mean(1))
        fluency.append(put_together(medians_OB[..., None], chosen_BK)[..., 0].mean(1))
    return [float(x) for x in members(np.stack(adherence, 1), np.stack(fluency, 1)).mean(0)]


def drawn_medians(sample: Sample, judge: str, occupations: list[str]) -> np.ndarray | None:
    """(O, B) medians of sentences drawn anew within each occupation; None where one has no scored sentence.

    The k-th smallest of n draws with replacement is the value at a place that follows a beta distribution, so the
    median is drawn directly.
    """
    generator = np.random.default_rng([*sample.own_seed, 2])
    out = np.empty((len(occupations), sample.draws))
    for i, occupation in enumerate(occupations):
        values = sample.judges[judge].nll_N[sample.occupation_of == sample.occupations.index(occupation)]
        values = np.sort(values[np.isfinite(values)])
        n = len(values)
        if n == 0:
            return None
        k = (n + 1) // 2
        lower = generator.beta(k, n - k + 1, sample.draws)
        upper = lower if n % 2 else lower + (1 - lower) * generator.beta(1, n - k, sample.draws)
        # A uniform number u in [0, 1) falls on the value at place ⌊n·u⌋.
        places = [np.minimum((u * n).astype(np.int64), n - 1) for u in (lower, upper)]
        out[i] = (values[places[0]] + values[places[1]]) / 2
    return out
