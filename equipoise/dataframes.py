"""Sentences in pandas' data frames scored and measured, with the results as data frames and figures.

The numbers are those of `equipoise score` and `equipoise evaluate`: the same code finds the columns and measures.
"""

import contextlib
import hashlib
import json
import os
import re
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from equipoise.errors import UserError
from equipoise.evaluation import files
from equipoise.evaluation.config import EvaluateConfig
from equipoise.evaluation.curves import frontier_plot
from equipoise.evaluation.evaluate import evaluate as measured
from equipoise.evaluation.figures import figures
from equipoise.evaluation.inputs import Given, Judged
from equipoise.evaluation.measure import Measured
from equipoise.evaluation.plots import figure_of
from equipoise.evaluation.results import Evaluation
from equipoise.protocol.reward import RewardWeights
from equipoise.protocol.task import PROTOCOL, Task, read_task
from equipoise.protocol.task_values import nearest
from equipoise.tables import names
from equipoise.tables.choose import choose
from equipoise.tables.frame import Form, Frame
from equipoise.tables.join import joined
from equipoise.tables.layout import Columns, arrange, as_texts
from equipoise.tables.table import Table, some, unique

AnyTask = Task | str | os.PathLike[str] | None
"""A task, a task file, the name of a packaged task, or None for the default one."""
NOT_OPTIONS = frozenset(("files", "inspect_log", "output", "task"))
"""Fields of `EvaluateConfig` that are no options of `evaluate`: what is measured, and what the command writes."""
UNNAMED = "data frame"
"""What a data frame is called where a file would be named by its path."""


