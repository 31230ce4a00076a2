"""A report given to the trackers that a run was followed by."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from equipoise.errors import UserError
from equipoise.ppo.tracking.tracker import Start, Tracker, check_installed
from equipoise.ppo.tracking.trackers import ADAPTERS, recorded


def check_followed(folders: Iterable[Path]) -> None:
    """Raises UserError where a run was followed by no tracker, or one's package is missing."""
    folders = list(folders)
    if not folders:
        raise UserError("--track gives the report to the trackers of a run: name the run's folder with --run")
    for folder in folders:
        if not (ids := recorded(folder)):
            raise UserError(f"{folder} names no tracker (trackers.json): train with --track first")
        check_installed(list(ids))


def attach(folder: Path, report: Path, make: Callable[[str], Tracker] = lambda name: ADAPTERS[name]()) -> Iterator[str]:
    """Give the report to each tracker of the run in `folder`. Yields a line for each, also where it fails."""
    for name, identity in recorded(folder).items():
        tracker = make(name)
        try:
            where = tracker.open(Start(folder.resolve().name, identity, {}, continues=True)).where
            tracker.files([report], "report")
            tracker.close(True)
            yield f"{report.name} is with {name}: {where}"
        except Exception as error:  # the report is written, and stays
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            yield f"{name} did not get {report.name} ({first:.200}): run the same command again, or add it there"
