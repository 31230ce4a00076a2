"""The file contract of `equipoise evaluate`: what `evaluation.json` and `rows.csv` hold, read and written here alone.

`evaluation.json` is JSON of one `Evaluation`, a dataclass is an object, a tuple a list, None null. There
is no NaN and no infinity in it: a number that does not exist is null, and the note beside it says why. Texts, names
and notes come from users and models: whoever shows them escapes them.

`rows.csv` has one row per input row, in the order of the files and of the rows in them (`ROW_COLUMNS`).
"""

import csv
import dataclasses
import io
import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from equipoise.errors import UserError

VERSION = 1
"""Raised when a reader of the file would have to change."""

LONGEST_FIELD = 1 << 28
"""Characters of one CSV field: a degenerate model's text may be long."""


@dataclass(frozen=True)
class Metric:
    """What a metric's key stands for; docs/EVALUATION.md has the formulas.

    A metric of a judge has the judge's name behind an "@": `nll/median@bundled`. Its entry here has the same key.
    """

    title: str
    """For a table's head or an axis: "strict success"."""
    unit: str
    """`share` (0 to 1), `count`, `bits`, `nats/token`, `words`, `terms`, `reward`, `ratio`,
    `points` (0 to 100) or `ppl`."""
    tier: Literal["headline", "diagnostic", "study"]
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
    interval: Literal["clustered-wilson", "two-level", "woodruff", "jackknife", "wilson", "given", "none"] = "none"
    """How it was made; docs/EVALUATION.md explains each. Occupations are the unit in the first four: `clustered-wilson`
    for shares, `two-level` (bootstrap) for means, `woodruff` for medians, `jackknife` for effective numbers. `wilson`:
    rows as if independent. `given`: read from a side file."""
    wilson: tuple[float, float] | None = None
    """For a share: the row-level Wilson interval, whatever `interval` is."""
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """Something about an input file that a reader of the results should know. Nothing was dropped for it."""

    kind: str
    """`empty text`, `mixed forms`, `two methods' rows are the same text`, …"""
    count: int
    """Rows concerned."""
    lines: tuple[int, ...]
    """The first few of them, counted from 1 without a header."""
    message: str


@dataclass(frozen=True)
class Layout:
    """Which columns were read as what; None for a column that the file lacks."""

    text: str
    occupation: str | None
    """None: the occupation was read from the beginning of the text."""
    method: str | None
    model: str | None
    seed: str | None
    run_id: str | None
    form: Literal["sentence", "continuation", "mixed"]
    """Whether texts begin with `The {occupation} was` or only continue it; `mixed`: each row by itself."""
    how: Literal["detected", "given"]
    """Whether `form` was seen in the texts or set by an option."""


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
    shares. In the protocol's order, others behind."""
    equal_n: dict[str, Estimate]
    """Metrics that grow or shrink with n, at `Evaluation.equal_n` rows. Empty where all methods have equally many."""
    pairs: tuple[tuple[int, ...], ...]
    """Sentences per (agentic, communal) pair of their first terms: one list for each agentic term in the lexicon's
    order, one number in it for each communal term. They sum to the rows that hold both classes."""
    terms: dict[str, int]
    """Rows that hold each of the lexicon's terms, zeros included, the agentic ones first."""
    lengths: tuple[tuple[int, int], ...]
    """(words, rows), in order of words, the prefix `The X was` counted."""
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


@dataclass(frozen=True)
class FrontierPoint:
    method: str
    compliance: Estimate
    kl: Estimate | None
    bound: Estimate | None
    """The least KL, in nats per sentence, that this compliance needs; its interval follows from p0's."""
    excess: float | None
    """kl − bound."""