@dataclass(frozen=True, repr=False)
class Results:
    """An evaluation: its numbers as data frames, which have the columns of the files that `equipoise evaluate` writes,
    and its figures."""

    evaluation: Evaluation
    """Everything, as in evaluation.json."""
    _measured: tuple[list[Measured], Judged]

    @cached_property
    def headline(self) -> pd.DataFrame:
        """One row for each method: `n`, and of each metric of the headline its value and the ends of its 95 % interval,
        in columns such as `strict`, `strict_low`, `strict_high`. Shares are 0 to 1; what has no value is NaN."""
        keys = [key for key, metric in self.evaluation.metrics.items() if metric.tier == "headline"]
        found: dict[str, dict[str, Any]] = {}
        for name, method in self.evaluation.methods.items():
            found[name] = {"n": method.n}
            for key in keys:
                value = method.metrics[key]
                found[name] |= {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
        headline = pd.DataFrame.from_dict(found, orient="index").rename_axis("method")
        return headline.astype({name: float for name in headline.columns if name != "n"})

    @cached_property
    def methods(self) -> pd.DataFrame:
        """Every metric of every method, a row each, as in methods.csv."""
        return self._table("methods")

    @cached_property
    def occupations(self) -> pd.DataFrame:
        """The metrics of every occupation, as in occupations.csv."""
        return self._table("occupations")

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """Every pair of methods, as in comparisons.csv; without rows for a single method."""
        return self._table("comparisons")

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Every sentence with what it holds, as in rows.csv and in the order of the input."""
        return self._table("rows")

    @property
    def notices(self) -> tuple[str, ...]:
        """What was taken for what, and what is odd, a line each: what `equipoise evaluate` prints as notes."""
        return tuple(map(_as_python, self.evaluation.notices))

    def figures(self) -> dict[str, Figure]:
        """The figures of a report by name, drawn anew at each call, so that they can be changed and saved freely."""
        plots = [*figures(self.evaluation), frontier_plot(self.evaluation, ())]
        return {plot.name: figure_of(plot) for plot in plots}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the five files of `equipoise evaluate` into `folder`, for `equipoise report FOLDER`. Raises UserError
        where something else lies there, or nothing can be written."""
        with _in_python(), files.prepared(Path(folder)):
            files.write(Path(folder), self.evaluation, *self._measured)

    def _table(self, name: str) -> pd.DataFrame:
        columns, rows = files.tables(self.evaluation, *self._measured)[name]
        # Truth values are 1 and 0, as in the file.
        cells = [[int(cell) if isinstance(cell, bool) else cell for cell in row] for row in rows]
        return pd.DataFrame(cells, columns=list(columns))

    def __repr__(self) -> str:
        return "\n".join([str(self.headline.T), *(f"note: {line}" for line in self.notices)])

    def _repr_html_(self) -> str:
        return str(self.headline.T.to_html())


def evaluate(data: Any, *, task: AnyTask = None, **options: Any) -> Results:
    """Measure sentences as `equipoise evaluate` does.

    `data`: a data frame, the path of a file, or a mapping from methods' names to either. Columns are found as in files;
    levels of the index count as columns. `task`: by default the one on record beside a file, else the protocol's.
    `options` are those of the command with `_` for `-`: `fluency=False` (by default the bundled model judges fluency),
    `text_column`, `occupation_column`, `method_column`, `form`, `base`, `bootstrap_draws`, `seed`, ….

    The draws of a method's intervals depend on its name, so rows without a column of methods get a file's very numbers
    under its name: `{"ppo": frame}` for ppo.csv. Raises UserError.
    """
    with _in_python():
        config = EvaluateConfig(
            files=tuple(
                f"{name}={path}" if name else os.fspath(path) for name, path in _parts(data, (str, os.PathLike))
            ),
            task=_task(task),
            **_options(options),
        )
        frames = _parts(data, (pd.DataFrame,))
        given = [Given(name, _table(frame, f"{UNNAMED} {name!r}" if name else UNNAMED)) for name, frame in frames]
        evaluation, rows, judged = measured(config, lambda line: None, more=given)
    return Results(evaluation, (rows, judged))


def score(
    data: Any,
    *,
    task: AnyTask = None,
    text_column: str | None = None,
    occupation_column: str | None = None,
    form: Form = "auto",
    **weights: float,
) -> pd.DataFrame:
    """The reward of each sentence in its parts, as `equipoise score --json` gives it.

    `data`: a data frame, a series or list of texts, or one text. The result has its index and order, and the columns
    `text`, one for each class with a list of its terms, `words`, `base`, `bonus`, `length_penalty`,
    `repetition_penalty`, `reward`, `strict`. In a data frame with a column of occupations, texts that only go on after
    the frame ("The nurse was") get it, as in `evaluate`; all other texts are scored as they are, a missing one as an
    empty one. What was found odd is a warning. `weights` are those of `equipoise score --help`, with `_` for `-`.
    Raises UserError.
    """
    with _in_python():
        by = _task(task) or PROTOCOL
        _check("form", form, Form)
        _check("text_column", text_column, str | None)
        _check("occupation_column", occupation_column, str | None)
        parts = _weights(weights)
        frame = _of_texts(data)
        columns = Columns(text_column, occupation_column)
        texts, odd = _sentences(_table(frame, UNNAMED), by, columns, form) if len(frame) else ([], [])
    for line in odd:
        warnings.warn(_as_python(line), stacklevel=2)
    scored = [by.score(text, parts) for text in texts]
    found = [
        {name: list(value) if isinstance(value, tuple) else value for name, value in each.document().items()}
        | {"strict": by.strict(each.text)}
        for each in scored
    ]
    heads = [*by.score("").document(), "strict"]
    return pd.DataFrame(found, index=frame.index, columns=heads)


def _weights(given: Mapping[str, Any]) -> RewardWeights:
    hints = {field.name: get_type_hints(RewardWeights)[field.name] for field in fields(RewardWeights)}
    out = {name: _number(value) for name, value in given.items()}
    for name, value in out.items():
        if name not in hints:
            raise UserError(f"score has no option {name!r}{nearest(name, list(hints))}")
        _check(name, value, hints[name])
    return RewardWeights(**out)


def _sentences(table: Table, task: Task, columns: Columns, form: Form) -> tuple[list[str], list[str]]:
    """The texts to score, and what is odd about them, a line each. Raises UserError where no column holds them, or
    their form cannot be told."""
    frame = Frame(task)
    merged, joins = joined(table, frame, columns)
    chosen, said, _ = choose(merged, columns, task, frame, UNNAMED)
    if chosen.occupation is not None or form != "auto":
        rows, _, problems = arrange(table, 0, task, columns=columns, form=form, method=UNNAMED, seed="")
        return [row.measured for row in rows], [problem.message for problem in problems]
    texts, empty, odd = as_texts(merged.column(chosen.text))
    lines = [problem.message for problem in (*joins, *said)]
    for places, what in ((empty, "no text, scored as an empty one"), (odd, "no string for a text, scored as JSON")):
        if places:
            lines.append(f"{len(places):,} with {what} ({some([i + 1 for i in sorted(places)], 'row')})")
    return ["" if i in empty else text for i, text in enumerate(texts)], lines


def _parts(data: Any, kinds: tuple[type, ...]) -> list[tuple[str | None, Any]]:
    """What of the data is of these kinds, each with its name. Raises UserError for what is of no kind that is known."""
    named = data.items() if isinstance(data, Mapping) else [(None, data)]
    if not named:
        raise UserError("evaluate was given an empty mapping: give one from methods' names to data frames or files")
    for name, value in named:
        if not isinstance(value, (pd.DataFrame, str, os.PathLike)) or not (name is None or isinstance(name, str)):
            inner = "" if value is data else f" with {_kind(value)} under {name!r}"
            raise UserError(
                f"evaluate was given {_kind(data)}{inner}: give pandas' data frame, the path of a file, or a mapping "
                "from methods' names to either"
            )
    return [(name, value) for name, value in named if isinstance(value, kinds)]


def _of_texts(data: Any) -> pd.DataFrame:
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, pd.Series):
        return data.to_frame("text")
    data = data.item() if isinstance(data, np.ndarray) and not data.ndim else data
    texts = [data] if isinstance(data, str) else data
    if not isinstance(texts, Iterable) or isinstance(texts, (bytes, Mapping)) or hasattr(texts, "to_pandas"):
        other = "; its to_pandas() makes one" if hasattr(data, "to_pandas") else ""
        raise UserError(
            f"score was given {_kind(data)}: give pandas' data frame, a series or list of texts, or a text{other}"
        )
    texts = list(texts)
    for number, text in enumerate(texts, 1):
        if isinstance(text, Iterable) and not isinstance(text, str):
            raise UserError(
                f"text {number:,} is {_kind(text)}: give texts, or pandas.DataFrame(…) of what has more than a text"
            )
    return pd.DataFrame({"text": pd.Series(texts, dtype=object)})


