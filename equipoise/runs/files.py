"""Files that are whole or as they were: written aside, synced to the disk and renamed, or grown by whole lines."""

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equipoise.errors import UserError


def write_whole(path: Path, data: bytes | str) -> None:
    """Make `data` (text as UTF-8) the content of `path`: after a kill or a power cut the file is new or as it was.

    Raises OSError, with nothing left behind.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """`write_whole` of a document as JSON. Raises UserError."""
    try:
        write_whole(path, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> UserError:
    """The one line about a file that cannot be written."""
    return UserError(
        f"cannot write {path}: {error.strerror or error}; "
        "make room or choose a folder that can be written, then run the same command again"
    )


def content(path: Path) -> bytes:
    """What the file holds; nothing where there is none. Raises UserError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable or choose another folder") from error


def complete_lines(data: bytes) -> list[bytes]:
    """The lines that end in a line feed, with it."""
    return [line + b"\n" for line in data.split(b"\n")[:-1]]


class RowFile:
    """A file that grows by whole lines only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Unbuffered: a line that failed half-way must not wait in a buffer for a second attempt on closing.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise unwritable(path, error) from error

    def append(self, text: str) -> None:
        """Write complete lines. UserError when they do not fit; the file then ends as before."""
        data = text.encode()
        end = self._file.seek(0, os.SEEK_END)
        try:
            # A disk that fills up takes a part first and reports the error on the next write.
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.truncate(end)
            raise unwritable(self.path, error) from error

    def sync(self) -> None:
        """Have the disk hold what was appended."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def make_folder(folder: Path, option: str = "") -> None:
    """Create a folder, where there is none, and make sure that it can be written. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".equipoise-write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        remedy = f"choose another {option}" if option else "choose a writable folder"
        raise UserError(f"cannot write to {folder} ({error.strerror}): {remedy}") from None


def sync_folder(folder: Path) -> None:
    """Have the disk hold the folder's names, so that a rename outlives a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
