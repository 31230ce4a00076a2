"""The file contract of `equipoise evaluate`: what `evaluation.json` and `rows.csv` hold.

`stored` reads and writes them.

`evaluation.json` is JSON of one `Evaluation`, a dataclass is an object, a tuple a list, None null. There
is no NaN and no infinity in it: a number that does not exist is null, and the note beside it says why. Texts, names
and notes come from users and models: whoever shows them escapes them.

`rows.csv` has one row per input row, in the order of the files and of the rows in them (`row_columns`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from equipoise.protocol.task import Task
from equipoise.runs.records import task_on_record
from equipoise.tables.found import Layout, Problem

FEWEST = 30
"""A method with fewer sentences is on no front and is not called the best: of 4 that all comply, the 95 % interval
begins at 51 %."""
VERSION = 1
"""Raised when a reader of the file would have to change."""


@dataclass(frozen=True)
class Metric:
    """What a metric's key stands for; docs/EVALUATION.md has the formulas.

    A metric of a judge has the judge's name behind an "@": `nll/median@bundled`. Its entry here has the same key.
    """

    title: str
    """For a table's head or an axis: "strict success"."""
    unit: str
    """`share` (0 to 1), `count`, `bits`, `nats/token`, `words`, `terms`, `reward`, `ratio`, `log-odds` (in nats),
    `points` (0 to 100) or `ppl`."""
    tier: Literal["headline", "diagnostic", "fairness", "study"]
    better: Literal["higher", "lower", "neither"]
    """Which direction is wanted, where one is."""
    note: str = ""
    """The caveat that belongs beside every value of this metric."""


@dataclass(frozen=True)
class Estimate:
    """One number with its 95 % interval."""

    value: float | None
    """None where it does not exist, for instance a mean over no rows; `note` says why."""
    low: float | None = None
    high: float | None = None
    """Ends of the interval; None where there is none."""
    n: int = 0
    """Rows that the value is computed from."""
    interval: Literal[
        "clustered-wilson", "two-level", "woodruff", "jackknife", "delta", "fisher", "wilson", "given", "none"
    ] = "none"
    """How it was made; docs/EVALUATION.md explains each. Occupations are the unit in the first four: `clustered-wilson`
    for shares, `two-level` (bootstrap) for means, `woodruff` for medians, `jackknife` for effective numbers and
    spreads. `delta`: by linearisation, for log-odds. `fisher`: for correlations. `wilson`: rows as if independent.
    `given`: read from a side file."""
    wilson: tuple[float, float] | None = None
    """For a share: the row-level Wilson interval, whatever `interval` is."""
    note: str = ""


@dataclass(frozen=True)
class File:
    path: str
    """As given on the command line."""
    sha256: str
    rows: int
    layout: Layout
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Judge:
    """A language model whose NLL measures fluency."""

    name: str
    """As in the metrics' keys and the columns of rows.csv."""
    source: str
    """Folder, Hub id, or `bundled`."""
    caveat: str
    """For instance that it is of the policy's family; may be empty."""


@dataclass(frozen=True)
class Duplicates:
    rows: int
    """Rows whose exact text, with the same method and occupation, stands in an earlier row: n − different texts."""
    texts: int
    """Different texts that occur more than once."""
    most: int
    """How often the commonest text occurs."""
    example: str
    """The commonest text that occurs more than once; empty if none does."""


@dataclass(frozen=True)
class Cost:
    """From `FILE.costs.json`, summed over a method's files; None where no file says."""

    seconds: float | None
    load_seconds: float | None
    tokens: int | None
    generations: int | None
    accepted: int | None
    generations_per_accepted: float | None
    ess: float | None
    """Effective sample size, where the method weights its samples."""


@dataclass(frozen=True)
class Parts:
    """Means of the parts of the protocol's reward over all rows. Penalties are 0 or negative."""

    base: float
    bonus: float
    length_penalty: float
    repetition_penalty: float
    reward: float


