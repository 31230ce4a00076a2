"""Which column is what, and from it the sentences that are measured, each with its occupation and method."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from equipoise.errors import UserError
from equipoise.protocol.prompts import PLACE, clean
from equipoise.protocol.task import Task
from equipoise.tables.found import Layout, Problem
from equipoise.tables.read import Table

Form = Literal["auto", "sentence", "continuation"]

# Compared without case, spaces, "_" and "-"; the first that a file has is taken.
TEXT_NAMES = (
    "text", "sentence", "output", "sample", "completion", "response", "generatedtext", "generation", "generated",
    "outputtext", "modeloutput", "continuation", "description", "content", "answer",
)  # fmt: skip
OCCUPATION_NAMES = ("occupation", "job", "profession", "occupationname", "jobtitle", "role")
METHOD_NAMES = ("method", "label")
MODEL_NAMES = ("model", "modelname", "modelid")
SEED_NAMES = ("seed", "randomseed")
RUN_NAMES = ("runid", "run", "sampleid", "id", "index")

_OUTCOMES = frozenset(("", "0", "1", "true", "false", "yes", "no", "pass", "fail", "both", "one", "none", "neither",
                       "agentic", "communal", "balanced", "agenticonly", "communalonly", "nan", "success", "failure",
                       "compliant", "noncompliant", "accepted", "rejected", "mixed", "neutral"))  # fmt: skip
"""What a column named Label holds, in this task's or the public study's files, where it does not name the method; and
so do the names of a task's classes."""
_NO_TEXT = frozenset(("nan", "none", "null", "<na>", "n/a"))
_OCCUPATION = r"\w[\w'\u2019/-]*(?:\s+\w[\w'\u2019/-]*){0,2}?"
"""An occupation that the task does not have: up to three words."""


@dataclass(frozen=True)
class Columns:
    """Names of columns as options give them; None: recognise them."""

    text: str | None = None
    occupation: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class Row:
    file: int
    """Its file's place among the files."""
    line: int
    """Counted from 1 without a header."""
    method: str
    model: str
    seed: str
    occupation: str
    run_id: str
    text: str
    """For rows.csv: the file's text as it is, or prefix and continuation."""
    measured: str
    """The sentence that is measured: `text` without outer white space and one pair of quotation marks."""


class Frame:
    """How sentences of a task begin: told from their texts, and put before what only continues it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.before, self.after = (part.strip() for part in task.frame.split(PLACE))
        self._names: dict[str, str] = {}
        for each in task.occupations:
            for form in each:
                self._names.setdefault(form.casefold(), each.name)
        forms = sorted((each.frame for each in task.occupations), key=len, reverse=True)
        # Without words after it nothing tells where an occupation of no list ends.
        anything = [_OCCUPATION] if self.after else []
        occupation = "|".join([*map(_spaced, forms), *anything])
        self._begins = re.compile(rf"\W*{self._opened()}({occupation}){_then(self.after)}", re.IGNORECASE)
        self._goes_on = re.compile(rf"\s*{_spaced(self.after)}(?!\w)") if self.after else None

    def _opened(self) -> str:
        return f"{_spaced(self.before)}{_gap(self.before[-1])}" if self.before else ""

    def canonical(self, name: str) -> str:
        """The task's own name of an occupation, whatever its case, its article or the form that the frame takes."""
        name = " ".join(name.split())
        key = name.casefold()
        return self._names.get(key) or self._names.get(re.sub(r"^(the|an?) ", "", key), name)

    def occupation(self, text: str) -> str | None:
        """The occupation that a text begins with, as the frame has it; None where it does not begin so."""
        begins = self._begins.match(text)
        return self.canonical(begins[1]) if begins else None

    def is_begun(self, text: str, occupation: str) -> bool:
        """Whether a text begins with the frame as far as the occupation."""
        form = _spaced(self.task.occupation(occupation).frame)
        return re.match(rf"\W*{self._opened()}{form}(?!\w)", text, re.IGNORECASE) is not None

    def join(self, occupation: str, continuation: str) -> str:
        """Frame and continuation; a continuation that begins with the frame's end ("was") gets the rest of it only."""
        if self._goes_on is not None and self._goes_on.match(continuation):
            return self.task.prefix(occupation).removesuffix(self.after) + continuation.lstrip()
        return self.task.sentence(occupation, continuation)


