"""Files whose first line is no header: whether their lines are sentences, and what helps where they are not."""

import csv
from collections.abc import Sequence

from equipoise.errors import UserError
from equipoise.protocol.prompts import clean
from equipoise.tables import names
from equipoise.tables.frame import Frame
from equipoise.tables.read import plain_lines
from equipoise.tables.separated import DELIMITERS, is_row
from equipoise.tables.table import Table

_ENDS = ".!?\u2026\"'\u201d\u00bb"
"""What sentences end with, and no occupation or method does."""


def headless(table: Table, frame: Frame) -> str:
    """What helps where the first line of a file is no header; empty where it may be one."""
    lines = [(number, line) for number, line in plain_lines(table.source) if line.strip()]
    if len(lines) < 2:
        return ""
    first = lines[0][1].strip()
    if is_header(first, ":"):
        return "its columns stand between ':': write 'sep=:' on a line before the first"
    for number, line in lines[1:20]:
        if any(is_header(line, delimiter) for delimiter in DELIMITERS):
            return f"its header stands on line {number}: delete what is before it"
    begun = sum(frame.occupation(clean(line)) is not None for _, line in lines[1:])
    if 2 * begun >= len(lines) - 1:
        return (
            f"line {lines[0][0]} is no header, and no sentence that begins as '{frame.example()}' does: delete it, or "
            "write 'Text' on a line before it"
        )
    if len(table.columns) > 1 and any(frame.occupation(name) for name in table.columns):
        return "its first line is no header: put one there, such as Occupation,Text"
    words = len(first.split())
    if words > 5 or (words > 1 and first[-1] in _ENDS and (words > 3 or len(table.columns) == 1)):
        return (
            f"its first line is no header: put one there, such as Occupation,Text, and before each sentence its "
            f"occupation and a comma; or begin each line as '{frame.example()}'"
        )
    return ""


def is_header(line: str, delimiter: str) -> bool:
    """Whether a line has a name of texts, and another that is known if there are more."""
    fields = [field.strip().strip('"') for field in line.split(delimiter)]
    return bool(names.named(fields, names.TEXT_NAMES)) and names.known(fields) >= min(2, len(fields))


def check_delimiter(table: Table, place: int, certain: bool = False) -> None:
    """Raises UserError where the row at `place` has the fields of its columns between other characters than the
    header; `certain`: only where prose does not have them so."""
    if not table.source or not table.lines:
        return
    line = dict(plain_lines(table.source)).get(table.lines[place], "")
    for delimiter in (*DELIMITERS, ":"):
        fields, width = line.split(delimiter), len(table.columns)
        fits = is_row(fields, width) if certain else len(fields) >= width
        if delimiter != table.delimiter and width > 1 and fits:
            raise UserError(
                f"{table.path}: {table.where(place)} has {delimiter!r} between its fields, and the header has "
                f"{table.delimiter!r}: write the same everywhere"
            )


def check_fields(table: Table, lines: Sequence[str]) -> None:
    """Raises UserError where lines that look like sentences have a second field, each of them the same number."""
    for delimiter in DELIMITERS:
        try:
            rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
        except csv.Error:
            continue
        width = len(rows[0])
        if width > 1 and all(is_row(row, width) and row[-1][-1] not in _ENDS for row in rows):
            header = delimiter.join(["Text", "Occupation", "Method", "Seed"][:width])
            raise UserError(
                f"{table.path}: each line has {width} fields between {delimiter!r}, and the first is no header: put "
                f"one there that names them, such as {header}; or 'Text' alone, with each sentence in quotation marks"
            )
