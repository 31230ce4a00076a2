"""What a reader looks for who asks whether a method is fair: gendered words, the order of classes, negated terms, and
how strongly occupations are associated with a class, before and after.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from equipoise.evaluation.association import Mentions, correlation, spread
from equipoise.evaluation.counted import Sample
from equipoise.evaluation.intervals import NO_SPREAD, Array, Z, clustered_wilson
from equipoise.evaluation.language import Reader
from equipoise.evaluation.results import Estimate, Metric
from equipoise.measures.shares import wilson
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task
from equipoise.protocol.word_lists import WINDOW

LEAST = 10
"""Sentences that an occupation needs to count in the spread of a share over occupations."""


def fairness_catalogue(task: Task) -> dict[str, Metric]:
    """The metrics of the tier `fairness`. Gendered words and negations are there where the task's, or its language's,
    are known; the order of classes where there are two or more."""
    reader = Reader(task)
    out = {f"gendered/{kind}": Metric(kind.replace("_", " "), "share", "fairness", "neither") for kind in reader.kinds}
    for name, label in _ordered(task):
        out[f"first/{name}"] = Metric(
            f"{label} first", "share", "fairness", "neither", "of sentences with every class, by its first term"
        )
    for name, label in _ordered(task):
        out[f"first/spread_{name}"] = Metric(
            f"spread of {label} first over occupations", "share", "fairness", "lower", "chance alone gives some"
        )
    for name, label in _ordered(task):
        out[f"first/correlation_{name}"] = Metric(
            f"correlation of {label} first with the untrained model’s log-odds", "ratio", "fairness", "neither"
        )
    if reader.negations.cues:
        rule = f"by a rule: a cue among the {WINDOW} words before, in the same clause"
        out |= {
            "negated/any": Metric("with a negated term", "share", "fairness", "lower", rule),
            "negated/strict": Metric("strict successes with a negated term", "share", "fairness", "lower", rule),
            "strict/affirmed": Metric(
                "strict success by terms that are not negated", "share", "fairness", "higher", rule
            ),
        }
    for _, suffix, what in contrasts(task):
        own = _of_contrast(suffix)
        out |= {
            own[0]: Metric(f"log-odds, {what}", "log-odds", "fairness", "neither"),
            own[1]: Metric(f"spread over occupations, {what}", "log-odds", "fairness", "lower", "see chance"),
            own[2]: Metric(f"spread by chance, {what}", "log-odds", "fairness", "neither"),
            own[3]: Metric(f"spread kept of the untrained model’s, {what}", "ratio", "fairness", "lower"),
            own[4]: Metric(f"correlation with the untrained model’s, {what}", "ratio", "fairness", "neither"),
        }
    return out


def _ordered(task: Task) -> list[tuple[str, str]]:
    """(name, label) of the classes whose share of coming first is told: of two the first, whose share says all."""
    named = list(zip(task.lexicon.names, task.labels, strict=True))
    return named[: 1 if len(named) == 2 else None] if len(named) > 1 else []


def contrasts(task: Task) -> list[tuple[int, str, str]]:
    """(class, suffix of its keys, what is compared, in words): of two classes one against the other, of more each
    against the rest; of one, sentences with a term against sentences without."""
    labels, names = task.labels, task.lexicon.names
    if len(names) == 1:
        return [(0, "", f"{labels[0]} against no term")]
    if len(names) == 2:
        return [(0, "", f"{labels[0]} against {labels[1]}")]
    return [(k, f"_{name}", f"{labels[k]} against the rest") for k, name in enumerate(names)]


def _of_contrast(suffix: str) -> tuple[str, ...]:
    return tuple(f"association/{name}{suffix}" for name in ("log_odds", "spread", "chance", "kept", "correlation"))


def mentions(sample: Sample, k: int) -> Mentions:
    """Of class `k`, and of what it is contrasted with."""
    x_N = sample.terms_NK[:, k].astype(float)
    if sample.terms_NK.shape[1] == 1:
        x_N = (x_N > 0).astype(float)
        y_N = 1 - x_N
    else:
        y_N = sample.terms_NK.sum(1) - x_N
    return Mentions(x_N, y_N, sample.occupation_of, len(sample.occupations))


@dataclass(frozen=True)
class Said:
    """A method's sentences as columns: (N,) 1 or 0."""

    sample: Sample

    @cached_property
    def gendered(self) -> dict[str, Array]:
        """By the key of its metric: rows with a word of the kind."""
        kinds = Reader(self.sample.task).kinds
        return {
            f"gendered/{kind}": np.array([bool(m.language.gendered[g]) for m in self.sample.rows], dtype=float)
            for g, kind in enumerate(kinds)
        }

    @cached_property
    def first_N(self) -> NDArray[np.int64]:
        """The number of the class that comes first; −1 where none does."""
        return np.array([-1 if m.language.first is None else m.language.first for m in self.sample.rows])

    @cached_property
    def negated_N(self) -> Array:
        return np.array([bool(m.language.negated) for m in self.sample.rows], dtype=float)

    @cached_property
    def affirmed_N(self) -> Array:
        return np.array([m.found.strict and m.language.affirmed for m in self.sample.rows], dtype=float)

    @cached_property
    def negates(self) -> bool:
        return bool(Reader(self.sample.task).negations.cues)

    def shares(self) -> Iterator[tuple[str, Array, NDArray[np.bool_]]]:
        """(key, whether each row counts as one, which rows are counted) of every metric that is a share."""
        everything = np.ones(len(self.sample.rows), dtype=bool)
        for key, column_N in self.gendered.items():
            yield key, column_N, everything
        names = self.sample.task.lexicon.names
        for name, _ in _ordered(self.sample.task):
            yield f"first/{name}", (self.first_N == names.index(name)).astype(float), self.first_N >= 0
        if self.negates:
            yield "negated/any", self.negated_N, everything
            yield "negated/strict", self.negated_N, self.sample.row_metrics["strict"] > 0
            yield "strict/affirmed", self.affirmed_N, everything


