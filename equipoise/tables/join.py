"""Columns of one name, of which each row has only one, made one column."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from equipoise.tables import names
from equipoise.tables.choose import Columns, likeness, plain
from equipoise.tables.found import Problem
from equipoise.tables.frame import Frame
from equipoise.tables.table import Table

_JOINED = {*names.TEXT_NAMES, *names.OCCUPATION_NAMES, *names.MODEL_NAMES, names.METHOD, names.LABEL}


def joined(table: Table, frame: Frame, columns: Columns) -> tuple[Table, list[Problem]]:
    """The table with one column for those whose names differ in spelling or path only (`Text`, `text`, `output.text`)
    and that are never filled on the same row; what an option names stays as it is. Of texts only those are joined that
    begin with the frame where the others do: an error's text is no answer."""
    problems: list[Problem] = []
    for last in dict.fromkeys(map(names.last, table.columns)):
        alike = [name for name in table.columns if names.last(name) == last and any(map(_filled, table.column(name)))]
        if last not in _JOINED or len(alike) < 2 or table.ragged or {*alike} & {*columns.given}:
            continue
        counts = {name: sum(map(_filled, table.column(name))) for name in alike}
        overlap = any(sum(map(_filled, row)) > 1 for row in zip(*map(table.column, alike), strict=True))
        # `PPO.Text` and `Base.Text` are not one column.
        overlap |= len({names.key(name) for name in alike if "." in name}) > 1
        begun = {likeness(table, name, frame) >= 0.5 for name in alike} if last in names.TEXT_NAMES else {True}
        if overlap or len(begun) > 1:
            continue
        table = _one(table, alike)
        shown = " and ".join(f"{count:,} rows in {name!r}" for name, count in counts.items())
        message = f"{shown} are read as one column; none of them is filled where another is"
        problems.append(Problem("joined columns", sum(counts.values()) - counts[alike[0]], (), message))
    return table, problems


def _one(table: Table, alike: Sequence[str]) -> Table:
    """The table with the first of the columns, filled from the others."""
    places = [table.columns.index(name) for name in alike]
    kept = [i for i in range(len(table.columns)) if i not in places[1:]]
    rows = []
    for row in table.rows:
        row = list(row)
        row[places[0]] = next((row[i] for i in places if _filled(row[i])), row[places[0]])
        rows.append([row[i] for i in kept])
    return replace(table, columns=tuple(table.columns[i] for i in kept), rows=rows)


def _filled(value: Any) -> bool:
    return bool(plain(value))