@dataclass(frozen=True)
class Method:
    n: int
    """Rows, the empty ones included."""
    model: str
    """The column Model, or its values joined with ", "."""
    seeds: tuple[str, ...]
    files: tuple[str, ...]
    """Paths of the files its rows came from, as in `Evaluation.files`."""
    metrics: dict[str, Estimate]
    """By the keys of `Evaluation.metrics`. Every method has the same keys."""
    occupations: dict[str, dict[str, Estimate]]
    """The same per occupation, for the metrics that make sense there (shares, means, pairs, NLL); Wilson intervals for
    shares. In the task's order, others behind."""
    equal_n: dict[str, Estimate]
    """Metrics that grow or shrink with n, at `Evaluation.equal_n` rows. Empty where all methods have equally many."""
    pairs: tuple[tuple[int, ...], ...]
    """Sentences per pair of their first terms of each class; `combinations.counted` reads it. With two classes one list
    for each term of the first class, in the task's order, with one number for each term of the second; with one class
    one list with a number for each term. With three or four, where there may be millions of combinations, one list for
    each that occurs, the commonest first: the place of its term within each class, and the sentences."""
    terms: dict[str, int]
    """Rows that hold each of the task's terms, zeros included, those of the first class first."""
    lengths: tuple[tuple[int, int], ...]
    """(words, rows), in order of words, those of the frame counted."""
    parts: Parts
    duplicates: Duplicates
    cost: Cost | None
    kl: Estimate | None
    """KL from the method's distribution to the base model's, nats per sentence."""
    problems: tuple[str, ...] = ()
    """Lines to be shown beside the method."""


@dataclass(frozen=True)
class Equivalence:
    """Non-inferiority by one-sided paired t-tests on occupation means, with a margin stated beforehand (TOST)."""

    margin: float
    """In the metric's unit."""
    p_noninferior: float | None
    """H0: a is worse than b by the margin or more."""
    p_equivalent: float | None
    """H0: a and b differ by the margin or more, in either direction. The larger of the two one-sided p-values."""
    noninferior: bool | None
    """p_noninferior < 0.05."""
    equivalent: bool | None
    note: str


@dataclass(frozen=True)
class MixedLogit:
    """A logistic regression of single sentences on the method, occupations having random intercepts and slopes."""

    log_odds: float | None
    """Of success under a against success under b, in an occupation of no effect; None where it has no end."""
    low: float | None
    high: float | None
    """95 % interval by Wald, with Student's t."""
    p: float
    """Of no difference, by the likelihood ratio, which is compared with an F distribution."""
    sd_occupation: float
    """Standard deviation of the occupations' intercepts, in log-odds."""
    sd_difference: float
    """Standard deviation over occupations of the difference between the methods, in log-odds."""
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Method `a` minus method `b`, paired over the occupations that both have."""

    metric: str
    family: str
    """The p-values of a family are corrected together (Holm)."""
    a: str
    b: str
    difference: float | None
    """Mean over occupations of a's value minus b's."""
    low: float | None
    high: float | None
    """95 % interval, two-level."""
    p_sign_flip: float | None
    p_wilcoxon: float | None
    p_holm: float | None
    """`p_sign_flip` after Holm's correction within the family."""
    cohens_h: float | None
    """For shares: 2·asin√p_a − 2·asin√p_b."""
    cliffs_delta: float | None
    """Over occupation values, −1 to 1."""
    tost: Equivalence | None
    """For fluency only."""
    n_occupations: int
    note: str
    """Why something cannot be tested, unequal n, and so on."""
    mixed: MixedLogit | None = None
    """For strict success and for every class present; None also where an earlier version measured."""


@dataclass(frozen=True)
class KLParts:
    """A KL split into what compliance costs, what the variety of pairs costs, and waste, all of one and the same sample
    of sentences: kl = compliance + variety + waste, nats per sentence (see measures/decomposition.py)."""

    share: float
    """Compliance of that sample, 0 to 1."""
    effective_pairs: float
    """2^H over its compliant sentences' pairs."""
    kl: Estimate
    compliance: Estimate
    variety: Estimate
    waste: Estimate
    unseen: float
    """Share of its compliant sentences whose pair the base model was never seen to write: these are one class, with an
    upper limit, so that the waste is the most that it can be."""


@dataclass(frozen=True)
class FrontierPoint:
    method: str
    compliance: Estimate
    kl: Estimate | None
    bound: Estimate | None
    """The least KL, in nats per sentence, that this compliance needs; its interval follows from p0's."""
    excess: float | None
    """kl − bound."""
    parts: KLParts | None = None
    """What the KL is spent on; None where the base model's pairs, or the sentences of the KL, are not known."""


