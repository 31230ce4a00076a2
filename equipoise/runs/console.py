"""What a person sees of a run: a live bar on a terminal, plain lines anywhere else.

The bar, colours and cursor movement appear only on a terminal that can show them. A pipe, a file, `nohup`, CI and
`TERM=dumb` get lines free of control characters. Nothing here may end a run: a terminal that has gone is written to
no more, and text from a model is shown with its control characters spelled out.
"""

import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TextIO

from equipoise import __version__
from equipoise.protocol.lexicon import NO_CLASS, Piece
from equipoise.protocol.marking import LOOKS, in_marks, legend, pieces, printable
from equipoise.protocol.reward import Reward
from equipoise.protocol.task import PROTOCOL, Task
from equipoise.runs.outlet import Outlet, can_show_bar
from equipoise.runs.stage import SILENCE, Heartbeat, Stage, duration

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

MAX_SAMPLES = 6
# Without a terminal: every step at first, so that one sees the run start, then one line in so many seconds.
FIRST_STEPS = 5
SECONDS_PER_LINE = 10.0
# Steps whose mean duration gives rate and time left: enough to even out lengths, few enough to follow a changed load.
RECENT_STEPS = 30
# Columns that a stage's bar has at least, with the three spaces around its label; a longer label is cut.
SHORTEST_BAR = 13


def parts(reward: Reward, beside: bool = False) -> str:
    """The reward's parts in one line; with the sum, which stands before the text, everything the score consists of.
    `beside`: another reward stands there, and the sum here."""
    named = (
        ("base", reward.base),
        ("bonus", reward.bonus),
        ("length", reward.length_penalty),
        ("repetition", reward.repetition_penalty),
    )
    told = "  ".join(f"{name} {value:+z.2f}" for name, value in named) + f"  words {reward.words}"
    return f"the task's reward {reward.reward:+z.2f}  {told}" if beside else told


def shown(
    rewards: Sequence[Reward], occupations: Iterable[str], own: Sequence[float] | None = None
) -> list[tuple[Reward, float]]:
    """The first sample of each of the first few occupations, with the run's reward of it: `own`, or the task's."""
    first: dict[str, tuple[Reward, float]] = {}
    values = [reward.reward for reward in rewards] if own is None else own
    for reward, occupation, value in zip(rewards, occupations, values, strict=True):
        first.setdefault(occupation, (reward, value))
    return list(first.values())[:MAX_SAMPLES]


class Pace:
    """Speed and time left, from the last steps of this process: neither a resume nor a slow start distorts them."""

    def __init__(self, total_steps: int, done: int, clock: Callable[[], float]) -> None:
        self.total = total_steps
        self.done = done
        self._clock = clock
        self._last: float | None = None
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._seconds = 0.0

    def tick(self, step: int, first_seconds: float | None) -> None:
        """A step has ended. `first_seconds`: how long it took, if known; used while no earlier step was timed here."""
        now = self._clock()
        seconds = now - self._last if self._last is not None else first_seconds
        if seconds is not None:
            self._recent.append(seconds)
            # Kept as one number: the bar is drawn by another thread, which must not walk a deque that grows.
            self._seconds = sum(self._recent) / len(self._recent)
        self._last = now
        self.done = step

    def __str__(self) -> str:
        count, seconds = f"{self.done}/{self.total}", self._seconds
        if self._last is None or seconds <= 0:
            return count
        rate = f"{seconds:.1f} s/step" if seconds >= 1 else f"{1 / seconds:.1f} steps/s"
        left = (self.total - self.done) * seconds - (self._clock() - self._last)
        return f"{count}  {rate}  ETA {duration(left)}"


def numbers(metrics: Mapping[str, float], timings: Mapping[str, float], target_kl: float | None = None) -> list[str]:
    """The step's few numbers worth watching. The two KLs go by names that cannot be mistaken for each other: the
    update's stands beside its target, the distance to the reference model beside the least that compliance needs."""
    target = "" if target_kl is None else f" (target {target_kl:g})"
    bound = metrics.get("kl/bound")
    distance = metrics.get("kl/ref") if bound is None else bound + metrics["kl/excess"]
    needed = "" if bound is None else f" (bound {bound:z.2f})"
    watched = (
        ("reward {:z.3f}", metrics.get("reward/function", metrics.get("reward/mean"))),
        ("both {:.1%}", metrics.get("compliance/both")),
        ("peak {:.1f} GB", timings.get("memory/peak_gb")),
        ("update KL {:z.4f}" + target, metrics.get("ppo/update_kl")),
        ("distance to reference {:z.2f} nats" + needed, distance),
    )
    return [form.format(value) for form, value in watched if value is not None]


