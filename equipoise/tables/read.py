"""Tables of any common layout: CSV, TSV, JSON and JSON lines, as a list of columns and rows of whatever was in them.

What a file holds decides, not its name. Nothing is dropped and no text is changed: lone surrogates, NUL and line breaks
within a field come through.
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.errors import UserError
from equipoise.tables.found import Problem

LONGEST_FIELD = 1 << 28
"""Characters of one CSV field: a degenerate model's text may be long."""

_HOLDERS = ("data", "rows", "samples", "completions", "results", "records")
"""Names under which a JSON object may hold the list of its rows."""


@dataclass(frozen=True)
class Table:
    path: str
    sha256: str
    columns: tuple[str, ...]
    rows: list[list[Any]]
    """One value for each column; None where a row has none."""
    problems: tuple[Problem, ...]


def read_table(path: str, encoding: str | None = None) -> Table:
    """The table in the file. Raises UserError, in one line, for a file that cannot be read or holds no rows."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a CSV, TSV, JSON or JSONL file") from None
    text = _decode(path, data, encoding)
    problems: list[Problem] = []
    begin = text.lstrip()[:1]
    if not begin:
        raise UserError(f"{path} is empty: give a file with a row for each text")
    if begin in "[{":
        columns, rows = _json(path, text)
    else:
        columns, rows = _csv(path, text, problems)
    if not rows:
        raise UserError(f"{path} holds no rows: give a file with a row for each text")
    return Table(path, hashlib.sha256(data).hexdigest(), tuple(columns), rows, tuple(problems))


def _decode(path: str, data: bytes, encoding: str | None) -> str:
    if encoding is None:
        encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        # surrogatepass: files of this program keep lone surrogates so.
        return data.decode(encoding, "surrogatepass" if encoding.startswith("utf") else "strict")
    except LookupError:
        raise UserError(f"there is no encoding {encoding!r}: give for instance --encoding cp1252") from None
    except UnicodeError as error:
        where = f" at byte {error.start}" if isinstance(error, UnicodeDecodeError) else ""
        name = encoding.removesuffix("-sig").upper()
        raise UserError(
            f"{path} is not {name}{where}: save it as UTF-8, or say what it is, for instance --encoding cp1252"
        ) from None


def _csv(path: str, text: str, problems: list[Problem]) -> tuple[list[str], list[list[Any]]]:
    csv.field_size_limit(LONGEST_FIELD)
    header = next(csv.reader(io.StringIO(text, newline="")), [])
    delimiter = max(",\t;|", key=",".join(header).count)
    rows: list[list[Any]] = []
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        columns = next(reader)
        while columns == []:
            columns = next(reader)
        for row in reader:
            if row:  # a blank line is no row
                rows.append(list(row))
    except csv.Error as error:
        raise UserError(f"{path} is no CSV ({error}): save it anew as CSV, TSV, JSON or JSONL") from None
    width = len(columns)
    for name, wrong in (
        ("too few fields", [i for i, row in enumerate(rows, 1) if len(row) < width]),
        ("too many fields", [i for i, row in enumerate(rows, 1) if len(row) > width]),
    ):
        if wrong:
            message = f"{len(wrong)} rows have {name} for the {width} columns; is a text with commas unquoted?"
            problems.append(Problem(name, len(wrong), tuple(wrong[:5]), message))
    return columns, [row[:width] + [None] * (width - len(row)) for row in rows]


def _json(path: str, text: str) -> tuple[list[str], list[list[Any]]]:
    try:
        document = json.loads(text)
    except ValueError as error:
        return _from_objects(path, _json_lines(path, text, error))
    if isinstance(document, Mapping):
        if isinstance(document.get("columns"), list) and isinstance(document.get("data"), list):  # pandas' "split"
            columns = [str(name) for name in document["columns"]]
            if any(not isinstance(row, list) or len(row) != len(columns) for row in document["data"]):
                raise UserError(f"{path}: the rows under 'data' do not have the length of 'columns'")
            return columns, document["data"]
        for name in _HOLDERS:
            if isinstance(document.get(name), list) and all(isinstance(row, Mapping) for row in document[name]):
                return _from_objects(path, document[name])
        return _from_columns(path, document)
    return _from_objects(path, document)


def _json_lines(path: str, text: str, whole: ValueError) -> list[Any]:
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line))
        except ValueError as error:
            reason = whole if number == 1 else f"line {number}: {error}"
            raise UserError(f"{path} is neither JSON nor JSON lines ({reason}): mend or export it again") from None
    return documents


def _from_objects(path: str, document: Any) -> tuple[list[str], list[list[Any]]]:
    if all(isinstance(row, str) for row in document):
        return ["text"], [[row] for row in document]
    if not all(isinstance(row, Mapping) for row in document):
        raise UserError(f"{path} is JSON but no list of objects: write one object with text and occupation a row")
    columns = list(dict.fromkeys(str(name) for row in document for name in row))
    return columns, [[row.get(name) for name in columns] for row in document]


def _from_columns(path: str, document: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """An object of columns: lists, or pandas' objects of index and value. One object of plain values is one row."""
    columns = {
        str(name): list(column.values()) if isinstance(column, Mapping) else column
        for name, column in document.items()
        if isinstance(column, (list, Mapping))
    }
    if not columns:
        return _from_objects(path, [document])
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise UserError(f"{path}: its columns have different lengths ({_listed(sorted(lengths))}): export it again")
    rows: list[list[Any]] = [list(row) for row in zip(*columns.values(), strict=True)]
    return list(columns), rows


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:5]))
