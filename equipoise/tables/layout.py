"""The sentences of a table that are measured or learnt, each with its occupation and method."""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from equipoise.documents import parse_json
from equipoise.errors import UserError
from equipoise.protocol.plural import plural
from equipoise.protocol.prompts import clean
from equipoise.protocol.task import Task
from equipoise.tables import names
from equipoise.tables.choose import Chosen, Columns, choose, values
from equipoise.tables.found import Layout, Problem
from equipoise.tables.frame import SHORT, Form, Forms, Frame, forms
from equipoise.tables.headless import check_delimiter, check_fields
from equipoise.tables.join import joined
from equipoise.tables.read import plain_lines
from equipoise.tables.table import Table, rows_are, some

__all__ = ["Columns", "Form", "Row", "arrange", "as_texts", "is_empty", "settle_names"]

_NO_TEXT = frozenset(("nan", "none", "null", "<na>", "n/a"))
_MARKUP = re.compile(r"<\|[^<>|\n]{1,40}\|>|\[/?INST\]|</?s>|<(?:start|end)_of_turn>|<[｜|][^<>\n]{1,40}[｜|]>")
"""What chat templates put around turns."""
_WRAPPED = re.compile(r"\s*[{\[<]")
UNKNOWN = "(unknown)"
_MOST_UNKNOWN = 0.5
"""Share of texts without an occupation beyond which those that were found are taken for accidents."""


@dataclass(frozen=True)
class Row:
    file: int
    """Its file's place among the files."""
    line: int
    """Counted from 1 without a header, rows that are left out included."""
    method: str
    model: str
    seed: str
    occupation: str
    run_id: str
    text: str
    """For rows.csv: the file's text as it is, or prefix and continuation."""
    measured: str
    """The sentence that is measured: `text` without outer white space and one pair of quotation marks."""


def arrange(
    table: Table, file: int, task: Task, *, columns: Columns, form: Form, method: str | None, seed: str
) -> tuple[list[Row], Layout, list[Problem]]:
    """The rows of a table. `method` names all of them; `seed` those that have none of their own.

    Raises UserError where no column holds texts, where nothing tells the occupations, and where a guess would decide
    what is measured; the line and the remedy are named.
    """
    frame = Frame(task)
    table = _sentences(table, frame, columns)
    if table.broken:
        raise UserError(table.broken)
    if not table.rows:
        raise UserError(f"{table.path} holds no rows: give a file with a row for each text")
    table, joins = joined(table, frame, columns)
    chosen, said, other = choose(table, columns, task, frame, method)
    table = _settled(table, chosen.text, said)
    problems = [*table.problems, *joins, *said]
    texts, empty, odd = as_texts(table.column(chosen.text))
    report = _Report(table, problems)
    report("empty text", empty, "no text; such a row counts as a sentence that holds no term")
    report("text that is no string", odd, "a number, list or object for a text; it is written out as JSON")
    _check_wrapped(table, texts, form, columns, report)
    occupations = _occupations(table, chosen, texts, frame, columns, report)
    models, seeds, runs = (values(table, name) for name in (chosen.model, chosen.seed, chosen.run))
    if chosen.method is not None and method is None:
        given = table.column(chosen.method)
        spaced = [i for i, name in enumerate(given) if isinstance(name, str) and name.strip() and name != name.strip()]
        report("spaces around methods", spaced, "spaces around the method's name; it is read without them")
    methods = [other.get(name, name) for name in values(table, chosen.method)]
    own = method or Path(table.path).stem
    if chosen.method is not None:
        report("no method", {i for i, name in enumerate(methods) if not name}, f"no method; named {own!r}")
    filled = ["" if i in empty else text for i, text in enumerate(texts)]
    judged = _forms(table, occupations, filled, form, frame, columns, report)
    rows = []
    for i, (text, occupation) in enumerate(zip(texts, occupations, strict=True)):
        full = text if judged.whole[i] or not text.strip() else frame.join(occupation, text)
        measured = "" if i in empty else clean(full)
        name = methods[i] if method is None and methods[i] else own
        rows.append(Row(file, table.numbers[i], name, models[i], seeds[i] or seed, occupation, runs[i], full, measured))
    how: Literal["detected", "given"] = "detected" if form == "auto" else "given"
    return rows, Layout(*chosen, judged.seen, how), problems


def is_empty(table: Table) -> bool:
    """Whether a file holds a header and nothing else, or not even one."""
    return not table.rows and (not table.columns or names.known(table.columns) > 0)


@dataclass(frozen=True)
class _Report:
    """Adds problems to a list, with where they are."""

    table: Table
    problems: list[Problem]

    def __call__(self, kind: str, places: Iterable[int], message: str) -> None:
        """`places` of rows in the table."""
        ordered = sorted(places)
        if ordered:
            where, _, _ = self.table.where(ordered[0]).partition(" ")
            shown = some([int(self.table.where(i).split()[1]) for i in ordered], where)
            have = "row has" if len(ordered) == 1 else "rows have"
            first = tuple(self.table.numbers[i] for i in ordered[:5])
            self.problems.append(Problem(kind, len(ordered), first, f"{len(ordered):,} {have} {message} ({shown})"))