def in_rows(parts: Iterable[str], width: int) -> list[str]:
    """The parts, two spaces apart, in as few rows of `width` columns as hold them whole."""
    rows: list[str] = []
    for part in parts:
        if rows and len(rows[-1]) + 2 + len(part) <= width:
            rows[-1] += "  " + part
        else:
            rows.append(part)
    return rows


LABEL = 9  # columns that labels have at least, so that tables below each other are aligned
Row = tuple[str, Sequence[Piece]]
"""A label, and the text beside it."""


class Console:
    """Notices, progress and samples for a person."""

    def __init__(
        self,
        stream: TextIO | None,
        total_steps: int,
        done: int = 0,
        task: Task = PROTOCOL,
        clock: Callable[[], float] = time.monotonic,
        target_kl: float | None = None,
        transient: bool = False,
    ) -> None:
        """`transient`: the bar goes when the console is closed."""
        self._outlet = Outlet(stream)
        self._target_kl = target_kl
        self._transient = transient
        self._task = task
        self._clock = clock
        self._pace = Pace(total_steps, done, clock)
        self._numbers: list[str] = []
        self._lines = 0
        self._last_line = clock()
        self._stage: Stage | None = None
        self._shown_at = clock()
        """When a line was last written, of whatever kind."""
        self._lock = threading.Lock()
        self._beat: Heartbeat | None = None
        self._is_stdout = stream is sys.stdout
        self._bar_is_due = can_show_bar(self._outlet)
        self._screen: RichConsole | None = None
        """The terminal, once it has shown the bar."""
        self._live: Live | None = None

    @property
    def encoding(self) -> str:
        """What the stream can show."""
        return self._outlet.encoding

    def _open_bar(self) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        class Screen(RichConsole):
            def show_cursor(self, show: bool = True) -> bool:
                return False  # never hidden, so that a killed run leaves a usable terminal

        # Rich's type wants a whole TextIO; it calls the methods that Outlet has.
        self._screen = Screen(file=self._outlet, force_terminal=True, force_jupyter=False)  # type: ignore[arg-type]
        self._live = Live(
            console=self._screen,
            get_renderable=self._bar,
            refresh_per_second=2,
            transient=self._transient,
            # Other libraries' prints go above the bar, but a redirected error stream stays where the user sent it.
            redirect_stdout=self._is_stdout,
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        )
        self._live.start()

    def _bar(self) -> "Group":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        assert self._screen is not None
        if stage := self._stage:
            state = stage.state()
            label = Text(stage.label)
            room = max(1, self._screen.width - len(state) - SHORTEST_BAR)
            # An ellipsis that the encoding lacks would be escaped, and so be longer than the room.
            label.truncate(room, overflow="ellipsis" if self.encoding.lower().startswith("utf") else "crop")
            row.add_row(ProgressBar(total=stage.total or None, completed=stage.done), Text(f"{label}  {state}"))
        elif self._pace.total:
            steps = ProgressBar(total=self._pace.total, completed=self._pace.done)
            row.add_row(steps, Text(f"step {self._pace}"))
        else:
            return Group()  # between the stages of a job without steps
        lines = in_rows(self._numbers, self._screen.width)
        return Group(row, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))

    @contextmanager
    def stage(self, label: str) -> Iterator[Stage]:
        """While it lasts the bar is the stage's. Without a terminal, from the first stage on, a line says what goes on
        whenever none came for `SILENCE`."""
        self._open_bar_once()
        outer, self._stage = self._stage, Stage(label, self._clock)
        if self._live is None and self._beat is None:
            if not self._transient:
                self.say(label)  # what came before may have been silent for a while
            self._beat = Heartbeat(self._break_silence)
        try:
            yield self._stage
        finally:
            self._stage = outer

    def _break_silence(self) -> None:
        silent = self._clock() - self._shown_at
        if self._stage is not None and silent >= SILENCE:
            self._print([Piece(str(self._stage))])
        elif silent >= SILENCE and self._pace.done < self._pace.total:
            self._print([Piece(f"working on step {self._pace.done + 1:,} of {self._pace.total:,}")])

    def _open_bar_once(self) -> None:
        if self._bar_is_due:
            self._bar_is_due = False
            self._open_bar()

    def say(self, text: str) -> None:
        """A notice: above the bar, or as plain lines."""
        for line in text.split("\n"):
            self._print([Piece(printable(line.expandtabs()))])

    def step(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Progress after a completed step."""
        self._pace.tick(step, timings.get("time/step"))
        self._numbers = numbers(metrics, timings, self._target_kl)
        self._open_bar_once()
        if self._live is not None:
            self._live.refresh()
            return
        due = self._clock() - self._last_line >= SECONDS_PER_LINE
        if due or self._lines < FIRST_STEPS or step == self._pace.total:
            for i, row in enumerate(in_rows([f"step {self._pace}", *self._numbers], self.width or sys.maxsize)):
                self._print([Piece(row if i == 0 else f"  {row}")])
            self._lines += 1
            self._last_line = self._clock()

    def rewind(self, step: int) -> None:
        """The run went back to `step`."""
        self._pace.done = step

    def samples(
        self, step: int, rewards: Sequence[Reward], occupations: Sequence[str], own: Sequence[float] | None = None
    ) -> None:
        """A few of the batch's texts, each with its reward (`own`, or the task's), its terms marked, and the parts of
        the task's reward below."""
        self._print([Piece(f"samples of step {step}, terms marked: "), *legend(self._task.labels)])
        for reward, value in shown(rewards, occupations, own):
            self._print([Piece(f"  {value:+.2f}  "), *pieces(reward.text, self._task.lexicon)])
            self._print([Piece(f"         {parts(reward, own is not None)}")], style="dim")

    def _print(self, line: Sequence[Piece], style: str = "") -> None:
        self._shown_at = self._clock()
        screen = self._screen
        if screen is None:
            with self._lock:
                self._outlet.write(in_marks(line) + "\n")
                self._outlet.flush()
            return
        # Without colours (NO_COLOR) the classes are told apart as in plain text.
        text = in_marks(line) if screen.no_color else self._styled(line, style)
        screen.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    @staticmethod
    def _styled(line: Sequence[Piece], style: str) -> "Text":
        from rich.text import Text

        return Text.assemble(
            *((text, "" if kind == NO_CLASS else LOOKS[kind].style) for text, kind in line), style=style
        )

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None where the stream is none, and lines may be of any length."""
        return shutil.get_terminal_size().columns if self._outlet.isatty() else None

    def table(self, rows: Iterable[Row]) -> None:
        """Rows of a label and a text. On a terminal a text that is too long goes on below its own beginning."""
        rows = list(rows)
        beside = 4 + max(LABEL, *(len(label) for label, _ in rows))
        for label, text in rows:
            head = f"  {printable(label)}".ljust(beside)
            for i, line in enumerate(self._folded(text, beside)):
                self._print([Piece(head if i == 0 else " " * beside), *line])

    def _folded(self, text: Sequence[Piece], beside: int) -> list[list[Piece]]:
        """`text` in lines that fit on the terminal, `beside` columns being taken."""
        if self.width is None:
            return [list(text)]
        room, filled = max(20, self.width - beside), 0
        lines: list[list[Piece]] = [[]]
        for word in _words(text, marked=self._screen is None or self._screen.no_color):
            if lines[-1] and filled + 1 + word.width > room:
                lines.append([])
            spaced = [Piece(" "), *word.pieces] if lines[-1] else word.pieces
            filled = word.width + (filled + 1 if lines[-1] else 0)
            lines[-1] += spaced
        return lines

    def close(self) -> None:
        """Stop drawing. The bar's last state stays on the screen, unless the console is transient."""
        self._bar_is_due = False
        if self._beat is not None:
            self._beat.stop()
            self._beat = None
        if self._live is not None:
            self._live.stop()
            self._live = None


