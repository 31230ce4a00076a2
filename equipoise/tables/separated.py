"""Tables whose values stand between commas, tabs, semicolons or bars.

RFC 4180 first. What is not written so is read in the one other way in which all of it makes sense (marks escaped with a
backslash, spaces before marks, marks that quote nothing), with a count; where no way makes sense it is refused.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from equipoise.errors import UserError
from equipoise.tables.found import Problem
from equipoise.tables.names import TEXT_NAMES, key, known, named
from equipoise.tables.table import Content, rows_are, some

LONGEST_FIELD = 1 << 28
"""Characters of one CSV field: a degenerate model's text may be long."""

DELIMITERS = ",\t;|"
_SEP = re.compile(r'\A\s*"?sep=([,;|\t:])"?[ \t]*(?:\r\n|\n|\r)', re.IGNORECASE)
"""The first line that tells spreadsheets the delimiter."""
_RULE = re.compile(r"\s*(:?-{2,}:?)?\s*")
"""A field of the line that parts a Markdown table's header from its rows."""
_GRID = re.compile(r"\s*\+[-=+:\s]+")
"""Such a line of a table with a frame around its cells."""
_ESCAPED = re.compile(r'\\(["\\])')


class _BrokenError(Exception):
    """No table in this way of reading."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line, self.why = line, why


@dataclass(frozen=True)
class _Parsed:
    """The records of a file, blank ones included."""

    header: list[str]
    records: list[list[str]]
    lines: list[int]
    """On which each begins."""
    spans: list[int]
    """How many lines each takes."""
    problems: tuple[Problem, ...] = ()

    @property
    def ragged(self) -> bool:
        width = len(self.header)
        return any(len(record) != width for record in self.records if any(record))


def separated(path: str, text: str) -> Content:
    """The table in the text. Raises UserError, with the line, where there is no one way to read it."""
    csv.field_size_limit(LONGEST_FIELD)
    stated = _SEP.match(text)
    body = text[stated.end() :] if stated else text
    if not body.strip():
        raise UserError(f"{path} holds no rows: give a file with a row for each text")
    delimiter = stated[1] if stated else _delimiter(body)
    try:
        parsed = _parse(path, body, delimiter, 1 if stated else 0)
    except UserError as error:
        first = body.lstrip().partition("\n")[0].strip()
        if stated or known(first.split(delimiter)):
            raise
        return Content([first], [], source=text, broken=str(error))
    return _cleaned(path, parsed, delimiter, text)


def _delimiter(text: str) -> str:
    """The one that makes known names of the header; of several the one that makes the most columns."""

    def rank(delimiter: str) -> tuple[int, int]:
        header = next(filter(any, csv.reader(_lines(text), delimiter=delimiter)), [])
        return known(header) if len(header) > 1 else 0, len(header)

    return max(DELIMITERS, key=rank)


def _lines(text: str) -> io.StringIO:
    return io.StringIO(text, newline="")


def _parse(path: str, text: str, delimiter: str, before: int) -> _Parsed:
    """`before`: lines of the file before the text."""
    ways: list[Callable[[], _Parsed]] = [
        lambda: _standard(text, delimiter),
        lambda: _standard(text, delimiter, spaced=True),
        lambda: _backslashed(text, delimiter),
        lambda: _literal(text, delimiter),
    ]
    first: _BrokenError | None = None
    ragged: _Parsed | None = None
    for way in ways:
        try:
            parsed = way()
        except _BrokenError as error:
            first = first or error
            continue
        if not parsed.ragged:
            return replace(parsed, lines=[line + before for line in parsed.lines])
        ragged = ragged or (parsed if first is None else None)
    if ragged is not None:
        return replace(ragged, lines=[line + before for line in ragged.lines])
    assert first is not None, "either a way failed, or it gave a table"
    raise UserError(
        f"{path}: the row that begins on line {first.line + before:,} cannot be read ({first.why}): close the "
        'quotation mark there, or write marks inside a field twice (""), or each text on one line'
    )


def _standard(text: str, delimiter: str, spaced: bool = False) -> _Parsed:
    """RFC 4180; `spaced`: a space may stand between a delimiter and a quotation mark."""
    reader = csv.reader(_lines(text), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    header: list[str] = []
    records: list[list[str]] = []
    lines: list[int] = []
    spans: list[int] = []
    begin = 1
    try:
        for record in reader:
            if header:
                records.append(record)
                lines.append(begin)
                spans.append(reader.line_num - begin + 1)
            elif any(record):
                header = record
            begin = reader.line_num + 1
    except csv.Error as error:
        why = "its quotation mark is never closed" if "unexpected end" in str(error) else str(error)
        raise _BrokenError(begin, why) from None
    parsed = _Parsed(header, records, lines, spans)
    _check_merged(parsed, text, delimiter)
    return parsed


def _check_merged(parsed: _Parsed, text: str, delimiter: str) -> None:
    """Raise where a field with line breaks holds what are rows of their own: its mark was closed by a later one."""
    long = [i for i, span in enumerate(parsed.spans) if span > 1]
    if not long:
        return
    width = len(parsed.header)
    seen: list[set[str]] = [set() for _ in range(width)]
    for i, record in enumerate(parsed.records):
        if parsed.spans[i] == 1 and len(record) == width:
            for values, value in zip(seen, record, strict=True):
                values.add(value)
    lines = list(_lines(text))
    beginnings = _beginnings(parsed)

    def alike(column: int, value: str) -> bool:
        return bool(value) and (value in seen[column] or (value.isdigit() and any(v.isdigit() for v in seen[column])))

    for i in long:
        record, begin = parsed.records[i], parsed.lines[i]
        last = begin + parsed.spans[i] - 1
        broken = next((c for c, field in enumerate(record[:width]) if re.search(r"[\r\n]", field)), 0)
        others = [c for c in range(width) if c != broken]
        split = {line: lines[line - 1].rstrip("\r\n").split(delimiter) for line in range(begin, last + 1)}
        for inner in range(begin + 1, last + 1):
            fields = split[inner]
            head = broken > 0 and len(fields) > broken and all(alike(c, fields[c]) for c in range(broken))
            row = inner < last and len(fields) == width > 1
            if head or (row and all(alike(c, fields[c]) for c in others)):
                raise _merged(begin, inner)
        own = {line: fields for line, fields in split.items() if _is_like(fields, parsed, broken)}
        _check_inner(begin, split, own, broken, width, beginnings[broken])


def _is_like(fields: Sequence[str], parsed: _Parsed, column: int) -> bool:
    """Whether fields go together as those of the other rows do: a text of some words in `column`, a word or number in
    each other, and where the texts of most rows name what stands in another column, this one too."""

    def named(record: Sequence[str]) -> bool:
        others = [v.casefold() for c, v in enumerate(record) if c != column and any(map(str.isalpha, v))]
        return any(value in record[column].casefold() for value in others)

    if len(fields) <= column or len(fields[column].split()) < 3:
        return False
    if not all(any(map(str.isalnum, v)) for c, v in enumerate(fields) if c != column):
        return False
    whole = [
        record
        for record, span in zip(parsed.records, parsed.spans, strict=True)
        if span == 1 and len(record) == len(parsed.header)
    ]
    return 2 * sum(map(named, whole)) < len(whole) or not whole or named(fields)


def _check_inner(
    begin: int,
    split: dict[int, list[str]],
    like: Mapping[int, Sequence[str]],
    broken: int,
    width: int,
    beginnings: set[str],
) -> None:
    """Raise where lines within a quotation look like rows by themselves. `split`: the fields of its lines; `like`:
    those that go together as a row's do."""
    last = max(split)
    # The line on which a quotation before the last column ends has the other columns behind it, and so has the line on
    # which it begins where it should have ended there; in the last column it is the other way about.
    own = [
        line for line in split if (line < last if broken < width - 1 else line > begin) or (width == 1 and line > begin)
    ]
    looks = [line for line in own if is_row(split[line], width) and not any('"' in f for f in split[line][:broken])]
    begun = [line for line in looks if line in like and _first_word(split[line][broken]) in beginnings]
    if begun:
        raise _merged(begin, max(begun[0], begin + 1))
    if not beginnings and width > 1 and len(looks) == len(own) > 1:
        raise _merged(begin, max(looks[0], begin + 1))


