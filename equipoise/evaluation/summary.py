"""The metrics of one method: numbers per row, per occupation and over all, with their intervals."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from equipoise.evaluation import diversity
from equipoise.evaluation.counted import Sample
from equipoise.evaluation.equal_n import dependent_on_n, subsample
from equipoise.evaluation.fairness import fairness_by_occupation, fairness_estimates
from equipoise.evaluation.intervals import (
    NO_SPREAD,
    OUTSIDE,
    Array,
    Interval,
    Resamples,
    Z,
    clustered_wilson,
    jackknife,
    median,
    two_level,
)
from equipoise.evaluation.measure import Measured
from equipoise.evaluation.results import Duplicates, Estimate, Parts
from equipoise.measures.shares import wilson
from equipoise.measures.variety import effective, pair_counts
from equipoise.protocol.plural import plural

STUDY_LARGEST_PPL = 10_000
"""Texts of this perplexity or more the public study's script leaves out of its mean."""
SELF_BLEU_TEXTS = 50
SELF_BLEU_DRAWS = 3
"""Its cost grows with the square of the texts, so it is the mean over small subsamples."""


def estimates(sample: Sample, self_bleu_texts: int, base: Sample | None = None) -> dict[str, Estimate]:
    """Every metric over all rows; `base`: the untrained model's sentences, where a method is known to be it."""
    n = len(sample.rows)
    out = _means(sample)
    out |= _held_out(sample)
    out |= _balance(sample)
    everything = np.arange(n)
    numbers = dependent_on_n(sample, everything)
    for key, value in numbers.items():
        if key == "pairs/effective":
            continue
        out[key] = Estimate(value, n=n, note="" if value is not None else "nothing to count")
    out["pairs/effective"] = _effective_pairs(sample, numbers["pairs/effective"])
    out["pairs/unique"] = Estimate(numbers["pairs/unique"], n=int((sample.pair_of >= 0).sum()))
    out["self_bleu"] = _self_bleu(sample, self_bleu_texts)
    hits_NK = np.stack([sample.substrings_NT[:, own].any(1) for own in sample.of_class], 1)
    for key, flags in (("study/both", hits_NK.all(1)), ("study/either", hits_NK.any(1))):
        out[key] = _clustered(flags.astype(float), sample)
    for name in sample.judges:
        out |= _fluency(sample, name)
    return out | fairness_estimates(sample, base)


def occupation_estimates(sample: Sample) -> dict[str, dict[str, Estimate]]:
    """What makes sense per occupation; Wilson intervals for shares, which hold for that occupation alone."""
    out: dict[str, dict[str, Estimate]] = {}
    fair = fairness_by_occupation(sample)
    for o, occupation in enumerate(sample.occupations):
        own = np.flatnonzero(sample.occupation_of == o)
        found: dict[str, Estimate] = {}
        for key, column in sample.row_metrics.items():
            value = float(column[own].mean())
            if key in ("words", "reward", "terms"):
                found[key] = Estimate(value, n=len(own))
            else:
                ends = wilson(round(float(column[own].sum())), len(own), Z)
                found[key] = Estimate(value, *ends, n=len(own), interval="wilson", wilson=ends)
        counted = pair_counts(sample.pairs[i] for i in own)
        n, note = counted.total(), "" if counted else _no_pair(sample)
        found["pairs/unique"] = Estimate(float(len(counted)), n=n)
        found["pairs/effective"] = Estimate(effective(counted) if counted else None, n=n, note=note)
        for name, judge in sample.judges.items():
            values = judge.nll_N[own][np.isfinite(judge.nll_N[own])]
            middle = float(np.median(values)) if len(values) else None
            found[f"nll/median@{name}"] = Estimate(middle, n=len(values), note="" if len(values) else "no token scored")
        out[occupation] = found | fair[o]
    return out


def duplicates(rows: Sequence[Measured]) -> Duplicates:
    counts: dict[tuple[str, str], int] = {}
    for m in rows:
        if m.row.measured:
            key = (m.row.occupation, m.row.measured)
            counts[key] = counts.get(key, 0) + 1
    most = max(counts.values(), default=0)
    example = next((text for (_, text), count in counts.items() if count == most > 1), "")
    repeated = [count for count in counts.values() if count > 1]
    return Duplicates(sum(repeated) - len(repeated), len(repeated), most, example)


