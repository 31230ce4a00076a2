"""The files of a sweep beside those of its runs: whether they are its own, and how they are written and deleted."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.errors import UserError
from equipoise.ppo.sweep_table import TABLES
from equipoise.runs.files import unwritable, write_file, write_json
from equipoise.runs.ownership import OWNER, look, marked

RESULT = "result.json"
"""In the folder of a run that is finished: what was measured of it."""
OPTIONS, TASK, LOG = "options.yaml", "sweep-task.yaml", "log.txt"
"""In the folder of a run that is a process of its own: what it is given, and what it prints."""
MARK = "# written by equipoise sweep\n"
"""The first line of what is given."""
_CHECKPOINTS = re.compile(r"checkpoint-[0-9]+|nonfinite")
_OWN = {OWNER, ".lock"}
"""What else training leaves among its checkpoints."""


class Given(NamedTuple):
    """What a run that is a process of its own reads."""

    options: str
    task: str


def check_tables(folder: Path) -> None:
    """Raises UserError where anything but a sweep's tables lies where they would be written. Writes nothing."""
    record = look(folder / "sweep.json", lambda document: set(document) == {"settings", "runs"})
    foreign = [] if record.state in ("absent", "ours") else ["sweep.json"]
    for name, header in TABLES.items():
        if os.path.lexists(folder / name) and (record.state == "absent" or not _begins(folder / name, header)):
            foreign.append(name)
    if foreign:
        raise UserError(_not_ours(folder / foreign[0]))


def check_run(folder: Path, given: Given | None) -> None:
    """The same for the files of a run; `given` where it is a process of its own."""
    read_result(folder)
    if given is None:
        return
    begun = True
    for name, text in ((OPTIONS, given.options), (TASK, given.task)):
        path = folder / name
        there = os.path.lexists(path)
        # An earlier version wrote the same without its mark.
        if there and not (_begins(path, MARK) or _holds(path, text)):
            raise UserError(_not_ours(path))
        begun = begun and there
    log = folder / LOG
    if os.path.lexists(log) and (not begun or log.is_symlink() or not log.is_file()):
        raise UserError(_not_ours(log))


def _not_ours(path: Path) -> str:
    return (
        f"{path} is there and equipoise sweep did not write it as it is: move it away, or choose another --output-dir"
    )


def read_result(folder: Path) -> dict[str, Any] | None:
    """What was measured of a finished run; None where it is not finished. Raises UserError for what is no result."""
    found = look(folder / RESULT, _is_result, b'{"setting":')
    if found.state == "absent":
        return None
    if found.state != "ours" or not _is_result(found.document):
        raise UserError(
            f"{folder / RESULT} cannot be read, damaged or somebody else's as it is: delete it to have the run "
            "measured again, or choose another --output-dir"
        )
    found.document.pop("written_by", None)
    return found.document


def _is_result(document: Mapping[str, Any]) -> bool:
    mappings = all(isinstance(document.get(name), Mapping) for name in ("values", "summary", "config"))
    return mappings and {"setting", "seed", "steps"} <= set(document)


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Raises UserError."""
    write_json(folder / RESULT, marked(result))


def write_given(folder: Path, given: Given) -> tuple[Path, Path]:
    """Write what a run reads, and say where. Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / OPTIONS, folder / TASK
    for path, text in zip(paths, given, strict=True):
        write_file(path, MARK + text)
    return paths


def write_task(folder: Path, text: str) -> Path:
    """Write the task of the whole sweep, and say where. Raises UserError, also where another file lies there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TASK
    if os.path.lexists(path) and not _begins(path, MARK):
        raise UserError(_not_ours(path))
    if not _holds(path, MARK + text):
        write_file(path, MARK + text)
    return path


def open_log(folder: Path) -> int:
    """A descriptor that appends to the run's log, never through a link. Raises UserError."""
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(folder / LOG, flags, 0o666)
    except OSError as error:
        raise unwritable(folder / LOG, error) from error


def delete_checkpoints(folder: Path) -> None:
    """Delete a run's checkpoints, and the folder if nothing else is in it. A link is no folder of checkpoints."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if _CHECKPOINTS.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    if set(os.listdir(folder)) <= _OWN:
        shutil.rmtree(folder, ignore_errors=True)


def write_tables(folder: Path, tables: Mapping[str, str], record: Mapping[str, Any]) -> None:
    """The tables, and sweep.json, which says first of all that they are a sweep's. Raises UserError."""
    write_json(folder / "sweep.json", marked(record))
    for name, text in tables.items():
        write_file(folder / name, text)


def _begins(path: Path, start: str) -> bool:
    """Whether it is a file, no link, that begins so."""
    return _read(path, len(start.encode())) == start.encode()


def _holds(path: Path, text: str) -> bool:
    return _read(path, len(text.encode()) + 1) == text.encode()


def _read(path: Path, size: int) -> bytes | None:
    if path.is_symlink() or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): choose another --output-dir") from None