def _merged(begin: int, inner: int) -> _BrokenError:
    return _BrokenError(begin, f"its quotation mark runs on over line {inner:,}, which looks like a row")


def is_row(fields: Sequence[str], width: int) -> bool:
    """Whether a line's fields look like those of a row: as many as there are columns, and no space after a delimiter,
    as prose has it after a comma."""
    return len(fields) == width and all(fields) and not any(field[0].isspace() for field in fields[1:])


def _beginnings(parsed: _Parsed) -> list[set[str]]:
    """For each column the words with which half of its values or more begin, such as a frame's first; numbers are
    none."""
    found: list[set[str]] = []
    for column in range(len(parsed.header)):
        words = Counter(_first_word(record[column]) for record in parsed.records if len(record) > column)
        found.append({word for word, count in words.items() if word and 2 * count >= words.total()})
    return found


def _first_word(text: str) -> str:
    return text.split(maxsplit=1)[0].strip('"') if text.strip() else ""


def _backslashed(text: str, delimiter: str) -> _Parsed:
    r"""Marks inside a field are written `\"`, and backslashes `\\`."""
    if '\\"' not in text:
        raise _BrokenError(1, "no escaped mark")
    parsed = _standard(_ESCAPED.sub(lambda found: '""' if found[1] == '"' else "\\", text), delimiter)
    if parsed.ragged:
        raise _BrokenError(1, "fields do not match the columns")
    lines = list(_lines(text))
    rows = [
        line
        for line, span in zip(parsed.lines, parsed.spans, strict=True)
        if any('\\"' in each for each in lines[line - 1 : line - 1 + span])
    ]
    message = f'{len(rows):,} rows write quotation marks as \\" ({some(rows)}); they are read as quotation marks'
    return replace(parsed, problems=(Problem("backslash quotes", len(rows), tuple(rows[:5]), message),))