def _sentences(table: Table, frame: Frame, columns: Columns) -> Table:
    """One sentence a line, where the first line is one and no header."""
    if columns.text is not None or not table.source:
        return table
    if names.named(table.columns, names.TEXT_NAMES):
        return table
    lines = plain_lines(table.source)
    filled = [(number, line) for number, line in lines if line.strip()]
    if frame.occupation(clean(filled[0][1])) is None:
        return table
    check_fields(table, [line for _, line in filled])
    while lines and not lines[-1][1].strip():
        lines.pop()
    problems = []
    blank = [number for number, line in lines if not line.strip()]
    if blank:
        message = f"{rows_are(len(blank))} blank ({some(blank)}); not counted as sentences"
        problems.append(Problem("blank rows", len(blank), tuple(blank[:5]), message))
    message = "it has no header; every line is taken for a sentence"
    problems.append(Problem("no header", len(filled), (), message))
    return replace(
        table,
        columns=("line",) if columns.given else ("text",),
        rows=[[line] for _, line in filled],
        problems=tuple(problems),
        numbers=tuple(range(1, len(filled) + 1)),
        lines=tuple(number for number, _ in filled),
        ragged={},
        broken="",
    )


def _settled(table: Table, text: str, said: list[Problem]) -> Table:
    """Rows with too few or too many fields made right where that is certain. Raises UserError where it is not."""
    if not table.ragged:
        return table
    width, place = len(table.columns), table.columns.index(text)
    columns = plural(width, "column")
    rows = list(table.rows)
    short, long = [], []
    for i, fields in table.ragged.items():
        if len(fields) <= place:
            check_delimiter(table, i)
            raise UserError(
                f"{table.path}: {table.where(i)} ends before its text, with {len(fields)} of {width} fields: mend or "
                "delete it; a text with line breaks belongs in quotation marks"
            )
        if len(fields) < width:
            check_delimiter(table, i, certain=True)
            short.append(i)
        elif place == width - 1:
            long.append(i)
            rows[i] = [*fields[:place], table.delimiter.join(fields[place:])]
        else:
            raise UserError(
                f"{table.path}: {table.where(i)} has {len(fields)} fields for {columns}, so that nothing "
                f"tells where its text ends: put texts with {table.delimiter!r} in them in quotation marks"
            )
    table = replace(table, rows=rows, ragged={})
    report = _Report(table, said)
    report("too few fields", short, f"fewer fields than the {columns}; the last are taken as empty")
    report(
        "too many fields", long,
        f"more fields than the {columns}; the text, which stands last, is taken to hold {table.delimiter!r}",
    )  # fmt: skip
    return table


def as_texts(given: Iterable[Any]) -> tuple[list[str], set[int], set[int]]:
    """Texts, and the places of those that are empty and of those that were something else."""
    texts, empty, odd = [], set(), set()
    for i, value in enumerate(given):
        if value is None or value != value or value in ([], {}):
            text = ""
        elif isinstance(value, str):
            text = value
        else:
            odd.add(i)
            text = json.dumps(value, ensure_ascii=False, default=str)
        if not text.strip() or text.strip().lower() in _NO_TEXT:
            empty.add(i)
        texts.append(text)
    return texts, empty, odd


def _check_wrapped(table: Table, texts: Sequence[str], form: Form, columns: Columns, report: _Report) -> None:
    """Reports texts that stand in JSON, in a list or in the markup of a chat. Raises UserError where most do, unless
    an option says what texts are."""
    wrapped = [i for i, text in enumerate(texts) if _WRAPPED.match(text) and _is_wrapped(text)]
    if form == "auto" and 2 * len(wrapped) >= sum(bool(text.strip()) for text in texts) > 0:
        anyway = ", or measure them as they are with --form sentence" if columns.options else ""
        raise UserError(
            f"{table.path}: {len(wrapped):,} texts stand within JSON, a list or the markup of a chat "
            f"({table.where(wrapped[0])}: {texts[wrapped[0]][:40]!r}): write each text alone{anyway}"
        )
    report("wrapped texts", wrapped, "a text within JSON, a list or the markup of a chat; it is measured as it is")
    ends = [i for i, text in enumerate(texts) if i not in set(wrapped) and _MARKUP.search(text)]
    report("markup", ends, "markup of a chat in the text, which is measured with it")


def _is_wrapped(text: str) -> bool:
    if _MARKUP.match(text.lstrip()):
        return True
    for parse in (parse_json, ast.literal_eval):
        try:
            return isinstance(parse(text.strip()), (dict, list))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return False