@dataclass(frozen=True)
class ParetoPoint:
    """A method in the plane of adherence and fluency."""

    method: str
    adherence: Estimate
    fluency: Estimate
    judge: str
    member: bool
    """No other method with at least FEWEST sentences is at least as good in both and better in one. False for one that
    has fewer itself."""
    support: float | None
    """Share of bootstrap draws in which it is a member; None for fewer than FEWEST sentences."""


@dataclass(frozen=True)
class Frontier:
    event: Literal["strict", "both"]
    """What compliance and p0 are the probability of."""
    p0: Estimate | None
    """The base model's compliance."""
    p0_source: str
    """Where p0 is from, or why there is none."""
    points: tuple[FrontierPoint, ...]
    pareto: tuple[ParetoPoint, ...]
    """Empty without a judge."""
    pairs_event: Literal["strict", "both"] = "strict"
    """What the parts of a KL are of: the event for which the base model's pairs are known."""
    least_variety: tuple[tuple[float, float], ...] = ()
    """(effective pairs, the least nats that so much variety costs), from the base model's own upward; empty where its
    pairs are not known."""
    pairs_source: str = ""
    """Where the base model's pairs are from, or why they are not known."""


@dataclass(frozen=True)
class Reference:
    """A published number."""

    source: str
    """The paper's short name."""
    method: str
    metric: str
    """The key of ours that it is nearest to, of the tier `study`."""
    value: float | None
    high: float | None
    """The other end, where a range was published."""
    n: int | None
    comparable: bool
    why: str
    """Why not comparable, or under which conditions."""


@dataclass(frozen=True)
class Evaluation:
    version: int
    settings: dict[str, Any]
    """Everything that decides the numbers: the whole task as `Task.document` gives it, with the bounds that were asked
    for; seed, bootstrap_draws, margin, judges, …"""
    provenance: dict[str, Any]
    """command, versions, commit, date."""
    files: tuple[File, ...]
    lexicon: dict[str, tuple[str, ...]]
    """The terms of each of the task's classes."""
    judges: tuple[Judge, ...]
    metrics: dict[str, Metric]
    """Every key that occurs below, in the order of a table."""
    methods: dict[str, Method]
    equal_n: int | None
    """Rows in `Method.equal_n`: those of the smallest method that has any. None where all have equally many."""
    comparisons: tuple[Comparison, ...]
    frontier: Frontier
    reference: tuple[Reference, ...]
    notices: tuple[str, ...] = field(default=())
    """What the command printed beside the table."""
    not_begun: int | None = None
    """Rows that do not begin with the task's frame, those without text among them; None where an earlier version
    measured, which did not count them."""

    @cached_property
    def task(self) -> Task:
        """What was measured by. Settings without a task, as they were before tasks were files, are of the default one,
        with the bounds that they name. Raises UserError for what is no task."""
        task = task_on_record(self.settings, "evaluation.json")
        if "task" in self.settings:
            return task
        return task.with_bounds(self.settings.get("min_words"), self.settings.get("max_words"))


def row_columns(classes: Sequence[str]) -> tuple[str, ...]:
    """Columns of rows.csv; behind them `NLL@judge` and `Tokens@judge` for each judge, and `Acceptable@classifier`.

    File and Line (from 1, no header counted) say where the row came from. Text is the sentence that was measured, as it
    is: prefix and continuation joined where the file held the continuation. There is one column for each class, named
    after it with a capital letter (Agentic, Communal), with its different terms in order, joined with ";". Outcome is
    `both` where every class is present, `neither` where none is, and else the names of those that are, joined with "+".
    Strict, Sentence, InLength and Duplicate are 1 or 0; Duplicate: an earlier row of the same method and occupation has
    this text. Gendered has the gendered words behind the frame, Negated the terms that are negated, both joined with
    ";". NLL is in nats per token. The file is UTF-8, RFC 4180, quoted where needed; a lone surrogate is kept as
    the three bytes that `surrogatepass` gives it, so read it with `stored.read_rows`.
    """
    return (
        *("File", "Line", "Method", "Model", "Seed", "Occupation", "RunID", "Text", "WordCount"),
        *(name[:1].upper() + name[1:] for name in classes),
        *("Outcome", "Strict", "Sentence", "InLength", "Base", "Bonus", "LengthPenalty", "RepetitionPenalty"),
        *("Reward", "Duplicate", "Gendered", "Negated"),
    )
