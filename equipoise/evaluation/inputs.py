"""From completion files to measured rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.evaluation.config import EvaluateConfig
from equipoise.evaluation.counted import Fluency
from equipoise.evaluation.intervals import Array
from equipoise.evaluation.measure import Measured, measure
from equipoise.evaluation.results import File, Judge
from equipoise.evaluation.side import Side, read_side
from equipoise.protocol.task import PROTOCOL, Task
from equipoise.runs.records import task_on_record
from equipoise.tables import names
from equipoise.tables.found import Layout
from equipoise.tables.layout import Columns, Row, arrange, is_empty, settle_names
from equipoise.tables.read import Table, read_table


@dataclass(frozen=True)
class Inputs:
    """Every row of every file, measured, and what lay beside the files."""

    task: Task
    """What they were measured by, with the bounds that were asked for."""
    files: tuple[File, ...]
    rows: list[Measured]
    sides: list[Side | None]
    notices: tuple[str, ...] = ()
    empty: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Methods of files without any row, and the places of those files."""

    def told(self) -> list[str]:
        """What was found about the files, a line each."""
        out = list(self.notices)
        for file in self.files:
            if not file.rows:
                out.append(f"{file.path}: no rows; its method is shown without numbers")
            else:
                out.append(f"{file.path}: {file.layout.told(file.rows)}")
            out += [f"{file.path}: {problem.message}" for problem in file.problems]
        return out


class Given(NamedTuple):
    """A table that is to be measured: of a file, or one that was never in a file."""

    method: str | None
    """Of all its rows, where the user named it."""
    table: Table
    settings: Mapping[str, Any] = {}
    """On record beside the file."""
    side: Side | None = None


def read_inputs(config: EvaluateConfig, more: Sequence[Given] = ()) -> Inputs:
    """Every file read and measured, and after them the tables in `more`. Raises UserError."""
    if not config.files and not more:
        raise UserError("no files given: name one or more files of completions; equipoise evaluate --help says more")
    named = [_named(each) for each in config.files]
    for i, (_, path) in enumerate(named):
        if any(path == earlier for _, earlier in named[:i]):
            raise UserError(f"{path} is given twice: name each file once")
    task, notices = _task(config, [path for _, path in named])
    columns = _columns(config).given
    given = (
        Given(method, read_table(path, config.encoding, columns), _settings(path) or {}, read_side(path))
        for method, path in named
    )
    return _arranged(chain(given, more), config, task, notices)


def _columns(config: EvaluateConfig) -> Columns:
    return Columns(config.text_column, config.occupation_column, config.method_column)


def _arranged(given: Iterable[Given], config: EvaluateConfig, task: Task, notices: tuple[str, ...]) -> Inputs:
    """The rows of the tables, found and measured by `task`. Raises UserError."""
    files: list[File] = []
    rows: list[list[Row]] = []
    sides: list[Side | None] = []
    empty: dict[str, tuple[int, ...]] = {}
    headers: list[str] = []
    for method, table, settings, side in given:
        if is_empty(table):
            name = method or str(settings.get("Method") or settings.get("Label") or Path(table.path).stem)
            empty[name] = (*empty.get(name, ()), len(files))
            files.append(File(table.path, table.sha256, 0, _layout_of_header(table.columns), table.problems))
            rows.append([])
            filled = [name for name in table.columns if name.strip()]
            headers.append(f", only the columns {names.listed(filled)}" if filled else "")
            sides.append(side)
            continue
        seed = str(settings.get("seed", ""))
        own, layout, problems = arrange(
            table, len(files), task, columns=_columns(config), form=config.form, method=method, seed=seed
        )
        files.append(File(table.path, table.sha256, len(own), layout, tuple(problems)))
        rows.append(own)
        sides.append(side)
    if not any(rows):
        raise UserError(f"{files[0].path} holds no rows{headers[0]}: give a file with a row for each text")
    notices = (*notices, *_pooled([file.path for file in files], rows))
    spelling = settle_names(rows)
    flat = [replace(row, occupation=spelling[row.occupation]) for own in rows for row in own]
    return Inputs(task, tuple(files), measure(flat, task), sides, notices, empty)