def parts(rows: Sequence[Measured]) -> Parts:
    rewards = [m.found.reward for m in rows]
    names = ("base", "bonus", "length_penalty", "repetition_penalty", "reward")
    return Parts(*(float(np.mean([getattr(r, name) for r in rewards])) for name in names))


def _means(sample: Sample) -> dict[str, Estimate]:
    bootstrap = two_level(sample.resamples.means_OM, sample.n_O, sample.resamples.drawn_OBM, sample.seed)
    out = {}
    for (key, column), interval in zip(sample.row_metrics.items(), bootstrap, strict=True):
        if key not in ("words", "reward", "terms"):
            out[key] = _clustered(column, sample)
        else:
            out[key] = _with(float(column.mean()), interval, "two-level", len(column))
    return out


def _with(value: float | None, interval: Interval | None, kind: str, n: int) -> Estimate:
    if value is None or interval is None:
        return Estimate(value, n=n, note="" if value is None else "one occupation: no interval")
    if interval.is_point:
        return Estimate(value, n=n, note=NO_SPREAD)
    return Estimate(value, interval.low, interval.high, n, kind, note=interval.note)  # type: ignore[arg-type]


def _clustered(column: Array, sample: Sample) -> Estimate:
    successes_O = _sums(sample, column)
    return _of_share(successes_O, sample.n_O)


def _sums(sample: Sample, column_N: Array) -> Array:
    return np.asarray(np.bincount(sample.occupation_of, column_N, minlength=len(sample.n_O)), dtype=np.float64)


def _of_share(successes_O: Array, n_O: Array) -> Estimate:
    successes, n = round(float(successes_O.sum())), round(float(n_O.sum()))
    found = clustered_wilson(successes_O, n_O)
    return Estimate(successes / n, found.low, found.high, n, "clustered-wilson", wilson(successes, n, Z), found.note)


def _share(sample: Sample, key: str, of_occupations: NDArray[np.bool_], lacking: str) -> Estimate:
    if not of_occupations.any():
        return Estimate(None, note=lacking)
    successes_O = _sums(sample, sample.row_metrics[key])
    return _of_share(successes_O[of_occupations], sample.n_O[of_occupations])


def _ratio(sample: Sample, numerator_N: Array, denominator_N: Array) -> tuple[float, Interval | None]:
    """Σ numerator / Σ denominator and its two-level interval, by linearisation: each row counts as the ratio plus its
    residual, whose mean is the ratio."""
    ratio = float(numerator_N.sum() / denominator_N.sum())
    linear = ratio + (numerator_N - ratio * denominator_N) / denominator_N.mean()
    drawn = Resamples(linear[:, None], sample.occupation_of, sample.draws, sample.own_seed)
    (interval,) = two_level(drawn.means_OM, sample.n_O, drawn.drawn_OBM, sample.seed)
    return ratio, interval


def _held_out(sample: Sample) -> dict[str, Estimate]:
    """Strict success over the task's occupations that are trained on and over those held out, where there are such."""
    task = sample.task
    if not task.held_out:
        return {}
    trained = np.array([o in task.training_names(holdout=True) for o in sample.occupations])
    held_out = np.array([o in task.held_out for o in sample.occupations])
    return {
        "strict/train": _share(sample, "strict", trained, "no row of an occupation that is trained on"),
        "strict/heldout": _share(sample, "strict", held_out, "no row of a hold-out occupation"),
    }


def _balance(sample: Sample) -> dict[str, Estimate]:
    """Each class's share of the terms that are mentioned; of two classes that of the first, and their ratio."""
    names = sample.task.lexicon.names
    mentions_NK = sample.terms_NK.astype(float)
    mentions = int(mentions_NK.sum())
    ratio = f"{names[0]}_per_{names[1]}" if len(names) == 2 else ""
    shared = names if len(names) > 2 else names[: len(names) - 1]
    if mentions == 0:
        return dict.fromkeys(
            [*(f"{name}_share" for name in shared), *filter(None, [ratio])], Estimate(None, note="no row holds a term")
        )
    out: dict[str, Estimate] = {}
    for k, name in enumerate(shared):
        share, interval = _ratio(sample, mentions_NK[:, k], mentions_NK.sum(1))
        if interval is not None:
            interval = Interval(max(interval.low, 0.0), min(interval.high, 1.0), interval.note)
        out[f"{name}_share"] = _with(share, interval, "two-level", mentions)
        if ratio:
            out[ratio] = _odds(share, interval, mentions, sample.task.labels[1])
    return out


