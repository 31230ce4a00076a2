"""What a run leaves behind: CSV, JSON lines, TensorBoard, and lines for a person. `docs/METRICS.md` defines every key.

`training_metrics.csv` holds only what the seed determines, so that a run that was killed and resumed leaves the same
bytes as one that was not; durations go to `metrics.jsonl`. A line of any file is complete or absent.
"""

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from equipoise.documents import parse_json
from equipoise.errors import UserError
from equipoise.ppo.board import LAYOUT, draw_scalars
from equipoise.ppo.tracking.trackers import Trackers
from equipoise.protocol.marking import in_marks, pieces
from equipoise.protocol.plural import plural
from equipoise.protocol.reward import Reward
from equipoise.protocol.task import PROTOCOL, Task
from equipoise.runs.console import Console, parts, shown
from equipoise.runs.files import RowFile, complete_lines, content, set_aside, unwritable, write_whole
from equipoise.runs.stage import Stage

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

KEY = re.compile(r"[a-z0-9_]+/[\w-]+")  # a class of terms may be named in any script


def defined_keys(text: str) -> list[str]:
    """The keys that `docs/METRICS.md`, given as `text`, defines: the back-quoted first cells of its tables."""
    return re.findall(rf"^\| `({KEY.pattern})` \|", text, flags=re.MULTILINE)


def undefined_keys(keys: Iterable[str], text: str) -> list[str]:
    """Those of `keys` that `docs/METRICS.md`, given as `text`, does not define, sorted. For the tests."""
    return sorted(set(keys) - set(defined_keys(text)))


def _replace(path: Path, data: bytes) -> None:
    """`write_whole`, but a file that holds `data` already is left alone. Raises UserError."""
    try:
        if content(path) != data:
            write_whole(path, data)
    except OSError as error:
        raise unwritable(path, error) from error


def _csv_step(line: bytes, columns: int) -> int | None:
    """The row's step; None for what is no row (zeros after a power cut, say)."""
    cells = line.split(b",")
    return int(cells[0]) if len(cells) == columns and cells[0].isdigit() else None


def _json_step(line: bytes) -> int | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None


class _Kept(NamedTuple):
    """What a CSV holds once it is cut: its metric columns (none without rows) and the step of its last row, or 0."""

    columns: list[str]
    step: int
    damaged: bool
    """Whether lines had to be left out that are no rows."""


def _cut_csv(path: Path, step: int) -> _Kept:
    """Keep the header and the rows up to `step`, nothing if there are none.

    Raises UserError, and touches nothing, for a file that is not this program's.
    """
    data = content(path)
    header, *rows = complete_lines(data) or [b"step"]
    first, *columns = header.decode("utf-8", "replace").rstrip("\n").split(",")
    # No complete line: either a header cut short, which begins as one, or somebody's one-line file.
    ours = first == "step" and all(map(KEY.fullmatch, columns)) and b"step,".startswith(data[:5])
    if not ours:
        raise UserError(f"{path} is not the log of a training run (its first line says so); move it away")
    made = [(row, _csv_step(row, 1 + len(columns))) for row in rows]
    _put_aside(path, damaged := any(at is None for _, at in made))
    kept = [(row, at) for row, at in made if at is not None and at <= step]
    _replace(path, header + b"".join(row for row, _ in kept) if kept else b"")
    return _Kept(columns, kept[-1][1], damaged) if kept else _Kept([], 0, damaged)


def _cut_jsonl(path: Path, step: int | None) -> bool:
    """Keep the rows up to `step`, all where it is None. Whether a line that is none had to be left out."""
    lines = complete_lines(content(path))
    made = [(line, _json_step(line)) for line in lines]
    _put_aside(path, damaged := any(at is None for _, at in made))
    kept = [line for line, at in made if at is not None and (step is None or at <= step)]
    _replace(path, b"".join(kept))
    return damaged


def _put_aside(path: Path, damaged: bool) -> None:
    """Keep a copy of a file of which lines are about to be lost that are not rows."""
    if damaged:
        data = content(path)
        set_aside(path)
        _replace(path, data)


def _plain(value: Any) -> Any:
    """`value` fit for JSON: numbers that JSON lacks become text, and so do paths and other objects."""
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _json_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


TOLD_BY_CALLER = {"signal", "resume", "gave_up", "function_failed"}
"""Kinds of events of which the run itself says what they are and what to do."""


def _sentence(kind: str, row: Mapping[str, Any]) -> str:
    """An event for a person."""
    match kind:
        case "nonfinite":
            where = f"; it comes from {row['where']}" if row.get("where") else ""
            return f"a number was not finite: {row['what']}{where}"
        case "rollback":
            now = f"; from there on with {row['now']}" if "now" in row else ""
            return f"the run goes back to {row['to']} ({row['because']}){now}"
        case "no_warm_start":
            drawn = plural(row["drawn"], "sample")
            return f"no warm start: {row['found']} of {drawn} comply, and it needs {row['needed']}"
        case "functions_changed":
            return f"the run goes on with another function than it began with: {row['what']}"
    return ", ".join([kind, *(f"{key} {value}" for key, value in row.items())])


