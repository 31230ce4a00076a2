"""`equipoise generate`, and `python generate_rlhf.py`: the completions file of a trained model."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from equipoise.methods.completions import Key
from equipoise.methods.generate import GenerateConfig, generate
from equipoise.options import parse
from equipoise.ppo.console import Outlet, duration, printable
from equipoise.protocol.lexicon import OCCUPATIONS
from equipoise.protocol.prompts import MAX_WORDS, MIN_WORDS
from equipoise.protocol.reward import Reward, score, strict_success

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


def main(argv: list[str]) -> int:
    """Write or complete the file, print a summary, and return the exit code. Raises UserError for bad input.

    0 done, 3 non-finite numbers from the model, 128 + the number of the signal that stopped it (129, 130, 143).
    """
    config = parse(
        GenerateConfig,
        argv,
        GenerateConfig(),
        prog="equipoise generate",
        description="Write a model's sentences, n for each occupation, to a CSV. The same command again continues.",
    )
    with Progress(sys.stdout) as progress:
        outcome = generate(config, progress.say, progress)
    if outcome.texts:
        print(summary(outcome.texts))
    if outcome.status == "done":
        print(f"{config.output} is complete: {len(outcome.texts)} rows")
    return outcome.exit_code


class Progress:
    """Rows in the file: a bar on a terminal, elsewhere a line for about every tenth. Use as a context manager."""

    def __init__(self, stream: TextIO | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._outlet = Outlet(stream)
        self._clock = clock
        self._first: tuple[float, int] | None = None
        self._due = 0.0
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self) -> None:
        """What follows is another file."""
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
        """`done` of `total` rows are in the file; the first call starts the clock."""
        now = self._clock()
        if self._first is None:
            self._first = (now, done)
            self._open_bar(total)
        started, already = self._first
        text = f"{done:,} of {total:,} rows"
        if done > already:
            rate = (done - already) / max(now - started, 1e-9)
            text += f"  {rate:.1f} rows/s  {duration((total - done) / rate)} left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=text)
        elif done > already and (done >= self._due or done == total):
            self.say(text)
            self._due = done + total / 10

    def _open_bar(self, total: int) -> None:
        if not self._outlet.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        class Screen(Console):
            def show_cursor(self, show: bool = True) -> bool:
                return False  # never hidden, so that a killed run leaves a usable terminal

        # Rich's type wants a whole TextIO; it calls the methods that Outlet has.
        screen = Screen(file=self._outlet, force_terminal=True)  # type: ignore[arg-type]
        if screen.is_dumb_terminal:
            return
        self._bar = RichProgress(BarColumn(None), TextColumn("{task.description}"), console=screen, expand=True)
        self._bar.add_task("", total=total)
        self._bar.start()


def summary(texts: Mapping[Key, str]) -> str:
    """A table of what the sentences hold, one line for each occupation and one for all."""
    titles = ("occupation", "n", "both %", "one %", "none %", "8-15 words %", "strict %", "pairs", "words")
    widths = (13, 6, 8, 7, 8, 14, 10, 7, 7)
    assert (MIN_WORDS, MAX_WORDS) == (8, 15)  # as the title says

    def line(cells: Sequence[str]) -> str:
        return cells[0].ljust(widths[0]) + "".join(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))

    rewards = {key: score(text) for key, text in texts.items()}
    lines = [line(titles)]
    for occupation in OCCUPATIONS:
        own = [reward for key, reward in rewards.items() if key.occupation == occupation]
        if own:
            lines.append(line([occupation, *_cells(own)]))
    lines.append(line(["all", *_cells(list(rewards.values()))]))
    lines.append("strict: both, 8 to 15 words, and one complete sentence; pairs: different (agentic, communal)")
    lines.append("pairs of a sentence's first terms; words: mean per sentence")
    return "\n".join(lines)


def _cells(rewards: Sequence[Reward]) -> list[str]:
    n = len(rewards)
    classes = [bool(r.agentic) + bool(r.communal) for r in rewards]
    shares = [classes.count(2), classes.count(1), classes.count(0)]
    shares += [sum(MIN_WORDS <= r.words <= MAX_WORDS for r in rewards), sum(strict_success(r.text) for r in rewards)]
    pairs = {(r.agentic[0], r.communal[0]) for r in rewards if r.agentic and r.communal}
    words = sum(r.words for r in rewards) / n
    return [str(n), *(f"{100 * share / n:.1f}" for share in shares), str(len(pairs)), f"{words:.1f}"]