def _occupations(
    table: Table, chosen: Chosen, texts: Sequence[str], frame: Frame, columns: Columns, report: _Report
) -> list[str]:
    """Each row's occupation: from its column, else from the beginning of its text. Raises UserError where the texts do
    not tell it, or tell another one than the column."""
    out = [frame.canonical(name) for name in values(table, chosen.occupation)]
    begun = [frame.occupation(text) for text in texts]
    often = Counter(begun)
    believed = [
        o if o is not None and (frame.has(o) or len(o.split()) <= SHORT or often[o] > 1) else None for o in begun
    ]
    gaps = [i for i, name in enumerate(out) if not name]
    filled = [i for i in gaps if texts[i].strip()]
    unknown = [i for i in filled if believed[i] is None]
    if len(unknown) > _MOST_UNKNOWN * len(filled) or (gaps and not filled and len(gaps) == len(out)):
        raise UserError(_unknown(table, texts, unknown, len(filled), frame, columns))
    for i in gaps:
        out[i] = believed[i] or UNKNOWN
    if chosen.occupation is not None:
        report("occupation from the text", set(gaps) - {i for i in gaps if believed[i] is None},
               "no occupation; it is read from the text")  # fmt: skip
    report("no occupation", {i for i in gaps if believed[i] is None},
           f"no occupation, and none can be read from the text; named {UNKNOWN!r}")  # fmt: skip
    other = [
        i
        for i, (name, found) in enumerate(zip(out, begun, strict=True))
        if found is not None and frame.has(found) and found != name and not frame.is_begun(clean(texts[i]), name)
    ]
    if len(other) > 0.5 * len(out):
        i = other[0]
        raise UserError(
            f"{table.path}: the column {chosen.occupation!r} names another occupation than the text on {len(other):,} "
            f"of {len(out):,} rows ({table.where(i)}: {out[i][:40]!r}, and {texts[i][:40]!r}): say which column is "
            f"right {columns.remedy('occupation', several=True)}"
        )
    report("another occupation", other, "a text that begins with another occupation than the column says")
    return out


def _unknown(
    table: Table, texts: Sequence[str], unknown: Sequence[int], count: int, frame: Frame, columns: Columns
) -> str:
    found = count - len(unknown)
    where = f"{table.where(unknown[0])}: {texts[unknown[0]][:40]!r}; " if unknown else ""
    only = f"only {found:,} of {count:,} begin with '{frame.example()}'; " if found else ""
    name = columns.remedy("occupation")
    return (
        f"{table.path} does not say which occupation its texts are about ({only}{where}its columns are "
        f"{names.listed(table.columns)}): say it {name}, or begin each text with '{frame.example()}'"
    )


def _forms(
    table: Table,
    occupations: Sequence[str],
    texts: Sequence[str],
    form: Form,
    frame: Frame,
    columns: Columns,
    report: _Report,
) -> Forms:
    """Which texts are whole sentences. Raises UserError where that cannot be told."""
    if form != "auto":
        return Forms([form == "sentence"] * len(texts), form, [], True)
    judged = forms(occupations, texts, frame)
    decides = "--form decides otherwise" if columns.options else "whole sentences leave no doubt"
    if not judged.certain:
        i = judged.unsure[0]
        remedy = (
            "say which with --form sentence or --form continuation"
            if columns.options
            else f"write whole sentences, such as '{frame.example()} …'"
        )
        raise UserError(
            f"{table.path}: nothing tells whether texts such as {texts[i][:40]!r} ({table.where(i)}) are whole "
            f"sentences or go on after '{frame.example(occupations[i])}': {remedy}"
        )
    unsure = set(judged.unsure)
    if judged.seen == "mixed":
        filled = [i for i, text in enumerate(texts) if text.strip()]
        bare = [i for i in filled if not judged.whole[i]]
        whole = [i for i in filled if judged.whole[i] and i not in unsure]
        if 2 * len(bare) <= len(filled):
            report("mixed forms", bare, f"a bare continuation among sentences; the prefix was put before it, {decides}")
        else:
            report(
                "mixed forms", whole, f"a whole sentence among continuations; no prefix was put before it, {decides}"
            )
    for whole_ones, taken in ((True, "whole sentences"), (False, "continuations, with the prefix before them")):
        places = [i for i in judged.unsure if judged.whole[i] is whole_ones]
        report("unsure forms", places,
               f"neither the frame nor the occupation at the beginning; taken for {taken}, {decides}")  # fmt: skip
    return judged


def settle_names(rows_by_file: Sequence[Sequence[Row]]) -> Mapping[str, str]:
    """For occupations that differ in case between files, the spelling that came first."""
    first: dict[str, str] = {}
    for rows in rows_by_file:
        for row in rows:
            first.setdefault(row.occupation.casefold(), row.occupation)
    return {row.occupation: first[row.occupation.casefold()] for rows in rows_by_file for row in rows}