@dataclass(frozen=True)
class ParetoPoint:
    """A method in the plane of adherence and fluency."""

    method: str
    adherence: Estimate
    fluency: Estimate
    judge: str
    member: bool
    """No other method is at least as good in both and better in one."""
    support: float | None
    """Share of bootstrap draws in which it is a member."""


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
    """Everything that decides the numbers: seed, bootstrap_draws, margin, min_words, max_words, lexicon, judges, …"""
    provenance: dict[str, Any]
    """command, versions, commit, date."""
    files: tuple[File, ...]
    lexicon: dict[str, tuple[str, ...]]
    """`agentic` and `communal`."""
    judges: tuple[Judge, ...]
    metrics: dict[str, Metric]
    """Every key that occurs below, in the order of a table."""
    methods: dict[str, Method]
    equal_n: int | None
    """Rows in `Method.equal_n`: those of the smallest method. None where all have equally many."""
    comparisons: tuple[Comparison, ...]
    frontier: Frontier
    reference: tuple[Reference, ...]
    notices: tuple[str, ...] = field(default=())
    """What the command printed beside the table."""


ROW_COLUMNS = (
    "File", "Line", "Method", "Model", "Seed", "Occupation", "RunID", "Text", "WordCount", "Agentic", "Communal",
    "Outcome", "Strict", "Sentence", "InLength", "Base", "Bonus", "LengthPenalty", "RepetitionPenalty", "Reward",
    "Duplicate",
)  # fmt: skip
"""Columns of rows.csv; behind them `NLL@judge` and `Tokens@judge` for each judge, and `Acceptable` with a classifier.

File and Line (from 1, no header counted) say where the row came from. Text is the sentence that was measured, as it is:
prefix and continuation joined where the file held the continuation. Agentic and Communal are the different terms in
order, joined with ";". Outcome is both, agentic, communal or neither. Strict, Sentence, InLength and Duplicate are 1 or
0; Duplicate: an earlier row of the same method and occupation has this text. NLL is in nats per token. The file is
UTF-8, RFC 4180, quoted where needed; a lone surrogate is kept as the three bytes that `surrogatepass` gives it, so read
it with `read_rows`.
"""


def to_json(evaluation: Evaluation) -> str:
    """The text of evaluation.json, in ASCII, so that any text survives any reader."""
    return json.dumps(dataclasses.asdict(evaluation), indent=1, allow_nan=False) + "\n"


def from_json(text: str | bytes) -> Evaluation:
    """Raises UserError for a text that is no evaluation of this version."""
    try:
        document = json.loads(text)
        version = document["version"]
    except (ValueError, KeyError, TypeError):
        raise UserError("that is no evaluation.json: give one that `equipoise evaluate` wrote") from None
    if version != VERSION:
        raise UserError(f"evaluation.json is of version {version}, expected {VERSION}: run `equipoise evaluate` again")
    try:
        return _build(Evaluation, document)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"evaluation.json is damaged ({type(error).__name__}: {error}): run `equipoise evaluate` again"
        ) from None


def read(folder: Path) -> Evaluation:
    """The evaluation in `folder`. Raises UserError."""
    path = folder / "evaluation.json"
    try:
        return from_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give the --output of `equipoise evaluate`") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _build(kind: Any, value: Any) -> Any:
    """`value`, of JSON's types, as the annotated type `kind`. Raises KeyError, TypeError or ValueError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        (inner,) = (a for a in arguments if a is not types.NoneType)
        return _build(inner, value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{value!r} is none of {arguments}")
        return value
    if origin is dict:
        return {str(name): _build(arguments[1], item) for name, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"expected a list, not {value!r:.40}")
        inner_kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return tuple(_build(inner, item) for inner, item in zip(inner_kinds, value, strict=True))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"expected {kind.__name__}, not {value!r:.40}")
    return value


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """RFC 4180 in UTF-8. None is an empty field, a whole or true-or-false number has no point."""
    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(list(columns))
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(float(value))
    return value


def read_rows(path: Path) -> Iterator[Mapping[str, str]]:
    """The rows of a CSV that `write_csv` wrote, by column, every text as it was. Raises UserError."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogatepass")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): run `equipoise evaluate` again") from None
    csv.field_size_limit(LONGEST_FIELD)
    yield from csv.DictReader(io.StringIO(text, newline=""))