def _pooled(paths: Sequence[str], rows: Sequence[Sequence[Row]]) -> list[str]:
    """What to say of methods whose rows stand in several files. Raises UserError where those are of one seed, so that
    the same sentences are in both: a filter's file beside that of all its draws."""
    places: dict[str, dict[int, set[tuple[str, str]]]] = {}
    for place, own in enumerate(rows):
        for row in own:
            places.setdefault(row.method, {}).setdefault(place, set()).add((row.model, row.seed))
    notices = []
    for method, files in places.items():
        seen: dict[tuple[str, str], int] = {}
        for place, drawn in files.items():
            for model, seed in sorted(drawn):
                first = seen.setdefault((model, seed), place)
                if first != place and seed:
                    raise UserError(
                        f"{paths[first]} and {paths[place]} both hold the method {method!r} with seed {seed}: leave "
                        f"one out, or take them for two methods, such as {Path(paths[place]).stem}={paths[place]}"
                    )
        if len(files) > 1:
            shown = ", ".join(paths[place] for place in files)
            notices.append(
                f"the rows of {len(files)} files ({shown}) are of the method {method!r} and are pooled; NAME=FILE "
                "parts them"
            )
    return notices


def _layout_of_header(columns: Sequence[str]) -> Layout:
    """Of a file without rows, none of which shows how its texts are meant: the columns of the usual names."""

    def first(which: Sequence[str]) -> str | None:
        return next(iter(names.named(columns, which)), None)

    return Layout(
        first(names.TEXT_NAMES) or "", first(names.OCCUPATION_NAMES), first((names.METHOD,)), first(names.MODEL_NAMES),
        first(names.SEED_NAMES), first(names.RUN_NAMES), "sentence", "detected",
    )  # fmt: skip


def _named(given: str) -> tuple[str | None, str]:
    name, separator, path = given.partition("=")
    if separator and name.strip() and not Path(given).exists():
        return name.strip(), path
    return None, given


def told(mine: Task, other: Task) -> str:
    """The first differences of two tasks, in few words."""
    lines = mine.differences(other)
    shown = [line if len(line) <= 120 else f"{line[:119]}…" for line in lines[:4]]
    return "; ".join(shown) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")


def _settings(path: str) -> Mapping[str, Any] | None:
    """The settings in the record that `equipoise generate` and its kin leave beside a file; None if there is none."""
    try:
        settings = read_json(Path(f"{path}.json"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return settings if isinstance(settings, Mapping) else None


def _task(config: EvaluateConfig, paths: list[str]) -> tuple[Task, tuple[str, ...]]:
    """The task to measure by, with notices: the one that was asked for, else the one that the files' records have, else
    the default one. Raises UserError where records have different ones."""
    recorded = {
        path: task_on_record(settings, f"{path}.json") for path in paths if (settings := _settings(path)) is not None
    }
    notices: list[str] = []
    if config.task is not None:
        task = config.task
        for path, own in recorded.items():
            if own != task:
                notices.append(f"{path} was made under another task than --task: {told(own, task)}")
    else:
        task = next(iter(recorded.values()), PROTOCOL)
        for path, own in recorded.items():
            if own != task:
                raise UserError(
                    f"{next(iter(recorded))} and {path} were made under different tasks "
                    f"({told(task, own)}): evaluate them apart, or name the one to measure by with "
                    "--task"
                )
    return task.with_bounds(config.min_words, config.max_words), tuple(notices)


@dataclass(frozen=True)
class Judged:
    """What the judges and the classifier say of every row, in order."""

    judges: tuple[Judge, ...] = ()
    scores: Mapping[str, Fluency] | None = None
    acceptable: Mapping[str, Array] | None = None
    notices: tuple[str, ...] = ()
    probed: Mapping[str, Array] | None = None
    """Scores behind `acceptable`, where a probe gives them."""