class _Word(NamedTuple):
    pieces: list[Piece]
    width: int


def _words(text: Iterable[Piece], marked: bool) -> list[_Word]:
    """The words of `text`, a term of several words being one, with the columns they take; `marked`: with marks."""
    from rich.cells import cell_len

    words: list[list[Piece]] = [[]]
    for piece in text:
        parts = [piece.text] if piece.kind != NO_CLASS else piece.text.split(" ")
        for i, part in enumerate(parts):
            if i:
                words.append([])
            if part:
                words[-1].append(Piece(part, piece.kind))
    return [
        _Word(word, sum(cell_len(text) + 2 * (marked and kind != NO_CLASS) for text, kind in word))
        for word in words
        if word
    ]


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Something on the screen at once, and no silence, while modules are imported and a machine is looked at: a line
    where PyTorch is not loaded yet, which takes seconds, and then a bar on a terminal, lines elsewhere."""
    console = Console(sys.stdout, 0, transient=True)
    if "torch" not in sys.modules:
        console.say(f"equipoise {__version__}: {what}, loading PyTorch")
    try:
        with console.stage(what):
            yield
    finally:
        console.close()


def quiet() -> None:
    """Libraries' progress bars and advice would bury the lines that matter here."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch)\b.*")
    for library in ("transformers", "peft", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