def _literal(text: str, delimiter: str) -> _Parsed:
    """Every line a row, quotation marks as plain text, where that gives every line its fields and leaves no doubt."""
    records: list[list[str]] = []
    lines: list[int] = []
    for number, line in enumerate(_lines(text), 1):
        fields = line.rstrip("\r\n").split(delimiter)
        if any(field.strip() for field in fields) or records:
            records.append(fields)
            lines.append(number)
    width = len(records[0])
    odd = []
    for number, fields in zip(lines, records, strict=True):
        if width == 1 or (any(fields) and len(fields) != width):
            raise _BrokenError(number, "its line has other fields than the header")
        for field in fields:
            if field.startswith('"'):
                if not (field.endswith('"') and len(field) > 1):
                    odd.append(number)
                    if number == lines[0]:
                        raise _BrokenError(number, "a quotation mark in the header is never closed")
                elif '"' in field[1:-1]:
                    raise _BrokenError(number, "quotation marks inside others")
    paired = [[f[1:-1] if len(f) > 1 and f[0] == f[-1] == '"' else f for f in fields] for fields in records]
    message = (
        f"{len(odd):,} row{' begins' if len(odd) == 1 else 's begin'} a quotation that does not end ({some(odd)}): "
        "each line is read as one row, and such a mark as text"
    )
    problems = (Problem("open quotation marks", len(odd), tuple(odd[:5]), message),)
    return _Parsed(paired[0], paired[1:], lines[1:], [1] * (len(lines) - 1), problems)


def _cleaned(path: str, parsed: _Parsed, delimiter: str, source: str) -> Content:
    """Without what is no row, which is counted."""
    header, width = parsed.header, len(parsed.header)
    while parsed.records and parsed.records[-1] == []:
        for values in (parsed.records, parsed.lines, parsed.spans):
            values.pop()  # blank lines at the end of a file say nothing
    kept: list[int] = []
    blank, repeated, rules = [], [], []
    for i, record in enumerate(parsed.records):
        if not any(field.strip() for field in record):
            blank.append(parsed.lines[i])
        elif (all(map(_RULE.fullmatch, record)) and sum("-" in field for field in record) > 1) or (
            delimiter == "|" and _GRID.fullmatch("".join(record))
        ):
            rules.append(parsed.lines[i])
        elif [key(field) for field in record] == [key(name) for name in header]:
            repeated.append(parsed.lines[i])
        elif _is_other_header(record, header):
            raise UserError(
                f"{path}: line {parsed.lines[i]:,} is a header of other columns than the first, or in another order: "
                "make a file of it and what follows it"
            )
        else:
            kept.append(i)
    numbers = _numbers(parsed)
    problems = [replace(each, lines=tuple(numbers[line] for line in each.lines)) for each in parsed.problems]
    broken = [parsed.lines[i] for i in kept if parsed.spans[i] > 1]
    have = "row has" if len(broken) == 1 else "rows have"
    for kind, lines, message in (
        ("blank rows", blank, f"{rows_are(len(blank))} blank; not counted as sentences"),
        ("repeated header", repeated, f"{rows_are(len(repeated))} the header once more; not counted as sentences"),
        ("ruled lines", rules, f"{rows_are(len(rules))} a ruled line of a table; not counted as sentences"),
        ("line breaks", broken, f"{len(broken):,} {have} line breaks within quotation marks; each is one sentence"),
    ):
        if lines:
            first = tuple(numbers[line] for line in lines[:5])
            problems.append(Problem(kind, len(lines), first, f"{message} ({some(lines)})"))
    rows, ragged = [], {}
    for place, i in enumerate(kept):
        record = parsed.records[i]
        if len(record) < width or any(record[width:]):
            ragged[place] = record
        rows.append([*record[:width], *[None] * (width - len(record))])
    lines = [parsed.lines[i] for i in kept]
    order = [numbers[line] for line in lines]
    return Content(header, rows, tuple(problems), order, lines, ragged, delimiter, source)


def _is_other_header(record: Sequence[str], header: Sequence[str]) -> bool:
    names = [key(field) for field in record]
    others = len(names) > 1 and known(record) == len(names) and bool(named(record, TEXT_NAMES))
    return bool(known(header)) and (others or sorted(names) == sorted(map(key, header)))


def _numbers(parsed: _Parsed) -> dict[int, int]:
    """Which row of the file begins on a line, from 1; a line without anything is none, and has the number of the next
    row."""
    out, number = {}, 1
    for line, record in zip(parsed.lines, parsed.records, strict=True):
        out[line] = number
        number += bool(record)
    return out