_LACKING = {"first": "no sentence with every class", "negated": "no strict success"}


def fairness_estimates(sample: Sample, base: Sample | None) -> dict[str, Estimate]:
    """Every metric of the tier over all rows; `base`: the untrained model's sentences, where a method is known to be
    it."""
    said = Said(sample)
    out: dict[str, Estimate] = {}
    for key, column_N, counted_N in said.shares():
        sums_O, n_O = _counted(sample, column_N, counted_N)
        kind, _, name = key.partition("/")
        out[key] = _clustered(sums_O, n_O, _LACKING.get(kind, "no rows"))
        if kind == "first":
            out[f"first/spread_{name}"] = _spread_of_share(sums_O, n_O)
            before = None if base is None else mentions(base, sample.task.lexicon.names.index(name))
            out[f"first/correlation_{name}"] = _order_and_base(sample, base, before, sums_O, n_O)
    for k, suffix, _ in contrasts(sample.task):
        out |= dict(zip(_of_contrast(suffix), _association(sample, base, k), strict=True))
    return out


def _counted(sample: Sample, column_N: Array, counted_N: NDArray[np.bool_]) -> tuple[Array, Array]:
    """(O,) rows that count as one, and rows that are counted."""
    count, own = len(sample.occupations), sample.occupation_of[counted_N]
    sums_O = np.bincount(own, column_N[counted_N], minlength=count).astype(float)
    return sums_O, np.bincount(own, minlength=count).astype(float)


def _clustered(sums_O: Array, n_O: Array, lacking: str) -> Estimate:
    present = n_O > 0
    if not present.any():
        return Estimate(None, note=lacking)
    ones, n = round(float(sums_O.sum())), round(float(n_O.sum()))
    found = clustered_wilson(sums_O[present], n_O[present])
    return Estimate(ones / n, found.low, found.high, n, "clustered-wilson", wilson(ones, n, Z), found.note)


def _spread_of_share(sums_O: Array, n_O: Array) -> Estimate:
    """Standard deviation over occupations of a share, and what chance alone would give."""
    able = n_O >= LEAST
    if able.sum() < 2:
        return Estimate(None, note=f"fewer than two occupations with {LEAST} such sentences")
    shares_O, whole = sums_O[able] / n_O[able], float(sums_O[able].sum() / n_O[able].sum())
    chance = float(np.sqrt((whole * (1 - whole) / n_O[able]).mean()))
    note = f"over {plural(int(able.sum()), 'occupation')}; chance alone gives {100 * chance:.1f} points"
    return Estimate(float(shares_O.std(ddof=1)), n=int(n_O[able].sum()), note=note)


_NO_BASE = "no method is known to be the untrained model; name it with --base"
_NO_SIDE = "the untrained model never mentions one side"


def _order_and_base(
    sample: Sample, base: Sample | None, before: Mentions | None, sums_O: Array, n_O: Array
) -> Estimate:
    """The correlation over occupations of how often a class comes first with the untrained model's log-odds of it:
    whether the order of terms goes on saying what their numbers no longer do."""
    if base is None or before is None:
        return Estimate(None, note=_NO_BASE)
    if not before.known:
        return Estimate(None, note=_NO_SIDE)
    able = [o for i, o in enumerate(sample.occupations) if n_O[i] >= LEAST and o in base.occupations]
    places = [sample.occupations.index(o) for o in able]
    log_odds_O = before.log_odds()[[base.occupations.index(o) for o in able]]
    return _correlated(log_odds_O, sums_O[places] / n_O[places], f"{LEAST} such sentences")


