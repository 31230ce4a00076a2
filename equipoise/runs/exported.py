"""Which files of a folder an export wrote, by name and content: those, and no others, a later one may replace."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from equipoise.errors import UserError
from equipoise.runs.files import write_whole
from equipoise.runs.ownership import Found, look

RECORD = "export.json"


def read_record(folder: Path) -> Found:
    """The record of the exports to a folder. Raises UserError for one that cannot be read."""
    return look(folder / RECORD, lambda _: False)


def exported_to(folder: Path) -> dict[str, list[str]]:
    """The files on record as an export's, each with the SHA-256 of every content that it was given there; none where
    the record is of before contents were kept. Raises UserError."""
    return _listed(read_record(folder).document)


def _listed(document: Mapping[str, Any]) -> dict[str, list[str]]:
    files = document.get("files")
    if isinstance(files, Mapping):
        return {name: [each for each in hashes if isinstance(each, str)] for name, hashes in files.items()}
    return {name: [] for name in files if isinstance(name, str)} if isinstance(files, list) else {}


def with_contents(folder: Path, written: Mapping[str, Path]) -> dict[str, list[str]]:
    """`exported_to` with the contents of the files `written`, by the names they are to have, added to it.

    Earlier contents stay: a kill while files are moved into place leaves some of them there. Raises UserError."""
    known = exported_to(folder)
    for name, path in written.items():
        known[name] = list(dict.fromkeys([*known.get(name, []), digest(path)]))
    return dict(sorted(known.items()))


def is_unchanged(path: Path, contents: Iterable[str]) -> bool:
    """Whether the file holds one of these contents, as SHA-256; any will do where there are none. Raises UserError."""
    known = set(contents)
    return not known or digest(path) in known


def note_rewritten(folder: Path, name: str, old: bytes, new: bytes) -> None:
    """Have the record take `new` for the content of a file that a command rewrites, if `old` was an export's; what a
    person changed before stays theirs. Call it before the file is written. Raises OSError, UserError."""
    document = read_record(folder).document
    contents = _listed(document).get(name, [])
    if hashlib.sha256(old).hexdigest() not in contents:
        return
    files = _listed(document) | {name: list(dict.fromkeys([*contents, hashlib.sha256(new).hexdigest()]))}
    write_whole(folder / RECORD, json.dumps({**document, "files": files}, indent=1) + "\n")


def digest(path: Path) -> str:
    """The SHA-256 of a file's content. Raises UserError."""
    try:
        status = path.stat()
        return _digest(os.fspath(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): make it readable or choose another folder") from None


@lru_cache(maxsize=256)
def _digest(path: str, *_: int) -> str:
    """Read once for each version of the file: a start asks twice, and weights have gigabytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_plain(path: Path) -> bool:
    """Whether it is a regular file and no link to one."""
    return stat.S_ISREG(path.lstat().st_mode)
