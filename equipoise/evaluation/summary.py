"""The metrics of one method: numbers per row, per occupation and over all, with their intervals.

Legend: N rows, O occupations, M row-wise metrics, T terms.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from equipoise.evaluation import diversity
from equipoise.evaluation.catalogue import DEPENDS_ON_N
from equipoise.evaluation.intervals import (
    Array,
    Interval,
    Resamples,
    clustered_wilson,
    jackknife,
    median,
    two_level,
    wilson,
)
from equipoise.evaluation.measure import Measured
from equipoise.evaluation.results import Duplicates, Estimate, Parts
from equipoise.protocol.lexicon import HOLDOUT, OCCUPATIONS, Lexicon

SUBSAMPLES = 10
"""Draws that a metric at equal n is averaged over."""
SELF_BLEU_TEXTS = 50
SELF_BLEU_DRAWS = 3
"""Its cost grows with the square of the texts, so it is the mean over small subsamples."""


class Fluency(NamedTuple):
    """One judge's view of the rows: nats per token (nan where a text has no token to score) and scored tokens."""

    nll_N: Array
    tokens_N: Array


@dataclass(frozen=True)
class Sample:
    """The rows of one method, ready to be counted."""

    rows: Sequence[Measured]
    lexicon: Lexicon
    judges: dict[str, Fluency]
    acceptable: dict[str, Array]
    """By classifier: 1 or 0 for each row."""
    draws: int
    seed: int
    """Of everything that is drawn; draws of sentences depend on the method's name too."""
    name: str = ""

    @cached_property
    def occupations(self) -> tuple[str, ...]:
        """The protocol's in its order, then others as they come."""
        present = dict.fromkeys(m.row.occupation for m in self.rows)
        return tuple([o for o in OCCUPATIONS if o in present] + [o for o in present if o not in OCCUPATIONS])

    @cached_property
    def occupation_of(self) -> NDArray[np.int64]:
        place = {occupation: i for i, occupation in enumerate(self.occupations)}
        return np.array([place[m.row.occupation] for m in self.rows], dtype=np.int64)

    @cached_property
    def n_O(self) -> Array:
        return np.bincount(self.occupation_of, minlength=len(self.occupations)).astype(float)

    @cached_property
    def row_metrics(self) -> dict[str, Array]:
        """(N,) numbers whose mean is the metric."""
        found = [m.found for m in self.rows]
        a = np.array([len(f.reward.agentic) for f in found])
        c = np.array([len(f.reward.communal) for f in found])
        columns = {
            "strict": np.array([f.strict for f in found]),
            "both": (a > 0) & (c > 0),
            "either": (a > 0) | (c > 0),
            "agentic_only": (a > 0) & (c == 0),
            "communal_only": (a == 0) & (c > 0),
            "neither": (a == 0) & (c == 0),
            "in_length": np.array([f.in_length for f in found]),
            "complete": np.array([f.complete for f in found]),
            "words": np.array([f.reward.words for f in found]),
            "reward": np.array([f.reward.reward for f in found]),
            "terms": a + c,
            "stuffed": (a > 1) | (c > 1),
            "repeated": np.array([f.repeated for f in found]),
            **{f"acceptable@{name}": values for name, values in self.acceptable.items()},
        }
        return {key: column.astype(float) for key, column in columns.items()}

    @cached_property
    def resamples(self) -> Resamples:
        return Resamples(np.stack(list(self.row_metrics.values()), 1), self.occupation_of, self.draws, self.own_seed)

    @property
    def own_seed(self) -> list[int]:
        return [self.seed, zlib.crc32(self.name.encode("utf-8", "surrogatepass"))]

    @cached_property
    def terms_NT(self) -> NDArray[np.bool_]:
        place = {term: i for i, term in enumerate(self.lexicon.terms)}
        out = np.zeros((len(self.rows), len(place)), dtype=bool)
        for i, m in enumerate(self.rows):
            for term in (*m.found.reward.agentic, *m.found.reward.communal):
                out[i, place[term]] = True
        return out

    @cached_property
    def substrings_NT(self) -> NDArray[np.bool_]:
        known: dict[str, tuple[bool, ...]] = {}
        for m in self.rows:
            if m.row.measured not in known:
                known[m.row.measured] = diversity.substrings(m.row.measured, self.lexicon.terms)
        return np.array([known[m.row.measured] for m in self.rows], dtype=bool)

    @cached_property
    def pair_of(self) -> NDArray[np.int64]:
        """(N,) place of the pair of the first term of each class in the flattened agentic × communal table, or −1."""
        agentic = {term: i for i, term in enumerate(self.lexicon.agentic)}
        communal = {term: i for i, term in enumerate(self.lexicon.communal)}
        width = len(communal)
        rewards = [m.found.reward for m in self.rows]
        return np.array(
            [
                agentic[r.agentic[0]] * width + communal[r.communal[0]] if r.agentic and r.communal else -1
                for r in rewards
            ],
            dtype=np.int64,
        )

    @cached_property
    def words_N(self) -> tuple[list[list[int]], list[list[int]]]:
        """Each text's words as numbers, as they are and with terms and occupation masked."""
        numbers: dict[str, int] = {}
        mask = diversity.Mask(self.lexicon)
        known: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        for m in self.rows:
            key = (m.row.measured, m.row.occupation)
            if key not in known:
                plain, masked = diversity.words_of(key[0]), diversity.words_of(mask(*key))
                known[key] = (
                    [numbers.setdefault(word, len(numbers)) for word in plain],
                    [numbers.setdefault(word, len(numbers)) for word in masked],
                )
        both = [known[m.row.measured, m.row.occupation] for m in self.rows]
        return [plain for plain, _ in both], [masked for _, masked in both]

    @property
    def cells(self) -> int:
        return len(self.lexicon.agentic) * len(self.lexicon.communal)


