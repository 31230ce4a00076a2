"""One line of progress: a bar on a terminal, elsewhere a line now and then."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from equipoise.protocol.marking import printable
from equipoise.runs.outlet import Outlet, can_show_bar
from equipoise.runs.stage import SILENCE, duration

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Progress:
    """How much of a long job is done: a bar on a terminal, elsewhere a line for about every tenth, and after a silence.

    `unit` names what is counted, in the plural. Use as a context manager.
    """

    def __init__(self, stream: TextIO | None, clock: Callable[[], float] = time.monotonic, unit: str = "rows") -> None:
        self._outlet = Outlet(stream)
        self._clock = clock
        self._unit = unit
        self._first: tuple[float, int] | None = None
        self._due = 0.0
        self._shown_at = 0.0
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self) -> None:
        """What follows is counted anew."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._first, self._due = None, None, 0.0

    def say(self, line: str) -> None:
        """A notice, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(printable(line), markup=False, highlight=False, emoji=False, soft_wrap=True)
            return
        self._outlet.write(printable(line) + "\n")
        self._outlet.flush()

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` are done; the first call starts the clock."""
        now = self._clock()
        if self._first is None:
            self._first = (now, done)
            self._shown_at = now
            self._open_bar(total)
        started, already = self._first
        text = f"{done:,} of {total:,} {self._unit}"
        if done > already:
            rate = (done - already) / max(now - started, 1e-9)
            text += f"  {rate:.1f} {self._unit}/s  {duration((total - done) / rate)} left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=text)
        elif done > already and (done >= self._due or done == total or now - self._shown_at >= SILENCE):
            self.say(text)
            self._due, self._shown_at = done + total / 10, now

    def _open_bar(self, total: int) -> None:
        if not can_show_bar(self._outlet):
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        class Screen(Console):
            def show_cursor(self, show: bool = True) -> bool:
                return False  # never hidden, so that a killed run leaves a usable terminal

        # Rich's type wants a whole TextIO; it calls the methods that Outlet has.
        screen = Screen(file=self._outlet, force_terminal=True)  # type: ignore[arg-type]
        self._bar = RichProgress(BarColumn(None), TextColumn("{task.description}"), console=screen, expand=True)
        self._bar.add_task("", total=total)
        self._bar.start()
