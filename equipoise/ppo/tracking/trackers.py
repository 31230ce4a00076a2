"""The trackers of one run: a thread of their own sends what a checkpoint holds, and no failure of theirs is the run's.

What is sent is never taken back, because none of the trackers can: so a step is sent once a checkpoint holds it, from
the run's own files. A run that is killed and resumed goes on where the tracker ends, which is never after the
checkpoint. Where a run goes back behind what was sent, as after an alert, a new run of the tracker begins.
"""

import contextlib
import io
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from equipoise.documents import read_json
from equipoise.ppo.tracking.rows import rows
from equipoise.ppo.tracking.to_mlflow import ToMlflow
from equipoise.ppo.tracking.to_trackio import ToTrackio
from equipoise.ppo.tracking.to_wandb import ToWandb
from equipoise.ppo.tracking.tracker import Start, Tracker
from equipoise.runs.files import write_json
from equipoise.runs.ownership import marked

RECORD = "trackers.json"
"""Which runs of which trackers a run is, in its output folder."""
ARTIFACTS = ("summary.json", "final_sentences.jsonl", "training_metrics.csv")
"""What a complete run gives to a tracker as an artifact, if it is there."""
ADAPTERS: Mapping[str, Callable[[], Tracker]] = {"wandb": ToWandb, "trackio": ToTrackio, "mlflow": ToMlflow}
OPENING, CLOSING = 60.0, 120.0
"""Seconds that the run waits for its trackers at the start, and at the end."""