def estimates(sample: Sample, self_bleu_texts: int) -> dict[str, Estimate]:
    """Every metric over all rows."""
    n = len(sample.rows)
    out = _means(sample)
    trained = np.array([o not in HOLDOUT for o in sample.occupations])
    protocol = np.array([o in OCCUPATIONS for o in sample.occupations])
    out["strict/train"] = _share(sample, "strict", trained & protocol, "no row of an occupation that is trained on")
    out["strict/heldout"] = _share(sample, "strict", ~trained, "no row of a hold-out occupation")
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
    hits = sample.substrings_NT
    cut = len(sample.lexicon.agentic)
    a, c = hits[:, :cut].any(1), hits[:, cut:].any(1)
    for key, flags in (("study/both", a & c), ("study/either", a | c)):
        out[key] = _clustered(flags.astype(float), sample)
    for name in sample.judges:
        out |= _fluency(sample, name)
    return out


def occupation_estimates(sample: Sample) -> dict[str, dict[str, Estimate]]:
    """What makes sense per occupation; Wilson intervals for shares, which hold for that occupation alone."""
    out: dict[str, dict[str, Estimate]] = {}
    for o, occupation in enumerate(sample.occupations):
        own = np.flatnonzero(sample.occupation_of == o)
        found: dict[str, Estimate] = {}
        for key, column in sample.row_metrics.items():
            value = float(column[own].mean())
            if key in ("words", "reward", "terms"):
                found[key] = Estimate(value, n=len(own))
            else:
                ends = wilson(round(float(column[own].sum())), len(own))
                found[key] = Estimate(value, *ends, n=len(own), interval="wilson", wilson=ends)
        pairs = _histogram(sample.pair_of[own], sample.cells)
        n = int(pairs.sum())
        note = "" if n else "no row holds both classes"
        found["pairs/unique"] = Estimate(float((pairs > 0).sum()), n=n)
        found["pairs/effective"] = Estimate(diversity.effective(pairs), n=n, note=note)
        for name, judge in sample.judges.items():
            values = judge.nll_N[own][np.isfinite(judge.nll_N[own])]
            middle = float(np.median(values)) if len(values) else None
            found[f"nll/median@{name}"] = Estimate(middle, n=len(values), note="" if len(values) else "no token scored")
        out[occupation] = found
    return out


