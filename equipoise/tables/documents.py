"""Tables in JSON: lists of objects, columns, pandas' orients, chats, batches of an API, objects by occupation.

Whatever is nested comes out flat, under paths such as `response.body.choices.message.content`; where an object holds
several texts it becomes as many rows.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from equipoise.documents import parse_json
from equipoise.errors import UserError
from equipoise.tables.columns import (
    Record,
    Repeated,
    Unequal,
    are_columns,
    below,
    columns_within,
    pandas_columns,
    side_by_side,
    split,
)
from equipoise.tables.found import Problem
from equipoise.tables.names import KEY, is_text, key, last
from equipoise.tables.table import Content, some, unique

_HOLDERS = ("data", "rows", "samples", "completions", "results", "records")
"""Names under which a JSON object may hold the list of its rows."""
_ASSISTANT = ("assistant", "gpt", "model", "ai", "bot", "chatbot")
_DEEPEST = 60
"""Levels of objects within objects that are followed."""


def documents(path: str, text: str, names: Sequence[str]) -> Content:
    """The table in the JSON or JSON lines. `names`: of columns, as options give them. Raises UserError."""
    try:
        document = _load(text)
    except Repeated as error:
        raise UserError(f"{path}: {error}: rename one of them") from None
    except ValueError as error:
        values, lines = _json_lines(path, text, error)
        content = tabulated(path, values, names, lines)
    else:
        try:
            content = _whole(path, document, names)
        except Repeated as error:
            raise UserError(f"{path}: {error}") from None
    return content


def _load(text: str) -> Any:
    try:
        return parse_json(text, pairs=_object)
    except ValueError as error:
        if str(error).startswith("nested"):
            raise ValueError(f"its values lie too deep within one another: {error}") from None
        raise


def _object(pairs: list[tuple[str, Any]]) -> Record:
    out = dict(pairs)
    if len(out) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise Repeated(f"an object has {name!r} twice")
    return out


def _json_lines(path: str, text: str, whole: ValueError) -> tuple[list[Any], list[int]]:
    values, lines = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values.append(_load(line))
        except ValueError as error:
            reason = whole if not values else f"line {number}: {error}"
            raise UserError(f"{path} is neither JSON nor JSON lines ({reason}): mend or export it again") from None
        lines.append(number)
    return values, lines


def _whole(path: str, document: Any, names: Sequence[str]) -> Content:
    """One document, which may hold its rows in many ways."""
    if not isinstance(document, Mapping):
        return tabulated(path, document, names)
    if isinstance(document.get("columns"), list) and isinstance(document.get("data"), list):  # pandas' "split"
        return split(path, document)
    for name in _HOLDERS:
        held = document.get(name)
        if isinstance(held, list) and all(isinstance(row, Mapping) for row in held):
            return _held(path, document, name, names)
    if any(is_text(name, names) for name in document):
        if all(isinstance(column, list) for column in document.values()):
            return side_by_side(path, document)
        if are_columns(document):
            return pandas_columns(path, document)
        return tabulated(path, [document], names)
    lists = [name for name, value in document.items() if _is_list(value)]
    said = [value for name, value in document.items() if name not in lists and value not in ([], {})]
    if len(lists) == 1 and said:  # beside its rows it says other things
        return tabulated(path, [document], names)
    if records := _by_key(document, (), names):
        return _with_names_of_nothing(document, tabulated(path, records, names))
    return tabulated(path, [document], names)


def _with_names_of_nothing(document: Mapping[str, Any], content: Content) -> Content:
    """The rows by name, with a word on the names that have none."""
    nothing = [str(name) for name, value in document.items() if value in ([], {})]
    if not nothing:
        return content
    message = f"no rows stand under {', '.join(map(repr, nothing[:5]))}{', …' if len(nothing) > 5 else ''}"
    problem = Problem("names without rows", len(nothing), (), message)
    return replace(content, problems=(*content.problems, problem))


def _held(path: str, document: Mapping[str, Any], name: str, names: Sequence[str]) -> Content:
    """The rows under a name. Raises UserError where another name has texts too."""
    others = {other: value for other, value in document.items() if other != name}
    texts = {other: count for other, value in others.items() if (count := _texts_in(value, other, names))}
    if texts:
        shown = ", ".join(f"{count:,} under {other!r}" for other, count in texts.items())
        raise UserError(
            f"{path} holds {len(document[name]):,} rows under {name!r} and {shown}, and nothing says which are meant: "
            "make a file of each list that is meant"
        )
    content = tabulated(path, document[name], names)
    left = {other: len(value) for other, value in others.items() if _is_list(value)}
    shown = ", ".join(f"{count:,} under {other!r}" for other, count in left.items())
    count = sum(left.values())
    are = "object without a text is no row" if count == 1 else "objects without a text are no rows"
    message = f"{count:,} {are} ({shown}); the rows are those under {name!r}"
    problems = (Problem("objects beside the rows", count, (), message),) if left else ()
    return replace(content, problems=(*content.problems, *problems))


def _texts_in(value: Any, path: str, names: Sequence[str]) -> int:
    """How many texts stand in lists within a value."""
    if isinstance(value, Mapping):
        return sum(_texts_in(inner, f"{path}.{name}", names) for name, inner in value.items())
    if not isinstance(value, list):
        return 0
    if all(isinstance(item, str) for item in value):
        return len(value) if is_text(path, names) else 0
    rows = [row for item in value if isinstance(item, Mapping) for row in flatten(item, names)]
    return sum(any(isinstance(text, str) and is_text(name, names) for name, text in row.items()) for row in rows)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _by_key(document: Mapping[str, Any], keys: tuple[str, ...], names: Sequence[str]) -> list[Record]:
    """The records of an object whose names say what its texts are of, perhaps on several levels; none where it holds
    anything else."""
    records: list[Record] = []
    if len({isinstance(value, str) for value in document.values()}) > 1:
        return []  # what stands beside lists of texts is said of them all
    for name, value in document.items():
        own = (*keys, str(name))
        told = dict(zip(unique([KEY] * len(own)), own, strict=True))
        if isinstance(value, str):
            records.append(told | {"text": value})
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            records += [told | {"text": item} for item in value]
        elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
            records += [told | dict(item) for item in value]
        elif isinstance(value, Mapping) and len(keys) < 3:
            try:
                flat = any(is_text(path, names) for row in flatten(value, names) for path in row)
            except Unequal:
                raise
            except Repeated:  # several lists, each under a name of its own
                flat = False
            inner = [told | dict(value)] if flat else _by_key(value, own, names)
            if not inner and value:
                return []
            records += inner
        else:
            return []
    return records


def tabulated(path: str, document: Any, names: Sequence[str], lines: Sequence[int] = ()) -> Content:
    """The table of a list of records. `lines`: on which each stands."""
    where, places = ("line", lines) if lines else ("row", range(1, len(document) + 1))
    if all(isinstance(row, str) for row in document):
        return Content(["text"], [[row] for row in document], lines=lines)
    if _is_chat(document) and {_role(turn) for turn in document} & {"user", "system", "human"}:
        raise UserError(f"{path} is one chat, not a table: write an object with text and occupation for each sentence")
    if document and all(map(_is_chat, document)):
        document = [{"messages": row} for row in document]
    if all(isinstance(row, list) for row in document):
        return _lists(path, document, lines)
    wrong = [place for place, row in zip(places, document, strict=True) if not isinstance(row, Mapping)]
    if wrong:
        raise UserError(
            f"{path} is JSON but no list of objects ({some(wrong, where)}): write one object with text and occupation "
            "a row"
        )
    rows: list[Record] = []
    begins: list[int] = []
    several: list[int] = []
    turns: list[int] = []
    for place, record in zip(places, document, strict=True):
        try:
            found = flatten(record, names)
        except Repeated as error:
            raise UserError(f"{path}, {where} {place}: {error}") from None
        rows += found
        begins += [place] * len(found)
        several += [place] if len(found) > 1 else []
        turns += [place] if _answers(record) > 1 else []
    columns = list(dict.fromkeys(name for row in rows for name in row))
    problems = []
    if several:
        hold = "object holds" if len(several) == 1 else "objects hold"
        message = f"{len(several):,} {hold} several texts ({some(several, where)}); each text is a row"
        problems.append(Problem("several texts", len(several), tuple(several[:5]), message))
    if turns:
        message = (
            f"{len(turns):,} chats have several answers ({some(turns, where)}); the last one that is not empty is read"
        )
        problems.append(Problem("several answers", len(turns), tuple(turns[:5]), message))
    content = Content(columns, [[row.get(name) for name in columns] for row in rows], tuple(problems))
    return replace(content, lines=begins if lines else ())


def _lists(path: str, document: Sequence[Sequence[Any]], lines: Sequence[int]) -> Content:
    """Rows without names, of which the first may hold them."""
    if not document:
        return Content([], [])
    width = max(map(len, document))
    first = document[0]
    header = [str(name) for name in first] if any(isinstance(n, str) and is_text(n) for n in first) else []
    wrong = [i for i, row in enumerate(document, 1) if len(row) != width]
    if wrong or not width:
        raise UserError(f"{path}: its lists have different lengths ({some(wrong, 'row')}): export it again")
    if not any(isinstance(value, str) for row in document for value in row):
        raise UserError(f"{path} is JSON but no list of objects: write one object with text and occupation a row")
    body = document[1:] if header else document
    return Content(
        header or [str(i) for i in range(width)],
        [list(row) for row in body],
        lines=lines[len(document) - len(body) :] if lines else (),
    )


def flatten(record: Mapping[str, Any], names: Sequence[str] = ()) -> list[Record]:
    """The record by paths; several where it holds a list of texts, or of objects with texts. Raises Repeated."""
    single: Record = {}
    many: list[tuple[str, list[Record]]] = []
    _walk(record, "", names, single, many, 0)
    if not many:
        return [single]
    size = max(len(rows) for _, rows in many)
    # Lists of texts may be columns; two lists of objects never are.
    long = [path for path, rows in many if len(rows) > 1]
    objects = [path for path, rows in many if len(rows) > 1 and any({*row} != {path} for row in rows)]
    if {len(rows) for _, rows in many} - {1, size} or (objects and len(long) > 1):
        shown = " and ".join(f"{len(rows)} under {path!r}" for path, rows in many)
        raise Repeated(f"an object holds {shown}, and nothing says which belong together; keep one of them in a file")
    out = []
    for i in range(size):
        row = dict(single)
        for _, rows in many:
            row |= rows[i] if len(rows) == size else rows[0]
        out.append(row)
    return out


def _walk(
    value: Any,
    path: str,
    names: Sequence[str],
    single: Record,
    many: list[tuple[str, list[Record]]],
    depth: int,
) -> None:
    if isinstance(value, Mapping) and value and depth < _DEEPEST:
        columns = columns_within(value, path, names)
        if columns:
            many.append((next(name for name in columns[0] if is_text(name, names)), columns))
            value = {name: inner for name, inner in value.items() if below(path, name) not in columns[0]}
        for name, inner in value.items():
            _walk(inner, below(path, name), names, single, many, depth + 1)
        return
    if _is_chat(value):
        for turn in value:
            place, said = f"{path}.{_role(turn)}" if path else _role(turn), _said(turn)
            if said not in (None, "") or place not in single:  # a turn that says nothing takes no answer away
                _put(single, place, said, again=True)
        return
    if _is_parts(value, path):
        _put(single, path.removesuffix(".parts"), _joined(value))
        return
    if isinstance(value, list) and value and depth < _DEEPEST:
        texts = any(isinstance(item, str) for item in value) and all(isinstance(i, str) or i is None for i in value)
        if texts and is_text(path, names):
            many.append((path, [{path: item} for item in value]))
            return
        if all(isinstance(item, (Mapping, list)) for item in value):
            inner_rows: list[Record] = []
            for item in value:
                own: Record = {}
                inner_many: list[tuple[str, list[Record]]] = []
                _walk(item, path, names, own, inner_many, depth + 1)
                inner_rows += [own | row for _, rows in inner_many for row in rows] or [own]
            # Beside an answer an API lists how it came about; where there is no answer the row stays, without text.
            inner_rows = [row for row in inner_rows if not _is_aside(row, path)] or inner_rows[:1]
            if any(is_text(name, names) for row in inner_rows for name in row) and all(inner_rows):
                many.append((path, inner_rows))
                return
    _put(single, path, value)


def _is_aside(row: Record, path: str) -> bool:
    kind = key(str(row.get(f"{path}.type", "")))
    return kind in ("reasoning", "thinking", "redactedthinking") or kind.endswith(("call", "calloutput", "tooluse"))


def _put(record: Record, path: str, value: Any, again: bool = False) -> None:
    if path in record and not again:
        raise Repeated(f"an object has {path!r} twice")
    record[path] = value


def _is_chat(value: Any) -> bool:
    """Whether a list is the turns of a chat: OpenAI's role and content, ShareGPT's from and value."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, Mapping) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys())
            for turn in value
        )
    )


def _is_parts(value: Any, path: str = "") -> bool:
    """Whether a list is the parts of one message."""
    if not isinstance(value, list) or not value or not all(isinstance(part, Mapping) for part in value):
        return False
    typed = all("type" in part for part in value) or last(path) == "parts"
    return typed and any(isinstance(part.get("text"), str) for part in value)


def _role(turn: Mapping[str, Any]) -> str:
    role = str(turn.get("role", turn.get("from")))
    return "assistant" if key(role) in _ASSISTANT else role


def _said(turn: Mapping[str, Any]) -> Any:
    said = turn.get("content", turn.get("value"))
    if _is_parts(said):
        return _joined(said)
    return said


def _joined(parts: Sequence[Mapping[str, Any]]) -> str:
    return "".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def _answers(record: Any) -> int:
    """The most turns of an assistant in one chat."""
    if _is_chat(record):
        return sum(_role(turn) == "assistant" for turn in record)
    if isinstance(record, Mapping):
        return max(map(_answers, record.values()), default=0)
    return 0
