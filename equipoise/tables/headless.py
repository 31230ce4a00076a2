"""Files whose first line is no header: whether their lines are sentences, and what helps where they are not."""

import csv
from collections.abc import Sequence

from equipoise.errors import UserError
from equipoise.tables.separated import DELIMITERS, is_row
from equipoise.tables.table import Table


def check_fields(table: Table, lines: Sequence[str]) -> None:
    """Raises UserError where lines that look like sentences have a second field, each of them the same number."""
    for delimiter in DELIMITERS:
        try:
            rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
        except csv.Error:
            continue
        width = len(rows[0])
        if width > 1 and all(is_row(row, width) for row in rows):
            raise UserError(
                f"{table.path}: each line has {width} fields between {delimiter!r}, and the first is no header: put one "
                f"there that names them, such as {delimiter.join(['Text', 'Occupation', 'Method', 'Seed'][:width])}"
            )
