"""Which column is what, and from it the sentences that are measured, each with its occupation and method."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from equipoise.errors import UserError
from equipoise.evaluation.read import Table
from equipoise.evaluation.results import Layout, Problem
from equipoise.protocol.lexicon import OCCUPATIONS
from equipoise.protocol.prompts import clean, prefix, sentence

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
"""What a column named Label holds where it does not name the method."""
_NO_TEXT = frozenset(("nan", "none", "null", "<na>", "n/a"))
_BEGINNING = re.compile(r"\W*the\s+(\w[\w'\u2019/-]*(?:\s+\w[\w'\u2019/-]*){0,2}?)\s+was\b", re.IGNORECASE)


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
    """The protocol's sentence: `text` without outer white space and one pair of quotation marks."""


def arrange(
    table: Table, file: int, *, columns: Columns, form: Form, method: str | None, seed: str
) -> tuple[list[Row], Layout, list[Problem]]:
    """The rows of a table, none left out. `method` names all of them; `seed` those that have none of their own.

    Raises UserError where no column holds texts, and where nothing tells the occupations.
    """
    places = {name: i for i, name in reversed(list(enumerate(table.columns)))}
    text_column = _given_or_known(table, columns.text, TEXT_NAMES, "text", "--text-column")
    if text_column is None:
        raise UserError(
            f"{table.path} has no column of texts among {_named(table.columns)}: name it with --text-column"
        )
    occupation_column = _given_or_known(
        table, columns.occupation, OCCUPATION_NAMES, "occupation", "--occupation-column"
    )
    model_column, seed_column = _known(table.columns, MODEL_NAMES), _known(table.columns, SEED_NAMES)
    run_column = _known(table.columns, RUN_NAMES)

    def column(name: str | None) -> list[str]:
        return [""] * len(table.rows) if name is None else [_plain(row[places[name]]) for row in table.rows]

    method_column = _given_or_known(table, columns.method, (), "method", "--method-column")
    for name in METHOD_NAMES if method_column is None and method is None else ():
        candidate = _known(table.columns, (name,))
        if candidate is not None and _names_methods(column(candidate)):
            method_column = candidate
            break
    problems = list(table.problems)
    texts, empty, odd = _texts(row[places[text_column]] for row in table.rows)
    _report(problems, "empty text", empty, "no text; they count as sentences that hold no term")
    _report(problems, "text that is no string", odd, "a number, list or object for a text; it is written out as JSON")
    occupations = [_canonical(name) for name in column(occupation_column)]
    unknown = _infer(occupations, texts)
    if len(unknown) == len(occupations):
        raise UserError(
            f"{table.path} does not say which occupation its texts are about: name the column with "
            f"--occupation-column, or begin each text with 'The X was' (its columns are {_named(table.columns)})"
        )
    _report(problems, "no occupation", unknown, "no occupation, and none can be read from the text; named '(unknown)'")
    models, seeds, runs = column(model_column), column(seed_column), column(run_column)
    fallback = method_column or (model_column if method is None else None)
    names = [method or name or Path(table.path).stem for name in column(fallback)]
    whole, seen = _forms(occupations, texts, form)
    rows = []
    for i, (text, occupation) in enumerate(zip(texts, occupations, strict=True)):
        full = text if whole[i] or not text.strip() else join(occupation, text)
        measured = "" if i + 1 in empty else clean(full)
        rows.append(Row(file, i + 1, names[i], models[i], seeds[i] or seed, occupation, runs[i], full, measured))
    if seen == "mixed":
        joined = [i for i, is_whole in enumerate(whole, 1) if not is_whole]
        _report(
            problems, "mixed forms", set(joined), "a bare continuation among sentences; the prefix was put before it"
        )
    layout = Layout(
        text_column,
        occupation_column,
        fallback,
        model_column,
        seed_column,
        run_column,
        seen,
        "detected" if form == "auto" else "given",
    )
    return rows, layout, problems


def _names_methods(values: Sequence[str]) -> bool:
    """Whether a column named Method or Label does so: not if it holds outcomes, numbers, or something else each row."""
    different = set(values)
    outcomes = all(_key(value) in _OUTCOMES or re.fullmatch(r"[-+]?\d*\.?\d*", value) for value in different)
    return not outcomes and (len(different) <= 20 or len(different) <= len(values) / 20)


def join(occupation: str, continuation: str) -> str:
    """Prefix and continuation; a continuation that begins with "was" gets the rest of the prefix only."""
    if re.match(r"\s*was\b", continuation):
        return prefix(occupation).removesuffix("was") + continuation.lstrip()
    return sentence(occupation, continuation)


def _forms(
    occupations: Sequence[str], texts: Sequence[str], form: Form
) -> tuple[list[bool], Literal["sentence", "continuation", "mixed"]]:
    """For each text whether it is a whole sentence, and what that makes of the file.

    A text that begins with `The {occupation}` is whole. Of the others, those that begin with a small letter or a mark
    continue the prefix; those that begin with a capital letter do what most of the file does.
    """
    if form != "auto":
        return [form == "sentence"] * len(texts), form
    whole: list[bool | None] = []
    for occupation, text in zip(occupations, texts, strict=True):
        start = clean(text)
        if re.match(rf"\W*the\s+{re.escape(occupation)}\b", start, re.IGNORECASE):
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


def _infer(occupations: list[str], texts: Sequence[str]) -> set[int]:
    """Fill in the occupations that are missing from the beginnings of the texts; the rows (from 1) left unknown."""
    unknown = set()
    for i, occupation in enumerate(occupations):
        if not occupation:
            begins = _BEGINNING.match(texts[i])
            occupations[i] = _canonical(begins[1]) if begins else "(unknown)"
            if not begins:
                unknown.add(i + 1)
    return unknown


_PROTOCOL = {name.casefold(): name for name in OCCUPATIONS}


def _canonical(name: str) -> str:
    name = " ".join(name.split())
    return _PROTOCOL.get(re.sub(r"^(the|an?) ", "", name.casefold()), name)


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


def _given_or_known(table: Table, given: str | None, names: Sequence[str], what: str, option: str) -> str | None:
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