def _odds(share: float, interval: Interval | None, mentions: int, other: str) -> Estimate:
    """How often the first of two classes is mentioned for each mention of the other, from its share of both."""
    if share == 1:
        return Estimate(None, n=mentions, note=f"no {other} term to divide by")
    if interval is not None and interval.high >= 1:
        return Estimate(share / (1 - share), n=mentions, note="the interval has no upper end")
    if interval is None:
        return _with(share / (1 - share), None, "two-level", mentions)
    odds = Interval(interval.low / (1 - interval.low), interval.high / (1 - interval.high), interval.note)
    return _with(share / (1 - share), odds, "two-level", mentions)


def _self_bleu(sample: Sample, texts: int) -> Estimate:
    draws = 1 if texts >= len(sample.rows) else SELF_BLEU_DRAWS
    chosen = [subsample(sample, texts, sample.seed + i) for i in range(draws)]
    scores = [diversity.self_bleu([sample.rows[i].row.measured for i in rows]) for rows in chosen]
    known = [score for score in scores if score is not None]
    if not known:
        return Estimate(None, note="fewer than two texts")
    return Estimate(
        float(np.mean(known)), n=texts, note=f"mean of {plural(len(known), 'subsample')} of {plural(texts, 'text')}"
    )


def _no_pair(sample: Sample) -> str:
    return f"no row holds {sample.task.all_classes}"


def _effective_pairs(sample: Sample, value: float | None) -> Estimate:
    kept = sample.pair_of >= 0
    if value is None:
        return Estimate(None, n=0, note=_no_pair(sample))
    width = sample.pair_numbers
    place = sample.occupation_of * width + sample.pair_of
    size = len(sample.occupations) * width
    counts_OT = np.bincount(place[kept], minlength=size).reshape(-1, width).astype(float)

    def nats(counts: Array) -> Array:
        return diversity.entropy(counts) * np.log(2)

    interval = jackknife(nats, counts_OT, sample.task.pair_count)
    if interval is not None and interval.note == OUTSIDE:
        # "48.4 [48.4, 93.3]" would pass the ends of two different numbers off as one interval.
        return Estimate(value, n=int(kept.sum()), note=interval.note)
    if interval is not None:  # it reaches to the value, which is rounded in another place
        interval = Interval(min(interval.low, value), max(interval.high, value), interval.note)
    return _with(value, interval, "jackknife", int(kept.sum()))


def _fluency(sample: Sample, name: str) -> dict[str, Estimate]:
    keys = (f"nll/median@{name}", f"nll/token_weighted@{name}", f"study/ppl@{name}")
    judge = sample.judges[name]
    scored = np.isfinite(judge.nll_N)
    n = int(scored.sum())
    if n == 0:
        return dict.fromkeys(keys, Estimate(None, note="no token scored"))
    values, occupation_of = judge.nll_N[scored], _renumbered(sample.occupation_of[scored])
    tokens = judge.tokens_N[scored]
    part = Sample(
        [m for m, s in zip(sample.rows, scored, strict=True) if s], sample.task, {}, {}, sample.draws, sample.seed
    )
    weighted, interval = _ratio(part, values * tokens, tokens)
    return {
        keys[0]: _with(float(np.median(values)), median(values, occupation_of), "woodruff", n),
        keys[1]: _with(weighted, interval, "two-level", n),
        keys[2]: _perplexity(values),
    }


def _perplexity(values_N: Array) -> Estimate:
    """The mean perplexity as the public study's script takes it: without texts that reach `STUDY_LARGEST_PPL`."""
    kept = values_N < np.log(STUDY_LARGEST_PPL)
    n, left = int(kept.sum()), int((~kept).sum())
    note = "a few odd texts decide a mean of perplexities"
    if left:
        note = (
            f"{left:,} of {len(values_N):,} texts with a perplexity of {STUDY_LARGEST_PPL:,} or more are left out, as "
            f"in the study; {note}"
        )
    return Estimate(float(np.exp(values_N[kept]).mean()) if n else None, n=n, note=note)


def _renumbered(occupation_of: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 … without gaps."""
    return np.unique(occupation_of, return_inverse=True)[1]
