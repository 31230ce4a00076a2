"""Which column holds the texts, the occupations and the methods; below certainty it is refused, with the remedy."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from equipoise.errors import UserError
from equipoise.protocol.task import PROTOCOL, Task
from equipoise.tables import names
from equipoise.tables.found import Problem
from equipoise.tables.frame import Frame
from equipoise.tables.headless import headless
from equipoise.tables.table import Table

_OUTCOMES = frozenset(("", "0", "1", "true", "false", "yes", "no", "pass", "fail", "both", "one", "none", "neither",
                       "balanced", "nan", "success", "failure", "compliant", "noncompliant", "accepted", "rejected",
                       "mixed", "neutral",
                       *(names.key(c.name) + more for c in PROTOCOL.classes for more in ("", "only"))))  # fmt: skip
"""What a column named Label holds, in this task's or the public study's files, where it does not name the method; and
so do the names of a task's classes."""
_MORE_OUTCOMES = frozenset(("oob", "ok", "lengthoob", "lengthok", "tooshort", "toolong", "short", "long", "valid",
                            "invalid", "filtered", "unfiltered", "passed", "failed"))  # fmt: skip
_SUFFIX = re.compile(r"\s*[\[(]([^\[\]()]*)[\])]\s*$")
"""What the public study's files put behind a method's name: "Prompt-Only [length OOB]"."""


@dataclass(frozen=True)
class Columns:
    """Names of columns as options give them; None: recognise them."""

    text: str | None = None
    occupation: str | None = None
    method: str | None = None
    options: bool = True
    """Whether there are such options; without them the remedy is to rename the column."""

    @property
    def given(self) -> tuple[str, ...]:
        """The names that were given."""
        return tuple(name for name in (self.text, self.occupation, self.method) if name is not None)

    def remedy(self, what: str, example: str = "", several: bool = False) -> str:
        """How a column is said to be the one of texts, occupations or methods: "with --text-column". `several`: of more
        than one that could be."""
        if several and not self.options:
            return "by leaving the others out"
        if self.options:
            return f"with --{what}-column{f' {example!r}' if example else ''}"
        return f"by calling the column {what.capitalize()}"


class Chosen(NamedTuple):
    """The names of the columns that are read as what, in the order of `Layout`."""

    text: str
    occupation: str | None
    method: str | None
    model: str | None
    seed: str | None
    run: str | None


def choose(
    table: Table, columns: Columns, task: Task, frame: Frame, method: str | None
) -> tuple[Chosen, list[Problem], dict[str, str]]:
    """The columns, what there is to say of them, and methods' names to be replaced.

    Raises UserError where no column holds texts or several may, and for one that an option names and that is not there.
    """
    problems: list[Problem] = []
    text = _text(table, columns, frame, problems)
    occupation = _occupation(table, columns, frame, text, problems)
    model, seed, run = (_first(table, which) for which in (names.MODEL_NAMES, names.SEED_NAMES, names.RUN_NAMES))
    named, other = _method(table, columns, task, method, problems)
    if named is None and method is None:
        named = _by_key(table, occupation, problems) or _of_model(table, model)
    return Chosen(text, occupation, named, model, seed, run), problems, other


def values(table: Table, name: str | None) -> list[str]:
    """The values of a column as texts; empty ones for no column."""
    if name is None:
        return [""] * len(table.rows)
    return [plain(value) for value in table.column(name)]


def plain(value: Any) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # pandas writes whole numbers with a gap among them as 1.0
    return value.strip() if isinstance(value, str) else str(value)


def _first(table: Table, which: Sequence[str]) -> str | None:
    return next(iter(names.named(table.columns, which)), None)


def _given(table: Table, given: str, what: str, more: str = "") -> str:
    """`more`: what else there is to say where it is not there."""
    found = names.found(table.columns, given)
    if not found:
        raise UserError(
            f"{table.path} has no column {given!r} for --{what}-column: it has {names.listed(table.columns)}"
            + (f"; {more}" if more else "")
        )
    _check_one(table, found, f"--{what}-column {given!r} means any of them: name it in full", f"named {given!r}")
    return found[0]


def _check_one(table: Table, found: Sequence[str], remedy: str, what: str) -> None:
    """Raises UserError for columns of one name and different values."""
    alike = [name for name in found if table.column(name) != table.column(found[0])]
    if alike:
        shown = [found[0], *alike]
        raise UserError(f"{table.path} has {len(shown)} columns {what} ({names.listed(shown)}): {remedy}")


