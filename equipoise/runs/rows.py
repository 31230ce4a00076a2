"""CSV as bytes: rows that are there completely, and rows as they are written. RFC 4180, UTF-8."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


def serialise(rows: Iterable[Sequence[object]]) -> bytes:
    """The rows as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


class Parsed(NamedTuple):
    """The complete rows of a CSV, how many bytes they take, and the line (counted from 1) on which each ends."""

    rows: list[list[str]]
    size: int
    lines: list[int]


def parse(data: bytes) -> Parsed:
    """The rows that `data` holds completely, its header among them. What follows the last of them is half a row.

    A row is complete when its line break is there; one between quotation marks belongs to the text. Raises ValueError
    for complete rows that are not CSV, or not UTF-8.
    """
    size, quoted = 0, False
    for mark in re.finditer(rb'["\n]', data):
        if mark[0] == b'"':
            quoted = not quoted  # a doubled mark toggles twice
        elif not quoted:
            size = mark.end()
    rows, lines = read(data[:size].decode())
    return Parsed(rows, size, lines)


def read(text: str) -> tuple[list[list[str]], list[int]]:
    """The rows of a CSV, and the line (counted from 1) on which each ends. Raises ValueError for what is no CSV."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, lines = [], []
    try:
        for row in reader:
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    return rows, lines
