"""Stop signals that let the current step finish: the first one is recorded, the loop looks, saves and exits."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from equipoise.runs.ranks import ALONE, Ranks


def tell(received: signal.Signals) -> None:
    """Say on standard error what will happen. A bare write: `print` in a signal handler may re-enter its own buffer."""
    line = f"\n{received.name} received: finishing this step, then saving. Press Ctrl-C again to stop without saving.\n"
    with contextlib.suppress(OSError):  # after SIGHUP the terminal may be gone
        os.write(2, line.encode())


class Stopped(Exception):
    """A stop signal came while there was no step to finish."""


class StopSignals:
    """While entered, SIGTERM, SIGINT and SIGHUP are recorded instead of ending the process.

        with StopSignals() as stop:
            for step in steps:
                ...
                if stop.received:
                    save()
                    return stop.exit_code

    Only the first signal is kept and announced through `notice`. A second SIGINT raises KeyboardInterrupt. One that is
    entered inside another passes on what it receives, so that a loop over runs learns of a signal that came in a run.
    Python lets only the main thread handle signals; in any other thread this does nothing.
    """

    def __init__(self, notice: Callable[[signal.Signals], None] = tell, ranks: Ranks = ALONE) -> None:
        """`ranks`: processes of which one may have received what stops all; see `look`."""
        self.received: signal.Signals | None = None
        self.seen: signal.Signals | None = None
        """What `look` found."""
        self._ranks = ranks
        self._notice = notice if ranks.first else lambda number: None
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: SIGTERM 143, SIGINT 130, SIGHUP 129; 0 if none came."""
        number = self.seen or self.received
        return 128 + number if number else 0

    def look(self) -> signal.Signals | None:
        """The signal that any of the processes has received, the same on all, which call this at the same places."""
        if self.seen is None and (number := self._ranks.one_signal(self.received or 0)):
            self.seen = signal.Signals(number)
            self.received = self.received or self.seen
        return self.seen

    def check(self) -> None:
        """Raises Stopped if a signal has come; like `look`."""
        if self.look() is not None:
            raise Stopped

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        # SIGINT is handled even where it is ignored: a shell script starts its background jobs so, merely to keep
        # Ctrl-C from them, yet an explicit `kill -INT` must save the run. SIGTERM likewise. But an ignored SIGHUP is
        # `nohup`, whose whole point is that the run goes on after the terminal is closed.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            # None stands for a handler that C code installed, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self._first(signal.Signals(number)):
            self._notice(signal.Signals(number))
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def _first(self, number: signal.Signals) -> bool:
        """Keep the signal, here and in what this is entered inside of; whether it is the first."""
        outer = getattr(self._previous.get(number), "__self__", None)
        if isinstance(outer, StopSignals):
            outer._first(number)
        self._interrupts += number == signal.SIGINT
        first, self.received = self.received is None, self.received or number
        return first


def end_with_parent(descriptor: int = 0) -> None:
    """Have this process receive SIGTERM once nobody holds the other end of the pipe that it reads from, by default its
    standard input: the process that started it has ended, in whatever way."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(descriptor, 1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