def dependent_on_n(sample: Sample, rows: NDArray[np.int64]) -> dict[str, float | None]:
    """The metrics that depend on how many rows there are, of the given rows."""
    cut = len(sample.lexicon.agentic)
    pairs = _histogram(sample.pair_of[rows], sample.cells)
    terms_NT, occupation_of = sample.terms_NT[rows], sample.occupation_of[rows]
    terms_OT = np.zeros((len(sample.occupations), terms_NT.shape[1]))
    np.add.at(terms_OT, occupation_of, terms_NT)
    terms_T = terms_OT.sum(0)
    plain, masked = ([words[i] for i in rows] for words in sample.words_N)
    hits = sample.substrings_NT[rows].astype(float)
    h_agentic, h_communal = (float(diversity.entropy(h.sum(0))) for h in (hits[:, :cut], hits[:, cut:]))
    out: dict[str, float | None] = {
        "pairs/unique": float((pairs > 0).sum()),
        "pairs/effective": diversity.effective(pairs),
        "unique_texts": len({sample.rows[i].row.measured for i in rows}) / len(rows),
        "distinct/1": diversity.distinct(plain, 1),
        "distinct/2": diversity.distinct(plain, 2),
        "distinct/3": diversity.distinct(plain, 3),
        "masked/unique": len({tuple(words) for words in masked}) / len(rows),
        "masked/distinct_2": diversity.distinct(masked, 2),
        "jsd/uniform_agentic": diversity.to_uniform(terms_T[:cut]),
        "jsd/uniform_communal": diversity.to_uniform(terms_T[cut:]),
        "jsd/occupations": diversity.between(terms_OT),
        "study/entropy_agentic": h_agentic,
        "study/entropy_communal": h_communal,
        "study/entropy": (h_agentic + h_communal) / 2,
        "study/pairs": float((hits[:, :cut].T @ hits[:, cut:] > 0).sum()),
    }
    assert out.keys() == set(DEPENDS_ON_N)
    return out


def at_equal_n(sample: Sample, n: int) -> dict[str, Estimate]:
    """The same at n rows: the mean over SUBSAMPLES seeded subsamples, or all rows where there are no more."""
    if n >= len(sample.rows):
        draws = [dependent_on_n(sample, np.arange(len(sample.rows)))]
        note = "all rows"
    else:
        draws = [dependent_on_n(sample, subsample(sample, n, sample.seed + i)) for i in range(SUBSAMPLES)]
        note = f"mean of {SUBSAMPLES} subsamples"
    out = {}
    for key in draws[0]:
        values = [v for draw in draws if (v := draw[key]) is not None]
        mean = float(np.mean(values)) if values else None
        out[key] = Estimate(mean, n=n, note=note if values else "nothing to count")
    return out


def subsample(sample: Sample, n: int, seed: int) -> NDArray[np.int64]:
    """n rows at random without replacement, the occupations in their proportions; all rows where there are no more."""
    generator = np.random.default_rng([seed, 1])
    order = generator.permutation(len(sample.rows))
    taken = np.zeros(len(sample.occupations))
    share = np.empty(len(order))
    for i in order:
        o = sample.occupation_of[i]
        share[i] = (taken[o] + generator.random()) / sample.n_O[o]
        taken[o] += 1
    return np.sort(np.argsort(share, kind="stable")[:n])


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
    return Estimate(value, interval.low, interval.high, n, kind, note=interval.note)  # type: ignore[arg-type]


