"""Files that are whole or as they were: written aside, synced to the disk and renamed, or grown by whole lines."""

import contextlib
import errno
import io
import itertools
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equipoise.errors import UserError


def write_whole(path: Path, data: bytes | str) -> None:
    """Make `data` (text as UTF-8) the content of `path`: after a kill or a power cut the file is new or as it was.

    A link at `path` is replaced, never written through. Raises OSError, with nothing left behind.
    """
    write_together({path: data})


def write_together(contents: Mapping[Path, bytes | str]) -> None:
    """`write_whole` of several files, none of which is replaced before all are written. Raises OSError."""
    partials = {path: path.with_name(f".{path.name}.equipoise-partial") for path in contents}
    made: list[Path] = []
    try:
        for path, data in contents.items():
            made.append(partials[path])
            _write_new(partials[path], data.encode() if isinstance(data, str) else data)
        for path, partial in partials.items():
            partial.replace(path)
    except OSError:
        for partial in made:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        raise


def _write_new(partial: Path, data: bytes) -> None:
    """Write and sync a file that is new, so that no link which lies in its place is followed."""
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_file(path: Path, data: bytes | str) -> None:
    """`write_whole`. Raises UserError."""
    try:
        write_whole(path, data)
    except OSError as error:
        raise unwritable(path, error) from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """`write_whole` of a document as JSON. Raises UserError."""
    write_file(path, json.dumps(document, indent=1) + "\n")


def unwritable(path: Path, error: OSError) -> UserError:
    """The one line about a file that cannot be written."""
    if error.errno == errno.ELOOP:
        return UserError(f"cannot write {path}: it is a link, and nothing is written through one; move it away")
    return UserError(
        f"cannot write {path}: {error.strerror or error}; "
        "make room or choose a folder that can be written, then run the same command again"
    )


def set_aside(path: Path) -> Path:
    """Give the file another name, `NAME.damaged-1` or the next that is free, and return it. Raises UserError."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    try:
        path.rename(aside)
    except OSError as error:
        raise unwritable(path, error) from error
    return aside


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
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = io.FileIO(os.open(path, flags, 0o666), "ab")
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
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise unwritable(self.path, error) from error

    def sync(self) -> None:
        """Have the disk hold what was appended. Raises UserError."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        self._file.close()


def make_folder(folder: Path, option: str = "") -> None:
    """Create a folder, where there is none, and make sure that it can be written. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".equipoise-write-test-{uuid.uuid4().hex}"  # no one else's name, nor another process's
        probe.touch(exist_ok=False)
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