def _spaced(words: str) -> str:
    """A pattern of the words with any white space between them."""
    return r"\s+".join(map(re.escape, words.split()))


def _then(words: str) -> str:
    return (_gap(words[0]) + _spaced(words) if words else "") + r"(?!\w)"


def _gap(beside: str) -> str:
    """What stands between an occupation and the character of the frame beside it: an apostrophe may touch it."""
    return r"\s+" if beside.isalnum() else r"\s*"


def arrange(
    table: Table, file: int, task: Task, *, columns: Columns, form: Form, method: str | None, seed: str
) -> tuple[list[Row], Layout, list[Problem]]:
    """The rows of a table, none left out. `method` names all of them; `seed` those that have none of their own.

    Raises UserError where no column holds texts, and where nothing tells the occupations.
    """
    chosen = _choose(table, columns, task, method)
    frame = Frame(task)
    problems = list(table.problems)
    texts, empty, odd = _texts(row[table.columns.index(chosen.text)] for row in table.rows)
    _report(problems, "empty text", empty, "no text; they count as sentences that hold no term")
    _report(problems, "text that is no string", odd, "a number, list or object for a text; it is written out as JSON")
    occupations = [frame.canonical(name) for name in _column(table, chosen.occupation)]
    unknown = _infer(occupations, texts, frame)
    if len(unknown) == len(occupations):
        raise UserError(
            f"{table.path} does not say which occupation its texts are about: name the column with "
            f"--occupation-column, or begin each text with '{task.frame.replace(PLACE, 'X')}' (its columns are "
            f"{_named(table.columns)})"
        )
    _report(problems, "no occupation", unknown, "no occupation, and none can be read from the text; named '(unknown)'")
    models, seeds, runs = (_column(table, name) for name in (chosen.model, chosen.seed, chosen.run))
    names = [method or name or Path(table.path).stem for name in _column(table, chosen.method)]
    whole, seen = _forms(occupations, texts, form, frame)
    rows = []
    for i, (text, occupation) in enumerate(zip(texts, occupations, strict=True)):
        full = text if whole[i] or not text.strip() else frame.join(occupation, text)
        measured = "" if i + 1 in empty else clean(full)
        rows.append(Row(file, i + 1, names[i], models[i], seeds[i] or seed, occupation, runs[i], full, measured))
    if seen == "mixed":
        joined = {i for i, is_whole in enumerate(whole, 1) if not is_whole}
        _report(problems, "mixed forms", joined, "a bare continuation among sentences; the prefix was put before it")
    how: Literal["detected", "given"] = "detected" if form == "auto" else "given"
    return rows, Layout(*chosen, seen, how), problems


class _Chosen(NamedTuple):
    """The names of the columns that are read as what, in the order of `Layout`."""

    text: str
    occupation: str | None
    method: str | None
    model: str | None
    seed: str | None
    run: str | None


def _choose(table: Table, columns: Columns, task: Task, method: str | None) -> _Chosen:
    """Raises UserError where no column holds texts, and for one that an option names and that is not there."""
    text = _given_or_known(table, columns.text, TEXT_NAMES, "--text-column")
    if text is None:
        raise UserError(
            f"{table.path} has no column of texts among {_named(table.columns)}: name it with --text-column"
        )
    occupation = _given_or_known(table, columns.occupation, OCCUPATION_NAMES, "--occupation-column")
    model, seed, run = (_known(table.columns, names) for names in (MODEL_NAMES, SEED_NAMES, RUN_NAMES))
    named = _given_or_known(table, columns.method, (), "--method-column")
    for name in METHOD_NAMES if named is None and method is None else ():
        candidate = _known(table.columns, (name,))
        if candidate is not None and _names_methods(_column(table, candidate), task):
            named = candidate
            break
    return _Chosen(text, occupation, named or (model if method is None else None), model, seed, run)


def _column(table: Table, name: str | None) -> list[str]:
    """The values of a column as texts; empty ones for no column."""
    if name is None:
        return [""] * len(table.rows)
    place = table.columns.index(name)
    return [_plain(row[place]) for row in table.rows]