class RunLog:
    """The log of one run. Steps are counted from 1 and logged in order; a step that had to be skipped has no row.

    output_dir receives `training_metrics.csv`, `metrics.jsonl`, `samples.jsonl`, `eval.jsonl` and `events.jsonl`. Rows
    after `resume_step`, left by an attempt that got further, are cut off (all rows for 0); events stay, they are the
    history. `task` says which terms to mark, `target_kl` what the update's KL is held to. `stream` is standard output
    unless given.
    Raises UserError when a folder or file cannot be written, or `training_metrics.csv` is not a log.
    """

    def __init__(
        self,
        output_dir: Path,
        tensorboard_dir: Path,
        total_steps: int,
        resume_step: int = 0,
        stream: TextIO | None = None,
        task: Task = PROTOCOL,
        clock: Callable[[], float] = time.monotonic,
        target_kl: float | None = None,
    ) -> None:
        self._folder = output_dir
        self._tensorboard_dir = tensorboard_dir
        self._task = task
        self._trackers: Trackers | None = None
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(output_dir, error) from error
        notices = self._open(resume_step)
        self._console = Console(
            sys.stdout if stream is None else stream, total_steps, resume_step, task, clock, target_kl
        )
        for notice in notices:
            self.say(notice)

    def _open(self, step: int) -> list[str]:
        """Cut the files to `step` and open them. Returns what a person should be told."""
        notices = []
        csv, metrics, samples, events, evaluations = (
            self._folder / name
            for name in ("training_metrics.csv", "metrics.jsonl", "samples.jsonl", "events.jsonl", "eval.jsonl")
        )
        kept = _cut_csv(csv, step)
        if kept.step < step:
            notices.append(f"{csv.name} ends at step {kept.step}; the run goes on after step {step}")
        damaged = [csv] if kept.damaged else []
        damaged += [path for path in (metrics, samples, evaluations) if _cut_jsonl(path, step)]
        damaged += [events] if _cut_jsonl(events, None) else []  # the history, which is never cut
        notices += [f"{p.name} was damaged; it goes on with its good lines, and lies whole beside it" for p in damaged]
        self._step = step
        self._columns = kept.columns
        self._csv, self._metrics, self._samples, self._events = map(RowFile, (csv, metrics, samples, events))
        self._evaluations = RowFile(evaluations)
        self._described: set[str] = set()
        self._board = self._open_tensorboard(step)
        if self._board is None:
            notices.append("TensorBoard is not installed, so no curves are drawn for it (pip install tensorboard)")
        return notices

    def track(self, trackers: Trackers) -> None:
        """Have these trackers get what the files hold, as `kept` says."""
        self._trackers = trackers
        self._say_of_trackers()

    def kept(self, step: int) -> None:
        """A checkpoint holds everything up to `step`. May be called from any thread."""
        if self._trackers is not None:
            self._trackers.kept(step)

    def finished(self) -> None:
        """The run is complete, and its summary written."""
        if self._trackers is not None:
            self._trackers.finished()

    def _say_of_trackers(self) -> None:
        for line in self._trackers.notices() if self._trackers is not None else ():
            self.say(line)

    @property
    def last_step(self) -> int:
        """The last that was logged; 0 before the first."""
        return self._step

    def _open_tensorboard(self, step: int) -> "SummaryWriter | None":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        try:
            # The viewer drops what earlier event files hold from this step on. It ignores the first such mark it meets,
            # so a run's first start needs one too.
            board = SummaryWriter(str(self._tensorboard_dir), purge_step=step + 1)
            board.add_custom_scalars(LAYOUT)
            return board
        except OSError as error:
            raise unwritable(self._tensorboard_dir, error) from error

    def _draw(self, write: Callable[["SummaryWriter"], object]) -> None:
        """Curves are a convenience: a run does not end because they cannot be written."""
        if self._board is None:
            return
        try:
            write(self._board)
            self._board.flush()  # what a kill leaves unwritten before a checkpoint would be missing for good
        except OSError as error:
            self._board = None
            self.say(f"TensorBoard gets no more curves: {error.strerror or error}; training goes on")

    def stage(self, label: str) -> AbstractContextManager[Stage]:
        """A part of the run besides its steps, such as the warm start: what it yields is called with what is done and
        what there is to do."""
        return self._console.stage(label)

    def screen(self) -> Console:
        """What a person sees, its bar being closed: for what is shown at the end."""
        self._console.close()
        return self._console

    def say(self, text: str) -> None:
        """A notice for a person."""
        self._console.say(text)

    def step(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Log a completed step. `metrics` depend on the seed alone and keep their keys; `timings` need do neither."""
        assert step > self._step, f"step {step} logged after step {self._step}"
        assert all(map(KEY.fullmatch, [*metrics, *timings])), "a key looks like group/name"
        values = {key: float(value) for key, value in metrics.items()}
        if not self._columns:
            self._csv.append(",".join(["step", *values]) + "\n")
            self._columns = list(values)
        if differing := set(values) ^ set(self._columns):
            raise UserError(
                f"{self._csv.path} has other columns than this run logs (differing: {', '.join(sorted(differing))}); "
                "move it away and run the same command again"
            )
        self._csv.append(",".join([str(step), *(repr(values[key]) for key in self._columns)]) + "\n")
        logged = values | {key: float(value) for key, value in timings.items()}
        row: dict[str, Any] = {"step": step}
        row |= {key: value if math.isfinite(value) else None for key, value in logged.items()}
        row["time/clock"] = time.time()
        if nonfinite := {key: repr(value) for key, value in logged.items() if not math.isfinite(value)}:
            row["nonfinite"] = nonfinite
        self._metrics.append(_json_line(row))
        self._step = step
        self._draw(lambda board: draw_scalars(board, logged, step, self._described))
        self._console.step(step, metrics, timings)
        self._say_of_trackers()

    def samples(
        self,
        step: int,
        rewards: Sequence[Reward],
        occupations: Sequence[str],
        own: Sequence[float] | None = None,
    ) -> None:
        """Log scored sentences: all to `samples.jsonl`, a few occupations' first to terminal and TensorBoard. `own` are
        their rewards where a function of the user's is the reward of the run."""
        paid = [{} if own is None else {"reward_fn": _plain(own[i])} for i in range(len(rewards))]
        rows = ({"step": step} | reward.document() | more for reward, more in zip(rewards, paid, strict=True))
        self._samples.append("".join(map(_json_line, rows)))
        lines = []
        for reward, value in shown(rewards, occupations, own):
            text = in_marks(pieces(reward.text, self._task.lexicon))
            # Indented, Markdown takes the lines for code and interprets nothing in them.
            lines += [f"    {value:+z.2f}  {text}", f"           {parts(reward, own is not None)}"]
        self._draw(lambda board: board.add_text("samples", "\n".join(lines), step))
        self._console.samples(step, rewards, occupations, own)

    def evaluation(self, step: int, measured: Mapping[str, float]) -> None:
        """Log an evaluation to `eval.jsonl`, TensorBoard and the terminal."""
        values = {f"eval/{key}": float(value) for key, value in measured.items() if key != "step"}
        self._evaluations.append(_json_line({"step": step} | values))
        self._draw(lambda board: draw_scalars(board, values, step, self._described))
        self.say(
            f"step {step}: evaluation of {plural(measured['n'], 'sentence')}: {self._task.all_classes} "
            f"{measured['both']:.1%}, strict {measured['strict']:.1%}, {measured['effective_pairs']:.1f} effective "
            f"{self._task.pair_noun}, KL to the reference {measured['kl']:z.2f} nats per sentence"
        )

    def alert(self, step: int, name: str, evidence: Mapping[str, Any], remedy: str, line: str) -> None:
        """Log an alert to `events.jsonl`, TensorBoard and, as one line, the terminal."""
        self._event(step, "alert", {"name": name, "evidence": evidence, "remedy": remedy})
        text = "\n".join([f"    {line}", *(f"    {s}" for s in evidence["sentences"])])
        self._draw(lambda board: board.add_text("alerts", text, step))
        self.say(f"step {step}: {line}")

    def _event(self, step: int, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        assert "time" not in fields, "an event carries its own time"
        row: dict[str, Any] = _plain(fields)
        self._events.append(_json_line({"step": step, "kind": kind, "time": time.time(), **row}))
        return row

    def event(self, step: int, kind: str, **fields: Any) -> None:
        """Log what is out of the ordinary (nonfinite, resume, rollback ...) to `events.jsonl` and the terminal."""
        row = self._event(step, kind, fields)
        if kind not in TOLD_BY_CALLER:
            self.say(f"step {step}: {_sentence(kind, row)}")

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`: the run has gone back to that checkpoint within this process."""
        if self._trackers is not None:
            self._trackers.rewind()
        self._close_files()
        self._console.rewind(step)
        for notice in self._open(step):
            self.say(notice)
        if self._trackers is not None:
            self._trackers.rewound(step)

    def sync(self) -> None:
        """Have the disk hold every row. Called before a checkpoint counts, not even a power cut parts the two."""
        for file in (self._csv, self._metrics, self._samples, self._events, self._evaluations):
            file.sync()

    def _close_files(self) -> None:
        for file in (self._csv, self._metrics, self._samples, self._events, self._evaluations):
            file.close()
        self._draw(lambda board: board.close())

    def close(self) -> None:
        """Close files and bar. May be called again."""
        self._close_files()
        if self._trackers is not None:
            self._trackers.close()
            self._say_of_trackers()
        self._console.close()