def _text(table: Table, columns: Columns, frame: Frame, problems: list[Problem]) -> str:
    if columns.text is not None:
        return _given(table, columns.text, "text", headless(table, frame))
    found = [name for name in names.named(table.columns, names.TEXT_NAMES)]
    holding = [name for name in found if any(map(_holds, table.column(name)))]
    found = holding or found[:1]
    if not found:
        raise UserError(
            f"{table.path} has no column of texts among {names.listed(table.columns)}: "
            + (headless(table, frame) or f"name it {columns.remedy('text')}")
        )
    _check_twins(table, found[0], columns, "text")
    others = [name for name in found[1:] if table.column(name) != table.column(found[0])]
    for other in others:
        apart = [i for i, (own, its) in enumerate(zip(table.column(found[0]), table.column(other), strict=True))
                 if not _holds(own) and _holds(its)]  # fmt: skip
        if apart:
            raise UserError(
                f"{table.path} has texts in {found[0]!r}, and on {len(apart):,} rows without one in {other!r} "
                f"({table.where(apart[0])}): write them all under one name"
            )
    if others:
        best = max(others, key=lambda name: likeness(table, name, frame))
        if likeness(table, best, frame) > likeness(table, found[0], frame):
            raise UserError(
                f"{table.path} has texts in {found[0]!r} and in {best!r}, of which the second begin more like "
                f"'{frame.example()}': say which are meant, {columns.remedy('text', best, several=True)}"
            )
        problems.append(
            Problem(
                "several columns of texts",
                len(table.rows),
                (),
                f"texts are taken from {found[0]!r}; {names.listed(others)} could hold some too "
                f"(decide otherwise {columns.remedy('text', others[0], several=True)})",
            )
        )
    return found[0]