def _names_methods(values: Sequence[str], task: Task) -> bool:
    """Whether a column named Method or Label does so: not if it holds outcomes, numbers, or something else each row."""
    different = set(values)
    classes = {_key(name) for name in (*task.lexicon.names, *task.labels)}
    known = _OUTCOMES | classes | {f"{name}only" for name in classes}
    outcomes = all(
        _key(value) in known or {*map(_key, value.split("+"))} <= classes or re.fullmatch(r"[-+]?\d*\.?\d*", value)
        for value in different
    )
    return not outcomes and (len(different) <= 20 or len(different) <= len(values) / 20)


def _forms(
    occupations: Sequence[str], texts: Sequence[str], form: Form, frame: Frame
) -> tuple[list[bool], Literal["sentence", "continuation", "mixed"]]:
    """For each text whether it is a whole sentence, and what that makes of the file.

    A text that begins with the frame as far as the occupation (`The {occupation}`) is whole. Of the others, those that
    begin with a small letter or a mark continue the frame; those that begin with a capital letter do what most of the
    file does.
    """
    if form != "auto":
        return [form == "sentence"] * len(texts), form
    whole: list[bool | None] = []
    for occupation, text in zip(occupations, texts, strict=True):
        start = clean(text)
        if frame.is_begun(start, occupation):
            whole.append(True)
        else:
            first = next((c for c in start if c.isalnum()), "")
            whole.append(None if not start or first.isupper() or not first else False)
    begun, continued = whole.count(True), whole.count(False)
    undecided = begun > continued or (begun == continued == 0) or (begun == 0 and whole.count(None) > continued)
    decided = [undecided if w is None else w for w, text in zip(whole, texts, strict=True)]
    filled = [w for w, text in zip(decided, texts, strict=True) if text.strip()] or [True]
    return decided, "sentence" if all(filled) else "mixed" if any(filled) else "continuation"


def _texts(values: Iterable[Any]) -> tuple[list[str], set[int], set[int]]:
    """Texts, and which rows (from 1) are empty and which were something else."""
    texts, empty, odd = [], set(), set()
    for i, value in enumerate(values, 1):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            text = ""
        elif isinstance(value, str):
            text = value
        else:
            odd.add(i)
            text = json.dumps(value, ensure_ascii=False)
        if not text.strip() or text.strip().lower() in _NO_TEXT:
            empty.add(i)
        texts.append(text)
    return texts, empty, odd


def _infer(occupations: list[str], texts: Sequence[str], frame: Frame) -> set[int]:
    """Fill in the occupations that are missing from the beginnings of the texts; the rows (from 1) left unknown."""
    unknown = set()
    for i, occupation in enumerate(occupations):
        if not occupation:
            found = frame.occupation(texts[i])
            occupations[i] = found or "(unknown)"
            if found is None:
                unknown.add(i + 1)
    return unknown


def _plain(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # pandas writes whole numbers with a gap among them as 1.0
    return value.strip() if isinstance(value, str) else str(value)


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def _known(columns: Sequence[str], names: Sequence[str]) -> str | None:
    by_key = {_key(column): column for column in reversed(columns)}
    return next((by_key[name] for name in names if name in by_key), None)


def _given_or_known(table: Table, given: str | None, names: Sequence[str], option: str) -> str | None:
    if given is None:
        return _known(table.columns, names)
    found = given if given in table.columns else _known(table.columns, (_key(given),))
    if found is None:
        raise UserError(f"{table.path} has no column {given!r} for {option}: it has {_named(table.columns)}")
    return found


def _named(columns: Sequence[str]) -> str:
    return ", ".join(repr(str(name)[:30]) for name in columns[:8]) + (", …" if len(columns) > 8 else "")


def _report(problems: list[Problem], kind: str, rows: set[int], message: str) -> None:
    if rows:
        first = tuple(sorted(rows)[:5])
        have = "row has" if len(rows) == 1 else "rows have"
        problems.append(Problem(kind, len(rows), first, f"{len(rows)} {have} {message}"))


def settle_names(rows_by_file: Sequence[Sequence[Row]]) -> Mapping[str, str]:
    """For occupations that differ in case between files, the spelling that came first."""
    first: dict[str, str] = {}
    for rows in rows_by_file:
        for row in rows:
            first.setdefault(row.occupation.casefold(), row.occupation)
    return {row.occupation: first[row.occupation.casefold()] for rows in rows_by_file for row in rows}
