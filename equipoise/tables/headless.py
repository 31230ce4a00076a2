"""Files whose first line is no header: whether their lines are sentences, and what helps where they are not."""

import csv
from collections.abc import Sequence

from equipoise.errors import UserError
from equipoise.tables.separated import DELIMITERS, is_row
from equipoise.tables.table import Table

_ENDS = ".!?\u2026\"'\u201d\u00bb"
"""What sentences end with, and no occupation or method does."""


def check_fields(table: Table, lines: Sequence[str]) -> None:
    """Raises UserError where lines that look like sentences have a second field, each of them the same number."""
    for delimiter in DELIMITERS:
        try:
            rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
        except csv.Error:
            continue
        width = len(rows[0])
        if width > 1 and all(is_row(row, width) and row[-1][-1] not in _ENDS for row in rows):
            names = delimiter.join(["Text", "Occupation", "Method", "Seed"][:width])
            raise UserError(
                f"{table.path}: each line has {width} fields between {delimiter!r}, and the first is no header: put one "
                f"there that names them, such as {names}; or 'Text' alone, with each sentence in quotation marks"
            )
