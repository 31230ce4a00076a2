"""A part of a run that is not counted in steps: what it is, how much of it is done, how long it may still take."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SILENCE = 8.0
"""Seconds without a line, where there is no bar, before one is due: below ten, with two that it may be late."""


def duration(seconds: float) -> str:
    """`7:05` or `1:02:03`; `?` for what no clock shows."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Stage:
    """Call it with what is done and what there is to do, where that is known."""

    def __init__(self, label: str, clock: Callable[[], float]) -> None:
        self.label = label
        self.done = self.total = 0
        self._clock = clock
        self._started = clock()

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def __str__(self) -> str:
        return f"{self.label}  {self.state()}"

    def state(self) -> str:
        """How much is done and how long it took and may take, without the label."""
        seconds = self._clock() - self._started
        if not self.total:
            return duration(seconds)
        text = f"{self.done:,} of {self.total:,}  {duration(seconds)}"
        if 0 < self.done < self.total:
            text += f"  ETA {duration(seconds / self.done * (self.total - self.done))}"
        return text


@contextmanager
def unseen(label: str) -> Iterator[Stage]:
    """A stage that nobody is shown."""
    yield Stage(label, time.monotonic)


class Heartbeat:
    """Calls `beat` about once a second in a thread of its own, until it is stopped."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(1):
            self._beat()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