def _holds(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_twins(table: Table, chosen: str, columns: Columns, what: str) -> None:
    """Raises UserError where another column has the same name, and other values."""
    base = chosen
    twins = [
        name
        for name in table.columns
        if names.key(name) == names.key(base) or re.fullmatch(rf"{re.escape(base)}\.\d+", name)
    ]
    _check_one(table, [chosen, *(name for name in twins if name != chosen)],
               f"say which {columns.remedy(what, twins[-1], several=True)}", f"called {chosen!r}")  # fmt: skip


def likeness(table: Table, name: str, frame: Frame) -> float:
    """The share of texts that begin with the frame."""
    texts = [value for value in table.column(name) if isinstance(value, str) and value.strip()]
    return sum(frame.occupation(text) is not None for text in texts) / len(texts) if texts else 0.0


def _occupation(table: Table, columns: Columns, frame: Frame, text: str, problems: list[Problem]) -> str | None:
    if columns.occupation is not None:
        return _given(table, columns.occupation, "occupation")
    for name in names.named(table.columns, names.OCCUPATION_NAMES):
        if name == text or not any(values(table, name)):
            continue
        # What is called a role is the author of a message as often as an occupation.
        if names.last(name) == "role" and not _plausible(table, name, text, frame):
            continue
        _check_twins(table, name, columns, "occupation")
        return name
    for name in table.columns:
        if names.last(name) == names.KEY and _plausible(table, name, text, frame):
            message = f"each text is of the occupation whose name it stands under ({name!r})"
            problems.append(Problem("occupations by key", len(table.rows), (), message))
            return name
    return None


def _plausible(table: Table, name: str, text: str, frame: Frame) -> bool:
    """Whether most values are occupations: the task's, or those that the texts beside them are about."""
    pairs = [(frame.canonical(o), t) for o, t in zip(values(table, name), table.column(text), strict=True) if o]
    fit = sum(frame.has(o) or (isinstance(t, str) and frame.is_about(t, o)) for o, t in pairs)
    return bool(pairs) and fit >= 0.5 * len(pairs)


def _method(
    table: Table, columns: Columns, task: Task, method: str | None, problems: list[Problem]
) -> tuple[str | None, dict[str, str]]:
    """The column that names the method, and what its values are to be called where that differs."""
    if columns.method is not None:
        return _given(table, columns.method, "method"), {}
    if method is not None:
        return None, {}
    name = _first(table, (names.METHOD,))
    if name is not None and any(given := values(table, name)):
        _check_twins(table, name, columns, "method")
        _check_methods(table, name)
        return name, {}
    name = _first(table, (names.LABEL,))
    if name is None or not any(given := values(table, name)):
        return None, {}
    merged = _merged(table, name, given, task, problems)
    if _names_methods([merged.get(value, value) for value in given], task):
        return name, merged
    shown = ", ".join(map(repr, sorted({*given})[:4]))
    what = "what looks like outcomes" if _are_outcomes(given, task) else f"{len({*given}):,} different values"
    message = (
        f"the column {name!r} holds {what} ({shown}{', …' if len({*given}) > 4 else ''}), not "
        f"methods (decide otherwise {columns.remedy('method', name)})"
    )
    problems.append(Problem("labels that are outcomes", len(table.rows), (), message))
    return None, {}


def _by_key(table: Table, occupation: str | None, problems: list[Problem]) -> str | None:
    """The column of the names under which the rows of different methods stand. Raises UserError where there are two."""
    found = []
    for name in table.columns:
        different = set(values(table, name)) - {""}
        if names.last(name) == names.KEY and name != occupation and len(different) > 1:
            if len(different) < len(table.rows):
                found.append(name)
            elif not all(map(str.isdigit, different)):
                message = (
                    "the names under which the rows stand are taken for no methods (decide otherwise with "
                    f"--method-column {name!r})"
                )
                problems.append(Problem("names of rows", len(table.rows), (), message))
    if len(found) > 1:
        raise UserError(
            f"{table.path}: rows stand under names on several levels ({names.listed(found).replace(', ', ' and ')}): "
            f"say which are the methods with --method-column {found[0]!r}, or name one method for all as "
            f"NAME={table.path}"
        )
    if not found:
        return None
    shown = names.listed(list(dict.fromkeys(values(table, found[0]))))
    message = f"methods are the names under which the rows stand ({shown}); NAME={table.path} takes them for one method"
    problems.append(Problem("methods by key", len(table.rows), (), message))
    return found[0]


def _of_model(table: Table, model: str | None) -> str | None:
    """The column of models, which are the methods where nothing else is."""
    if model is not None:
        _check_methods(table, model)
    return model


def _check_methods(table: Table, name: str) -> None:
    """Raises UserError for a column in which no two rows have the same value."""
    if len({*values(table, name)} - {""}) == len(table.rows) > 20:
        raise UserError(
            f"{table.path}: the column {name!r} holds another value on each of {len(table.rows):,} rows, so none is a "
            f"method with rows of its own: name the method as NAME={table.path}"
        )


def _key(name: str) -> str:
    return names.key(name)


def _merged(table: Table, name: str, given: Sequence[str], task: Task, problems: list[Problem]) -> dict[str, str]:
    """Labels that carry an outcome behind the method's name, and that name. Raises UserError where what stands there
    may be part of the name."""
    split = {value: found for value in dict.fromkeys(given) if (found := _SUFFIX.search(value)) and found.start()}
    outcome = {value for value, found in split.items() if _is_outcome(found[1], task)}
    bases = {value: value[: split[value].start()] for value in split}
    for value, base in bases.items():
        if value not in outcome and (base in given or base in {bases[o] for o in outcome}):
            raise UserError(
                f"{table.path}: nothing says whether {base!r} and {value!r} in the column {name!r} are one method: "
                f"--method-column {name!r} takes them for two, NAME={table.path} for one"
            )
    merged = {value: bases[value] for value in split if value in outcome}
    rows = sum(value in merged for value in given)
    if rows:
        first = next(value for value in given if value in merged)
        message = (
            f"{rows:,} rows have an outcome behind the method's name ({first!r}); they are counted under the name "
            f"alone (--method-column {name!r} parts them)"
        )
        problems.append(Problem("outcomes in labels", rows, (), message))
    return merged


def _is_outcome(text: str, task: Task) -> bool:
    words = {_key(word) for word in re.split(r"[\s,;+/]+", text) if word}
    known = {*_OUTCOMES, *_MORE_OUTCOMES, "length", "only", "words", *(_key(n) for n in _classes(task))}
    return bool(words) and words <= known


def _classes(task: Task) -> tuple[str, ...]:
    return (*task.lexicon.names, *task.labels)


def _names_methods(given: Sequence[str], task: Task) -> bool:
    """Whether a column named Label does so: not if it holds outcomes, numbers, or something else each row."""
    different = set(given)
    return not _are_outcomes(given, task) and (len(different) <= 20 or len(different) <= len(given) / 20)


def _are_outcomes(given: Sequence[str], task: Task) -> bool:
    classes = {_key(name) for name in _classes(task)}
    known = _OUTCOMES | _MORE_OUTCOMES | classes | {f"{name}only" for name in classes}
    return all(
        _key(value) in known or {*map(_key, value.split("+"))} <= classes or re.fullmatch(r"[-+]?\d*\.?\d*", value)
        for value in set(given)
    )
