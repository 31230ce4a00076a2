"""Files that hold another file or need a library: compressed ones, spreadsheets, Parquet."""

import bz2
import gzip
import importlib
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from equipoise.errors import UserError
from equipoise.tables.documents import tabulated
from equipoise.tables.found import Problem
from equipoise.tables.table import Content

MOST = 2 << 30
"""Bytes that a file may unpack to: a few hundred can hold gigabytes."""

_OPENERS: tuple[tuple[bytes, Callable[[BinaryIO], Any]], ...] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
)
_OTHERS = (
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with `zstd -d`"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "save it as CSV UTF-8 in a spreadsheet program"),
    (b"ARROW1", "an Arrow file", "write it as JSON lines: pandas.read_feather(…).to_json(…)"),
    (b"SQLite format 3", "a database", "write the table as CSV"),
    (b"\x89HDF", "an HDF5 file", "write the table as CSV"),
    (b"\x93NUMPY", "a NumPy array", "write a table of texts as CSV"),
    (b"%PDF", "a PDF", "give a table of texts, such as a CSV file"),
)


def unpack(path: str, data: bytes, problems: list[Problem]) -> bytes | Content:
    """What the file holds: bytes of text, or a table already. Raises UserError with the command that converts it."""
    for _ in range(3):  # a file in a file in a file, and no further
        opener = next((open_it for magic, open_it in _OPENERS if data.startswith(magic)), None)
        if opener is not None:
            data = _bounded(path, lambda open_it=opener, packed=data: open_it(io.BytesIO(packed)))  # type: ignore[misc]
        elif data.startswith(b"PK\x03\x04"):
            inside = _zipped(path, data, problems)
            if isinstance(inside, Content):
                return inside
            data = inside
        else:
            break
    if data.startswith(b"PAR1"):
        return _parquet(path, data)
    for magic, what, advice in _OTHERS:
        if data.startswith(magic):
            raise UserError(f"{path} is {what}, which is not read here: {advice}")
    return data


def _bounded(path: str, open_it: Callable[[], Any]) -> bytes:
    try:
        with open_it() as file:
            out: bytes = file.read(MOST + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as e:
        raise UserError(f"{path} cannot be unpacked ({e}): copy or make it again") from None
    if len(out) > MOST:
        raise UserError(f"{path} unpacks to more than {MOST >> 30} GiB: give a smaller file")
    return out


def _zipped(path: str, data: bytes, problems: list[Problem]) -> bytes | Content:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} cannot be unpacked ({error}): copy or make it again") from None
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    if any(name.startswith("xl/") for name in names):
        return _workbook(path, data, problems)
    if "content.xml" in names:
        raise UserError(f"{path} is an OpenDocument file, which is not read here: save the sheet as CSV in UTF-8")
    names = [name for name in names if not name.startswith("__MACOSX/")]
    if len(names) != 1:
        shown = ", ".join(map(repr, names[:4])) + (", …" if len(names) > 4 else "")
        raise UserError(f"{path} holds {len(names)} files ({shown}): unpack it, and name those to read")
    return _bounded(path, lambda: archive.open(names[0]))


def _workbook(path: str, data: bytes, problems: list[Problem]) -> Content:
    try:
        openpyxl: Any = importlib.import_module("openpyxl")
    except ImportError:
        raise UserError(
            f"{path} is an Excel workbook: save the sheet as 'CSV UTF-8', or `pip install openpyxl` to read it as it is"
        ) from None
    try:
        book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        sheets = {sheet.title: [list(row) for row in sheet.iter_rows(values_only=True)] for sheet in book.worksheets}
    except Exception as error:  # a damaged workbook fails in any way
        raise UserError(f"{path} cannot be read as a workbook ({error}): save the sheet as CSV UTF-8") from None
    filled = {title: rows for title, rows in sheets.items() if any(any(v is not None for v in row) for row in rows)}
    if not filled:
        raise UserError(f"{path} holds no rows: give a file with a row for each text")
    title, rows = next(iter(filled.items()))
    if len(filled) > 1:
        left = sum(map(len, filled.values())) - len(rows)
        message = f"of {len(filled)} sheets the first, {title!r}, is read; the others have {left:,} rows"
        problems.append(Problem("other sheets", left, (), message))
    numbered = list(enumerate(rows, 1))
    begin = next(i for i, (_, row) in enumerate(numbered) if any(v is not None for v in row))
    header = ["" if value is None else str(value) for value in numbered[begin][1]]
    while header and not header[-1]:
        header.pop()
    width = len(header)
    body = numbered[begin + 1 :]
    kept = [(line, row[:width]) for line, row in body if any(value not in (None, "") for value in row[:width])]
    blank = [line for line, row in body if not any(value not in (None, "") for value in row[:width])]
    if blank:
        message = f"{len(blank):,} blank rows are not counted as sentences"
        problems.append(Problem("blank rows", len(blank), tuple(blank[:5]), message))
    return Content(header, [row for _, row in kept], (), None, [line for line, _ in kept])


def _parquet(path: str, data: bytes) -> Content:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UserError(
            f"{path} is a Parquet file: `pip install pyarrow` to read it as it is, or write it as JSON lines where "
            f"pandas is, with pandas.read_parquet({path!r}).to_json('texts.jsonl', orient='records', lines=True)"
        ) from None
    try:
        records = parquet.read_table(io.BytesIO(data)).to_pylist()
    except Exception as error:  # a damaged file fails in any way
        raise UserError(f"{path} cannot be read as Parquet ({error}): write it again") from None
    return tabulated(path, records, ())
