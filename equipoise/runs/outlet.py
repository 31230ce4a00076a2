"""A stream that a person reads, made safe to write to, and whether it can show a bar."""

import io
import os
from collections.abc import Callable
from typing import TextIO


class Outlet:
    """The stream, made safe: what its encoding lacks is escaped, and after the first write it refuses none is tried."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        safe = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._attempt(lambda stream: stream.write(safe))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda stream: stream.flush())

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except ValueError:  # a closed stream
            return False

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def _attempt(self, action: Callable[[TextIO], object]) -> None:
        stream = self._stream
        if stream is None:
            return
        try:
            action(stream)
        except BlockingIOError:
            pass  # the reader is slow and the pipe does not block: this text is lost, the next may pass
        except OSError:
            self._stream = None
            _discard_rest(stream)
        except ValueError:  # closed by someone else
            self._stream = None


def _discard_rest(stream: TextIO) -> None:
    """Send what a dead stream still buffers to the null device; else the interpreter cannot flush it and exits 120."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except OSError:
        pass


def can_show_bar(outlet: Outlet) -> bool:
    """Whether it is a terminal that moves its cursor, and no job of a build server."""
    term = os.environ.get("TERM", "unknown" if os.name == "posix" else "windows").lower()
    return (
        outlet.isatty()
        and term not in ("", "dumb", "unknown")
        and os.environ.get("CI", "").lower() in ("", "0", "false")
    )