def _table(frame: pd.DataFrame, name: str) -> Table:
    """The frame as a file's table would be: missing values None, levels of the index that say something as columns."""
    levels = [frame.index.get_level_values(i) for i in range(frame.index.nlevels)]
    told = [
        (names.KEY if level.name is None else str(level.name), level)
        for level in levels
        if level.name is not None or not pd.api.types.is_numeric_dtype(level.dtype)
    ]
    columns = [".".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in frame.columns]
    values = [_values(frame.iloc[:, i]) for i in range(frame.shape[1])] + [_values(level) for _, level in told]
    rows = [list(row) for row in zip(*values, strict=True)]
    content = json.dumps([columns, rows]).encode()
    return Table(
        name,
        hashlib.sha256(content).hexdigest(),
        unique([*columns, *(called for called, _ in told)]),
        rows,
        numbers=tuple(range(1, len(frame) + 1)),
    )


def _values(column: Any) -> list[Any]:
    given = column.astype(object)
    return [None if gone else _cell(value) for value, gone in zip(given, given.isna(), strict=True)]


def _cell(value: Any) -> Any:
    """A cell as JSON could hold it, which is what cells of files are: arrays are lists, bytes that are UTF-8 are the
    text, and of what JSON has no form for stands what `str` makes of it."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic, pd.Series)) else value
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # keys that are no text, a list that holds itself
        return str(value)
    return value


def _task(task: AnyTask) -> Task | None:
    if task is None or isinstance(task, Task):
        return task
    if isinstance(task, (str, os.PathLike)):
        return read_task(os.fspath(task))
    raise UserError(f"the task is {_kind(task)}: give a Task, a task file, or the name of a packaged task")


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `equipoise evaluate` as its configuration takes them. Raises UserError."""
    hints = get_type_hints(EvaluateConfig)
    known = [name for name in hints if name not in NOT_OPTIONS]
    out = {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"evaluate has no option {name!r}{nearest(name, known)}; it has {', '.join(known)}")
        if name == "judge" and isinstance(value, str):
            value = (value,)
        elif name == "judge" and isinstance(value, list):
            value = tuple(value)
        elif name == "reference" and isinstance(value, str):
            value = Path(value)
        value = _number(value)
        _check(name, value, hints[name])
        out[name] = value
    return out


def _check(name: str, value: Any, kind: Any) -> None:
    """Raises UserError for a value that is not of the annotated type."""
    if not _fits(value, kind):
        alternatives = [k for k in get_args(kind) if isinstance(k, str)]
        wanted = (
            f"one of {', '.join(map(repr, alternatives))}" if alternatives else str(getattr(kind, "__name__", kind))
        )
        raise UserError(f"{name}={value!r:.60} does not fit: expected {wanted}")


def _number(value: Any) -> Any:
    """numpy's numbers, of which only some count as Python's, as these."""
    return value.item() if isinstance(value, np.generic) else value


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(value, inner[0])
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


def _kind(value: Any) -> str:
    return f"a value of the type {type(value).__name__}"


@contextlib.contextmanager
def _in_python() -> Iterator[None]:
    """Errors name arguments as Python spells them."""
    try:
        yield
    except UserError as error:
        raise UserError(_as_python(str(error))) from None


def _as_python(line: str) -> str:
    """A line about options with the arguments of the functions here: `form='sentence'` for `--form sentence`."""

    def argument(hit: re.Match[str]) -> str:
        name, value = hit[1].replace("-", "_"), hit[2]
        return name if value is None else f"{name}={value if value.startswith(chr(39)) else repr(value)}"

    line = re.sub(r"(?<![\w-])--([a-z]+(?:-[a-z]+)*)(?: ('[^']*'|sentence\b|continuation\b))?", argument, line)
    return re.sub(rf"\bNAME={UNNAMED}", "{'NAME': frame}", line)