class _One:
    """One tracker, as its thread sees it."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.sent = 0
        self.open = False


class Trackers:
    """Made when a run's files are cut to `step`, the checkpoint that it goes on from, and open."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        run: str,
        config: Mapping[str, Any],
        step: int,
        make: Callable[[str], Tracker] = lambda name: ADAPTERS[name](),
        opening: float = OPENING,
        closing: float = CLOSING,
    ) -> None:
        """`folder`: the run's output folder, whose files hold the rows; `run`: the run's unique name; `config`: its
        configuration as a document. Opens every tracker, and sends what it lacks up to `step`."""
        self._folder, self._run, self._config, self._make = folder, run, config, make
        self._closing = closing
        self._told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ids = recorded(folder)
        self._all = [_One(name, make(name)) for name in names]
        self._thread = threading.Thread(target=self._serve, name="trackers", daemon=True)
        self._gave_up = False
        if self._all:
            self._thread.start()
            for one in self._all:
                self._put(self._open, one, step)
            # Their libraries greet on standard output, where the bar is about to be.
            with contextlib.redirect_stdout(io.StringIO()):
                self._settle(opening)

    def notices(self) -> list[str]:
        """What a person should be told since the last call: called where a line may be printed."""
        lines = []
        with contextlib.suppress(queue.Empty):
            while True:
                lines.append(self._told.get_nowait())
        return lines

    def kept(self, step: int) -> None:
        """A checkpoint holds everything up to `step`."""
        for one in self._all:
            self._put(self._send, one, step)

    def rewind(self) -> None:
        """The run is about to go back, and to cut its files. Waits for what is being read of them."""
        self._settle(self._closing)

    def rewound(self, step: int) -> None:
        """The files are cut to `step`: a tracker that may hold later steps begins a new run.

        Which one is on record before anything is sent to it, and also for trackers that this session does not use: no
        kill has a later session add to what was given up."""
        sound = {one.name for one in self._all if one.open and one.sent <= step}
        if not (stale := self._ids.keys() - sound):
            return
        for name in stale:
            self._ids[name] = _next(self._ids[name])
        self._write_record()
        for one in self._all:
            if one.name in stale and one.open:
                self._put(self._begin_anew, one, self._ids[one.name], step)

    def finished(self) -> None:
        """The run is complete, and its summary written."""
        paths = [path for name in ARTIFACTS if (path := self._folder / name).is_file()]
        for one in self._all:
            self._put(self._finish, one, paths)

    def close(self) -> None:
        """Have everything arrive, for so long as the run can wait. May be called again."""
        if not self._all:
            return
        for one in self._all:
            self._put(self._close, one, False)
        with contextlib.redirect_stdout(io.StringIO()):
            self._settle(self._closing)
        self._work.put(None)
        self._all = []

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _put(self, act: Callable[..., None], one: _One, *given: Any) -> None:
        """Have the thread call `act`; an exception of whatever kind is one line, and the end of that tracker."""

        def guarded() -> None:
            try:
                act(one, *given)
            except BaseException as error:  # whatever a tracker raises, SystemExit among it, the run goes on
                one.open = False
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._told.put(
                    f"{one.name} gets nothing more of this run ({first:.200}); training goes on, and the same command "
                    "later sends what is missing"
                )

        if not self._gave_up:
            self._work.put(guarded)

    def _settle(self, seconds: float) -> None:
        """Wait until the thread has done all that it was given; give the trackers up where that takes too long."""
        if self._gave_up or not self._thread.is_alive():
            return
        done = threading.Event()
        self._work.put(done.set)
        if not done.wait(seconds):
            self._gave_up = True
            names = " and ".join(one.name for one in self._all)
            self._told.put(
                f"{names} did not answer within {seconds:g} seconds and gets nothing more of this run; training goes "
                "on, and the same command later sends what is missing"
            )
            self._all = []

    # The thread's part

    def _open(self, one: _One, step: int) -> None:
        known = one.name in self._ids
        identity = self._ids.get(one.name, self._run)
        opened = one.tracker.open(self._start(identity, continues=known))
        one.open = True
        if opened.last is None or opened.last > step:
            self._begin_anew(one, _next(identity), step)
            return
        self._record(one, identity)
        one.sent = opened.last if opened.whole is None else opened.whole
        self._told.put(f"tracker   {one.name}: {opened.where}")
        self._send(one, step)

    def _begin_anew(self, one: _One, identity: str, step: int) -> None:
        """Leave the tracker's run as it is, for a new one, which gets everything up to `step`."""
        one.open = False
        one.tracker.close(False)
        one.tracker = self._make(one.name)
        opened = one.tracker.open(self._start(identity, continues=False))
        one.open, one.sent = True, 0
        self._record(one, identity)
        self._told.put(
            f"tracker   {one.name}: a new run, for the old one holds steps that were given up: {opened.where}"
        )
        self._send(one, step)

    def _send(self, one: _One, step: int) -> None:
        if not one.open or step <= one.sent:
            return
        for row in rows(self._folder, one.sent, step):
            one.tracker.send(row)
            one.sent = row.step
        one.sent = step

    def _finish(self, one: _One, paths: Sequence[Path]) -> None:
        if one.open:
            one.tracker.files(paths, "summary")
            self._close(one, True)

    def _close(self, one: _One, finished: bool) -> None:
        if one.open:
            one.open = False
            one.tracker.close(finished)

    def _start(self, identity: str, continues: bool) -> Start:
        return Start(self._folder.resolve().name, identity, self._config, continues)

    def _record(self, one: _One, identity: str) -> None:
        self._ids[one.name] = identity
        self._write_record()

    def _write_record(self) -> None:
        write_json(self._folder / RECORD, marked({"runs": self._ids}))


def recorded(folder: Path) -> dict[str, str]:
    """The ids of a run's runs in trackers, by tracker; none where there is no record that can be read, in which case a
    new run of the tracker is begun, and gets everything."""
    try:
        runs = read_json(folder / RECORD)["runs"]
        return {str(name): str(identity) for name, identity in runs.items() if name in ADAPTERS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _next(identity: str) -> str:
    """The id of a tracker's next run: `a1b2`, `a1b2-2`, `a1b2-3`."""
    base, _, number = identity.partition("-")
    return f"{base}-{int(number or 1) + 1}"
