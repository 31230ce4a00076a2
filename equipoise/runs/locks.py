"""Locks on folders and files: whoever holds one is alone. The kernel releases those of the dead."""

import contextlib
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from equipoise.errors import UserError
from equipoise.runs.files import make_folder

LOCK = ".equipoise-lock"
"""The file in a folder that only one process at a time may write."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What a file system without locks answers, such as Lustre mounted without them."""

log = logging.getLogger(__name__)
_told: set[Path] = set()


def flock(descriptor: int, place: Path, wait: bool = False) -> None:
    """Lock an open file until it is closed. Where the file system of `place` has no locks, say so once and go on.

    Raises BlockingIOError where another process holds it, unless told to `wait`; OSError.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if place not in _told:
            _told.add(place)
            log.warning("the file system of %s has no locks: see to it that no second process writes there", place)


@contextlib.contextmanager
def in_turn(path: Path, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is not there, and stays; `waits` is called before waiting for
    another process that holds it. Raises OSError, which also says what lies in the file's place where that is none."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        place = {errno.ELOOP: "is a link", errno.EISDIR: "is a folder"}.get(error.errno or 0)
        raise OSError(error.errno, f"{path.name} {place}" if place else error.strerror, str(path)) from None
    try:  # closing it, or the end of the process, gives the lock back
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, f"{path.name} is no file", str(path))
        try:
            flock(descriptor, path.parent)
        except BlockingIOError:
            waits()
            flock(descriptor, path.parent, wait=True)
        yield
    finally:
        os.close(descriptor)


class FolderLock:
    """Held from when it is made until it is closed, which removes its file. Use as a context manager."""

    def __init__(self, folder: Path, busy: str, name: str = LOCK) -> None:
        """Raises UserError where another process holds it (`busy` says what to do) or the file cannot be opened."""
        path = self._path = folder / name
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor: int | None = os.open(path, flags, 0o666)
        except OSError as error:
            why = "it is a link" if error.errno == errno.ELOOP else error.strerror
            raise UserError(f"cannot open {path} ({why}): choose a folder that can be written") from None
        try:
            flock(self._descriptor, folder)
            if not self._is_there():  # whoever held it has just removed it
                raise BlockingIOError
        except BlockingIOError:
            self._release()
            raise UserError(f"another process is {busy}") from None
        except OSError as error:
            self._release()
            raise UserError(f"cannot lock {path} ({error.strerror}): choose another folder") from None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._descriptor is not None and self._is_there():
            with contextlib.suppress(OSError):
                self._path.unlink()
        self._release()

    def _is_there(self) -> bool:
        """Whether the file that is locked is still the one that has the name."""
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path, follow_symlinks=False))
        except OSError:
            return False

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextlib.contextmanager
def locked_folder(folder: Path, busy: str, option: str = "--output-dir") -> Iterator[None]:
    """Make the folder, which `option` names, and hold its lock; a folder that was made here and stays empty is removed.
    Raises UserError."""
    new = not folder.exists()
    make_folder(folder, option)
    try:
        with FolderLock(folder, busy):
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
