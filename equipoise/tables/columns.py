"""Columns in JSON: lists side by side, pandas' orients, and the same within another object."""

from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.errors import UserError
from equipoise.tables.names import METHOD, MODEL_NAMES, OCCUPATION_NAMES, is_text, last
from equipoise.tables.table import Content, some

Record = dict[str, Any]


class Repeated(ValueError):
    """An object that has a name twice, or several lists that nothing puts together."""


class Unequal(Repeated):
    """Columns of one object that have not the same rows."""


def split(path: str, document: Mapping[str, Any]) -> Content:
    columns = [str(name) for name in document["columns"]]
    wrong = [i for i, row in enumerate(document["data"], 1) if not isinstance(row, list) or len(row) != len(columns)]
    if wrong:
        raise UserError(f"{path}: {some(wrong, 'row')} under 'data' have not the length of 'columns': export it again")
    return Content(columns, document["data"])


def side_by_side(path: str, document: Mapping[str, list[Any]]) -> Content:
    lengths = {len(column) for column in document.values()}
    if len(lengths) > 1:
        shown = ", ".join(map(str, sorted(lengths)[:5]))
        raise UserError(f"{path}: its columns have different lengths ({shown}): export it again")
    return Content(list(document), [list(row) for row in zip(*document.values(), strict=True)])


def are_columns(document: Mapping[str, Any]) -> bool:
    """Whether an object of objects is pandas' columns, most of whose index is the same, and no record of nested
    values."""
    columns = list(document.values())
    if not all(isinstance(column, Mapping) and column for column in columns):
        return False
    shared = set(columns[0]).intersection(*columns[1:])
    counted = all(str(place).isdigit() for column in columns for place in column)
    return (counted or 2 * len(shared) >= max(map(len, columns))) and not any(is_text(str(place)) for place in shared)


def pandas_columns(path: str, document: Mapping[str, Mapping[str, Any]]) -> Content:
    """Objects of index and value: the index says which values belong together."""
    index = list(dict.fromkeys(place for column in document.values() for place in column))
    for name, column in document.items():
        missing = [place for place in index if place not in column]
        if missing:
            raise UserError(
                f"{path}: its columns have different indexes ({name!r} lacks {', '.join(map(repr, missing[:3]))}"
                f"{', …' if len(missing) > 3 else ''}): export it again, or write null there"
            )
    return Content(list(document), [[column[place] for column in document.values()] for place in index])


def below(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def columns_within(value: Mapping[str, Any], path: str, names: Sequence[str]) -> list[Record]:
    """The rows of an object that holds columns, one of them of texts: as lists of one length, or as pandas writes them.
    Empty where it does not. Raises Unequal where a text and what is said of it cannot be put together."""
    named = [below(path, name) for name in value]
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        titles = [str(name) for name in value["columns"]]
        fits = all(isinstance(row, list) and len(row) == len(titles) for row in value["data"])
        if fits and any(is_text(title, names) for title in titles):
            return [{below(path, t): cell for t, cell in zip(titles, row, strict=True)} for row in value["data"]]
        return []
    if not any(is_text(name, names) for name in named):
        return []
    inner = list(value.values())
    indexed = _indexed(dict(zip(named, inner, strict=True)), names)
    if any(is_text(name, names) for name in indexed):
        index = list(next(iter(indexed.values())))
        if apart := [n for n, c in indexed.items() if set(c) != set(index)]:
            raise Unequal(f"its columns have different indexes ({apart[0]!r} has another); export it again")
        return [{name: column[i] for name, column in indexed.items()} for i in index]
    lists = {
        name: column
        for name, column in zip(named, inner, strict=True)
        if isinstance(column, list) and not any(isinstance(item, (Mapping, list)) for item in column)
    }
    texts = [n for n, column in lists.items() if is_text(n, names) and any(isinstance(i, str) for i in column)]
    if not texts:
        return []
    size = len(lists[texts[0]])
    for name, column in lists.items():
        if len(column) != size and (name in texts or last(name) in _SAID):
            remedy = "keep one of them in a file" if name in texts else "export it again"
            raise Unequal(
                f"an object holds {size:,} under {texts[0]!r} and {len(column):,} under {name!r}, and nothing says "
                f"which belong together; {remedy}"
            )
    same = [name for name, column in lists.items() if len(column) == size]
    if len(same) < 2:
        return []
    return [{name: lists[name][i] for name in same} for i in range(size)]


def _indexed(columns: Mapping[str, Any], names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The columns by index: whose places are numbers, else those that have the places of the text in a column that is
    known besides."""
    filled = {name: column for name, column in columns.items() if isinstance(column, Mapping) and column}
    counted = {name: column for name, column in filled.items() if all(str(place).isdigit() for place in column)}
    text = next((column for name, column in filled.items() if is_text(name, names)), None)
    if counted or text is None:
        return counted
    alike = {name: column for name, column in filled.items() if set(column) == set(text)}
    return alike if any(last(name) in _SAID for name in alike) else {}


_SAID = (*OCCUPATION_NAMES, *MODEL_NAMES, METHOD)
"""Columns of what is said of a text."""
