"""A table as it was read: columns, and rows of whatever was in them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from equipoise.tables.found import Problem


@dataclass(frozen=True)
class Table:
    path: str
    sha256: str
    columns: tuple[str, ...]
    """Each name once; of a nested object the path to the value, such as `output.text`."""
    rows: list[list[Any]]
    """One value for each column; None where a row has none."""
    problems: tuple[Problem, ...] = ()
    numbers: tuple[int, ...] = ()
    """Which row of the file each is, from 1 without the header; rows that were left out are counted."""
    lines: tuple[int, ...] = ()
    """The line of the file on which each begins; empty where its lines are not its rows."""
    ragged: Mapping[int, Sequence[str]] = field(default_factory=dict)
    """By its place in `rows`, what a row held whose fields are not as many as the columns."""
    delimiter: str = ""
    source: str = ""
    """The text of a file without a structure of its own, whose lines may turn out to be sentences."""
    broken: str = ""
    """Why such a file is no table; its lines may still be sentences."""

    def where(self, place: int) -> str:
        """How a person finds the row at `place`: "line 7", or "row 5" where lines say nothing."""
        return f"line {self.lines[place]}" if self.lines else f"row {self.numbers[place]}"

    def column(self, name: str) -> list[Any]:
        """The values of a column."""
        place = self.columns.index(name)
        return [row[place] for row in self.rows]


@dataclass(frozen=True)
class Content:
    """What a file's format makes of it, before anything is known of the columns."""

    columns: Sequence[str]
    rows: list[list[Any]]
    problems: tuple[Problem, ...] = ()
    numbers: Sequence[int] | None = None
    """As in `Table`; None for 1, 2, …"""
    lines: Sequence[int] = ()
    ragged: Mapping[int, Sequence[str]] = field(default_factory=dict)
    delimiter: str = ""
    source: str = ""
    broken: str = ""

    def table(self, path: str, sha256: str, before: Sequence[Problem]) -> Table:
        numbers = self.numbers if self.numbers is not None else range(1, len(self.rows) + 1)
        return Table(
            path,
            sha256,
            unique(self.columns),
            self.rows,
            (*before, *self.problems),
            tuple(numbers),
            tuple(self.lines),
            self.ragged,
            self.delimiter,
            self.source,
            self.broken,
        )


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """The names with a number behind those that were there before: Text, Text.2."""
    names = list(names)
    taken: dict[str, None] = {}
    for name in names:
        new, number = name, 1
        while new in taken or (number > 1 and new in names):
            number += 1
            new = f"{name}.{number}"
        taken[new] = None
    return tuple(taken)


def some(places: Sequence[int], where: str = "line") -> str:
    """A few of the lines: "line 7", "lines 7, 9, 12, …"."""
    shown = ", ".join(f"{place:,}" for place in places[:5])
    return f"{where}{'' if len(places) == 1 else 's'} {shown}" + (", …" if len(places) > 5 else "")


def rows_are(count: int) -> str:
    return f"{count:,} row{' is' if count == 1 else 's are'}"