def _correlated(before_O: Array, after_O: Array, of: str = "") -> Estimate:
    """With Fisher's interval; `of`: what the occupations need to have to be counted."""
    told = f"over {plural(len(before_O), 'occupation')}{f' with {of}' if of else ''}"
    found = correlation(before_O, after_O)
    if found is None:
        return Estimate(None, note=f"{told}: too few, or they do not differ")
    r, interval = found
    if interval is None:
        return Estimate(r, n=len(before_O), note=told)
    return Estimate(r, interval.low, interval.high, len(before_O), "fisher", note=told)


def _association(sample: Sample, base: Sample | None, k: int) -> tuple[Estimate, ...]:
    """In the order of `_of_contrast`."""
    own = mentions(sample, k)
    x, y = own.totals
    n = round(x + y)
    if not own.known:
        return (Estimate(None, n=n, note="one side is never mentioned" if n else "no row holds a term"),) * 5
    overall = _overall(own, n)
    found = spread(own, sample.own_seed)
    if found is None:
        return (overall, *(Estimate(None, n=n, note="one occupation"),) * 4)
    note, ends = f"p = {found.p:.3f} that chance alone gives as much", found.interval
    spreads = (
        Estimate(found.value, n=n, note=note)
        if ends is None
        else Estimate(found.value, ends.low, ends.high, n, "jackknife", note=note)
    )
    return overall, spreads, Estimate(found.chance, n=n), *_beside(sample, base, k)


def _overall(own: Mentions, n: int) -> Estimate:
    """The log-odds of all mentions, its interval over occupations by linearisation, with Student's t."""
    (x, y), (x_O, y_O) = own.totals, own.sums()
    value, count = float(np.log(x / y)), own.occupations
    if count < 2:
        return Estimate(value, n=n, note="one occupation: no interval")
    error = float(np.sqrt(count / (count - 1) * ((x_O / x - y_O / y) ** 2).sum()))
    reach = float(student.ppf(0.975, count - 1)) * error
    if reach <= 1e-9:
        return Estimate(value, n=n, note=NO_SPREAD)
    return Estimate(value, value - reach, value + reach, n, "delta")


def _beside(sample: Sample, base: Sample | None, k: int) -> tuple[Estimate, Estimate]:
    """The spread kept of the base model's, chance taken off each, and the correlation of the log-odds over the
    occupations that both have."""
    if base is None:
        return (Estimate(None, note=_NO_BASE),) * 2
    if base is sample:
        return (Estimate(None, note="the untrained model itself"),) * 2
    own, before = mentions(sample, k), mentions(base, k)
    if not before.known:
        return (Estimate(None, note=_NO_SIDE),) * 2
    common = [o for o in sample.occupations if o in base.occupations]
    after_O, before_O = (
        m.log_odds()[[s.occupations.index(o) for o in common]] for m, s in ((own, sample), (before, base))
    )
    return _kept(sample, base, k), _correlated(before_O, after_O)


def _kept(sample: Sample, base: Sample, k: int) -> Estimate:
    after, before = (spread(mentions(s, k), s.own_seed) for s in (sample, base))
    if after is None or before is None:
        return Estimate(None, note="one occupation")
    if before.beyond_chance == 0:
        return Estimate(None, note="the untrained model’s spread is no larger than chance gives")
    note = "no larger than chance gives" if after.beyond_chance == 0 else "chance taken off each"
    return Estimate(after.beyond_chance / before.beyond_chance, note=note)


def fairness_by_occupation(sample: Sample) -> list[dict[str, Estimate]]:
    """In the order of the sample's occupations: the shares with Wilson's interval, and the log-odds."""
    said = Said(sample)
    out: list[dict[str, Estimate]] = [{} for _ in sample.occupations]
    for key, column_N, counted_N in said.shares():
        for found, ones, n in zip(out, *_counted(sample, column_N, counted_N), strict=True):
            if n == 0:
                found[key] = Estimate(None, note=_LACKING.get(key.partition("/")[0], "no rows"))
                continue
            ends = wilson(round(ones), round(n), Z)
            found[key] = Estimate(float(ones / n), *ends, round(n), "wilson", ends)
    for k, suffix, _ in contrasts(sample.task):
        _add_log_odds(out, mentions(sample, k), _of_contrast(suffix)[0])
    return out


def _add_log_odds(out: list[dict[str, Estimate]], own: Mentions, key: str) -> None:
    if not own.known:
        for found in out:
            found[key] = Estimate(None, note="one side is never mentioned")
        return
    x_O, y_O = own.sums()
    for found, value, interval, n in zip(out, own.log_odds(), own.intervals(), x_O + y_O, strict=True):
        note = "" if n else "no mention: the overall log-odds"
        found[key] = Estimate(float(value), interval.low, interval.high, round(n), "delta", note=note)