def _clustered(column: Array, sample: Sample) -> Estimate:
    successes_O = _sums(sample, column)
    return _of_share(successes_O, sample.n_O)


def _sums(sample: Sample, column_N: Array) -> Array:
    return np.asarray(np.bincount(sample.occupation_of, column_N, minlength=len(sample.n_O)), dtype=np.float64)


def _of_share(successes_O: Array, n_O: Array) -> Estimate:
    successes, n = round(float(successes_O.sum())), round(float(n_O.sum()))
    found = clustered_wilson(successes_O, n_O)
    return Estimate(successes / n, found.low, found.high, n, "clustered-wilson", wilson(successes, n), found.note)


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


def _balance(sample: Sample) -> dict[str, Estimate]:
    counts = [m.found.reward for m in sample.rows]
    a = np.array([len(r.agentic) for r in counts], dtype=float)
    c = np.array([len(r.communal) for r in counts], dtype=float)
    mentions = int(a.sum() + c.sum())
    if mentions == 0:
        nothing = Estimate(None, note="no row holds a term")
        return {"agentic_share": nothing, "agentic_per_communal": nothing}
    share, interval = _ratio(sample, a, a + c)
    if interval is not None:
        interval = Interval(max(interval.low, 0.0), min(interval.high, 1.0), interval.note)
    out = {"agentic_share": _with(share, interval, "two-level", mentions)}
    if share == 1:
        out["agentic_per_communal"] = Estimate(None, n=mentions, note="no communal term to divide by")
    elif interval is None or interval.high >= 1:
        out["agentic_per_communal"] = Estimate(share / (1 - share), n=mentions, note="the interval has no upper end")
    else:
        odds = Interval(interval.low / (1 - interval.low), interval.high / (1 - interval.high), interval.note)
        out["agentic_per_communal"] = _with(share / (1 - share), odds, "two-level", mentions)
    return out


def _self_bleu(sample: Sample, texts: int) -> Estimate:
    draws = 1 if texts >= len(sample.rows) else SELF_BLEU_DRAWS
    chosen = [subsample(sample, texts, sample.seed + i) for i in range(draws)]
    scores = [diversity.self_bleu([sample.rows[i].row.measured for i in rows]) for rows in chosen]
    known = [score for score in scores if score is not None]
    if not known:
        return Estimate(None, note="fewer than two texts")
    return Estimate(float(np.mean(known)), n=texts, note=f"mean of {len(known)} subsamples of {texts} texts")


def _effective_pairs(sample: Sample, value: float | None) -> Estimate:
    n = int((sample.pair_of >= 0).sum())
    if value is None:
        return Estimate(None, n=0, note="no row holds both classes")
    place = sample.occupation_of * sample.cells + sample.pair_of
    size = len(sample.occupations) * sample.cells
    counts_OT = np.bincount(place[sample.pair_of >= 0], minlength=size).reshape(-1, sample.cells).astype(float)

    def nats(counts: Array) -> Array:
        return diversity.entropy(counts) * np.log(2)

    return _with(value, jackknife(nats, counts_OT, sample.cells), "jackknife", n)


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
        [m for m, s in zip(sample.rows, scored, strict=True) if s], sample.lexicon, {}, {}, sample.draws, sample.seed
    )
    weighted, interval = _ratio(part, values * tokens, tokens)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(np.minimum(values, 700)).mean())
    return {
        keys[0]: _with(float(np.median(values)), median(values, occupation_of), "woodruff", n),
        keys[1]: _with(weighted, interval, "two-level", n),
        keys[2]: Estimate(perplexity, n=n, note="a few odd texts decide a mean of perplexities"),
    }


def _renumbered(occupation_of: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 … without gaps."""
    return np.unique(occupation_of, return_inverse=True)[1]


def _histogram(places: NDArray[np.int64], size: int) -> Array:
    return np.bincount(places[places >= 0], minlength=size).astype(float)
