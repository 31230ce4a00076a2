"""Tables of any common layout: separated values, JSON, JSON lines, one sentence a line; packed or not.

What a file holds decides, not its name. No text is changed: lone surrogates, NUL and line breaks within a field come
through. What is left out is counted in the table's problems.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from equipoise.errors import UserError
from equipoise.tables.documents import documents
from equipoise.tables.found import Problem
from equipoise.tables.separated import LONGEST_FIELD, separated
from equipoise.tables.table import Content, Table
from equipoise.tables.unpack import unpack

__all__ = ["LONGEST_FIELD", "Table", "read_table"]

_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


_ROOT = re.compile(r"\s*<(?:\?xml|!doctype|html|(?!s>)([a-z][\w:.-]*)[^<>]*>)", re.IGNORECASE)
"""The beginning of XML or HTML, and the name of its first element; `<s>` is a mark of texts."""


def read_table(path: str, encoding: str | None = None, names: Sequence[str] = (), options: bool = True) -> Table:
    """The table in the file; one of a header alone has no rows. `names`: of columns, as options give them; `options`:
    whether one may say the encoding.

    Raises UserError, in one line, for a file that cannot be read, or read in one way only.
    """
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give a CSV, TSV, JSON or JSONL file") from None
    problems: list[Problem] = []
    unpacked = unpack(path, data, problems)
    content = (
        unpacked
        if isinstance(unpacked, Content)
        else _content(path, _decode(path, unpacked, encoding, problems, options), names)
    )
    return content.table(path, hashlib.sha256(data).hexdigest(), problems)


def _content(path: str, text: str, names: Sequence[str]) -> Content:
    text = text.lstrip("\ufeff")
    begin = text.lstrip()[:1]
    if not begin:
        raise UserError(f"{path} is empty: give a file with a row for each text")
    if (root := _ROOT.match(text)) and (not root[1] or text.rstrip().endswith((f"</{root[1]}>", "/>"))):
        raise UserError(f"{path} is XML or HTML, which is not read here: write its table as CSV or JSON lines")
    return documents(path, text, names) if begin in "[{" else separated(path, text)


def _decode(path: str, data: bytes, encoding: str | None, problems: list[Problem], options: bool) -> str:
    if encoding is None:
        encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None) or _wide(
            data, problems, options
        )
    try:
        # surrogatepass: files of this program keep lone surrogates so.
        return data.decode(encoding, "surrogatepass" if encoding.lower().startswith("utf") else "strict")
    except LookupError:
        raise UserError(f"there is no encoding {encoding!r}: give for instance --encoding cp1252") from None
    except UnicodeError as error:
        where = ""
        if isinstance(error, UnicodeDecodeError):
            line = data.count(b"\n", 0, error.start) + 1
            where = f" at byte {error.start}, on line {line:,}"
        name = encoding.removesuffix("-sig").upper()
        other = ", or say what it is, for instance --encoding cp1252" if options else ""
        raise UserError(f"{path} is not {name}{where}: save it as UTF-8{other}") from None


def _wide(data: bytes, problems: list[Problem], options: bool) -> str:
    """UTF-8, unless every other byte at the beginning is 0, as where Latin letters are in UTF-16 without its mark."""
    head = data[:4096]
    for start, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(head) >= 16 and head[start::2].count(0) > 0.4 * len(head) and not head[1 - start :: 2].count(0):
            otherwise = "--encoding decides otherwise" if options else "saved as UTF-8 it leaves no doubt"
            message = f"it is read as {name.upper()}, as its bytes look; {otherwise}"
            problems.append(Problem("encoding", 0, (), message))
            return name
    return "utf-8-sig"


def plain_lines(text: str) -> list[tuple[int, str]]:
    """The lines of a text with their numbers, from 1; blank ones too."""
    return list(enumerate(re.split(r"\r\n|\n|\r", text), 1))
