"""The completions file: one CSV row per (occupation, run), safe against being killed at any byte.

Columns `Model,Occupation,RunID,Text,WordCount,Label`, RFC 4180, UTF-8; in a comparison of methods also `Method,Seed`:

- Model: which model wrote the sentence (its folder's name, or its Hub id).
- RunID: 1 to n within each occupation.
- Occupation: as the task names it.
- Text: the task's sentence, such as `The X was …`, as it is. It may begin with `=` or hold anything else that a
  spreadsheet would run; a copy meant for one has to be made safe first.
- WordCount: words between white space, the prefix included.
- Label: the method (`RLHF`, `Prompt-Only`, …), as in the public study's files; what a sentence holds follows from Text.
- Method, Seed: the method by its name on the command line, and the seed of its random numbers.

Beside `NAME.csv` lies `NAME.csv.json`, the record: the settings every row was made with, the whole task among them, and
on what machine.
"""

import contextlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from equipoise.errors import UserError
from equipoise.protocol.difference import apart
from equipoise.protocol.plural import plural
from equipoise.protocol.prompts import word_count
from equipoise.protocol.task import Task
from equipoise.runs.files import write_whole
from equipoise.runs.locks import flock
from equipoise.runs.ownership import look, marked
from equipoise.runs.records import task_on_record
from equipoise.runs.rows import Parsed, parse, serialise

COLUMNS = ("Model", "Occupation", "RunID", "Text", "WordCount", "Label")
COMPARED = (*COLUMNS, "Method", "Seed")
"""The columns of a file that stands beside other methods' in a comparison."""


class Key(NamedTuple):
    """What a row is of: the `run_id`-th sentence, counted from 1, of an occupation."""

    occupation: str
    run_id: int


def all_keys(n: int, occupations: Sequence[str]) -> list[Key]:
    """n keys of each occupation, every occupation's first run before any second: a file that was cut short is
    balanced."""
    return [Key(occupation, run_id) for run_id in range(1, n + 1) for occupation in occupations]


class Completions:
    """An open completions file. `texts` holds what is in it; nothing on disk changes before `start`.

    While it is open no other process can write the file. Use as a context manager.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        task: Task,
        n: int,
        overwrite: bool = False,
        columns: Sequence[str] = COLUMNS,
        part: Mapping[str, int] | None = None,
    ) -> None:
        """`settings` decide the rows (JSON values); those named as a column fill it: `Model`, `Label` and so on.
        `part`: which rows of a whole file are to be in it, for the record.

        Raises UserError for a file that cannot be written, that this program did not write, whose rows were made with
        other settings, for another task, or changed by hand, or that holds runs beyond `n`. `overwrite` gives up rows
        that this program wrote, but never a file with other columns.
        """
        self.path = path
        self.task = task
        self.settings = {**settings, "task": task.document()}
        self.columns = tuple(columns)
        self._constant = {name: str(settings[name]) for name in columns if name in settings}
        self._header = serialise([self.columns])
        self.texts: dict[Key, str] = {}
        self.repaired = 0
        """Bytes of a half-written row at the end, which `start` removes."""
        self._part = dict(part) if part else None
        self._record_path = _record_path(path)
        of_part = {"part": self._part} if self._part else {}
        self._record: dict[str, Any] = marked({"settings": self.settings, **of_part, "made_with": []})
        self._kept = 0
        self._file: io.FileIO | None = None
        try:
            if path.is_symlink():
                raise UserError(
                    f"{path} is a link, and nothing is written through one: give --output {os.path.realpath(path)}"
                )
            self._check_folder()
            recorded = read_record(path)
            if self.path.exists():
                self._read(n, overwrite, recorded)
        except UserError:
            self.close()
            raise

    def __enter__(self) -> "Completions":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()  # the lock goes with it
            self._file = None

    def _check_folder(self) -> None:
        folder = next(folder for folder in self.path.parents if folder.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise UserError(
                f"cannot write {self.path}, because {folder} is not a writable folder: choose another --output"
            )

    def _read(self, n: int, overwrite: bool, recorded: dict[str, Any] | None) -> None:
        if not self.path.is_file():
            raise UserError(f"{self.path} is not a file: choose another --output")
        self._open("r+")
        assert self._file is not None
        data = self._file.readall()
        try:
            parsed = parse(data)
        except ValueError as error:
            raise self._foreign(f"it is not a CSV in UTF-8 ({error})") from None
        if not parsed.rows:  # at most a part of the header
            if data and not (recorded and self._header.startswith(data)):
                raise self._foreign("it has no complete line")
            return
        if tuple(parsed.rows[0]) != self.columns:
            raise self._foreign(f"its columns are {','.join(parsed.rows[0])[:80]!r}")
        if not recorded:
            raise UserError(
                f"{self.path} has no {self._record_path.name} beside it that says how it was made, so it is left as "
                "it is, also with --overwrite: move it away, or choose another --output"
            )
        if overwrite or len(parsed.rows) == 1:  # nothing to continue
            return
        self._compare(recorded["settings"])
        self._compare_part(recorded.get("part"))
        self.texts = self._checked(parsed, n)
        self._record = recorded | ({"part": self._part} if self._part else {})  # of more rows perhaps
        self._kept, self.repaired = parsed.size, len(data) - parsed.size

    def _foreign(self, reason: str) -> UserError:
        return UserError(
            f"{self.path} is not a completions file: {reason}. It is left as it is: move it away, "
            "or choose another --output"
        )

    def _compare(self, recorded: Mapping[str, Any]) -> None:
        # Files of before prompts were fingerprinted are continued: their other settings tell them apart.
        beside = {"task"} if "prompts" in recorded else {"task", "prompts", "prompt_date"}
        old, new = ({k: v for k, v in each.items() if k not in beside} for each in (recorded, self.settings))
        unlike = [k for k in old | new if old.get(k) != new.get(k)]
        changed = [f"{k}: {apart(str(old.get(k)), str(new.get(k)))}" for k in unlike]
        changed += task_on_record(recorded, str(self._record_path)).differences(self.task)
        if changed:
            raise UserError(
                f"{self.path} was made with other settings ({'; '.join(changed)}): use the same to continue it, "
                "another --output for a new file, or --overwrite to start anew"
            )

    def _compare_part(self, recorded: Any) -> None:
        """Raises UserError where the file is another part, or where its rows are dealt out in other batches."""
        known = recorded if isinstance(recorded, dict) else {}
        old, new = ({k: v for k, v in each.items() if k != "n"} for each in (known, self._part or {}))
        if old != new:
            was = (
                f"part {old.get('number')}/{old.get('of')} with --batch-size {old.get('batch_size')}"
                if old
                else "whole"
            )
            raise UserError(
                f"{self.path} was written as {was}: use the same --part and --batch-size to continue it, another "
                "--output for a new file, or --overwrite to start anew"
            )

    def _checked(self, parsed: Parsed, n: int) -> dict[Key, str]:
        """The texts by key. Being killed leaves no complete row that is wrong, so such a row was changed by hand."""
        texts: dict[Key, str] = {}
        line_of: dict[Key, int] = {}
        for row, line in zip(parsed.rows[1:], parsed.lines[1:], strict=True):
            key, problem = self._key(row)
            if key is None or problem:
                raise UserError(
                    f"line {line} of {self.path} is not as it was written ({problem}): restore it, delete that row, "
                    "or start anew with --overwrite"
                )
            if key in texts:
                raise UserError(
                    f"lines {line_of[key]} and {line} of {self.path} are both {key.occupation} {key.run_id}: "
                    "delete one, or start anew with --overwrite"
                )
            if key.run_id > n:
                raise UserError(
                    f"{self.path} has runs beyond --n {n} (line {line}: {key.occupation} {key.run_id}): ask for at "
                    "least as many, or choose another --output"
                )
            texts[key], line_of[key] = row[self.columns.index("Text")], line
        return texts

    def _key(self, row: Sequence[str]) -> tuple[Key | None, str]:
        """The row's key, and what is wrong with the row if anything is."""
        if len(row) != len(self.columns):
            return None, f"it has {len(row)} fields, not {len(self.columns)}"
        fields = dict(zip(self.columns, row, strict=True))
        occupation, run_id, text, words = (fields[name] for name in ("Occupation", "RunID", "Text", "WordCount"))
        if occupation not in self.task.names or not re.fullmatch("[1-9][0-9]{0,8}", run_id):
            return None, f"{occupation[:20]!r} {run_id[:20]!r} is no occupation with a number"
        if any(fields[name] != value for name, value in self._constant.items()):
            return None, f"another {' or '.join(self._constant)}"
        if words != str(word_count(text)):
            return None, f"its WordCount is {words[:20]}, but the text has {plural(word_count(text), 'word')}"
        return Key(occupation, int(run_id)), ""

    def start(self, made_with: Mapping[str, Any]) -> None:
        """Make the file ready for `append`: new with its header, or without the half row at its end.

        `made_with` (JSON values) is added to the record unless it equals the last entry. Raises UserError if the disk
        is full or the folder cannot be written.
        """
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._open("x+")
            assert self._file is not None
            # The order matters: rows never stand beside a record of other settings, wherever this is cut short.
            self._file.truncate(self._kept)
            if made_with not in self._record["made_with"][-1:]:
                self._record["made_with"].append(dict(made_with))
            document = json.dumps(self._record, indent=1, ensure_ascii=False) + "\n"
            write_whole(self._record_path, document.encode())
            self._file.seek(0, os.SEEK_END)
            if self._kept == 0:
                self._write(self._header)
        except OSError as error:
            raise self._cannot_write(error) from None

    def append(self, texts: Mapping[Key, str]) -> None:
        """Add rows in one write, on the disk when this returns. Raises UserError, with no half row left behind."""
        assert self._file is not None and not self.texts.keys() & texts.keys()
        size = self._file.tell()
        try:
            self._write(serialise(self._row(key, text) for key, text in texts.items()))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
                self._file.seek(size)
            raise self._cannot_write(error) from None
        self.texts |= texts

    def finish(self) -> None:
        """Put the rows in the task's order of occupations, then by RunID, by replacing the file as a whole."""
        assert self._file is not None
        place = {occupation: i for i, occupation in enumerate(self.task.names)}
        order = sorted(self.texts, key=lambda key: (place[key.occupation], key.run_id))
        data = self._header + serialise(self._row(key, self.texts[key]) for key in order)
        self._file.seek(0)
        if self._file.readall() == data:
            return
        try:
            write_whole(self.path, data)
        except OSError as error:
            raise self._cannot_write(error) from None
        self.close()
        with contextlib.suppress(UserError):  # the new file is to be locked too; all rows are in it, whoever has it
            self._open("r+")

    def _row(self, key: Key, text: str) -> tuple[object, ...]:
        fields = self._constant | {
            "Occupation": key.occupation,
            "RunID": str(key.run_id),
            "Text": text,
            "WordCount": str(word_count(text)),
        }
        return tuple(fields[name] for name in self.columns)

    def _open(self, mode: Literal["r+", "x+"]) -> None:
        """Open the file and lock it: the very one that has the name, as another process may be replacing it."""
        create = os.O_CREAT | os.O_EXCL if mode == "x+" else 0
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | create, 0o666)
            self._file = io.FileIO(descriptor, "r+")
            flock(descriptor, self.path.parent)
            if not os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                raise BlockingIOError
        except (BlockingIOError, FileExistsError, FileNotFoundError):
            raise UserError(
                f"another process is writing {self.path}: wait for it, or choose another --output"
            ) from None
        except OSError as error:
            raise self._cannot_write(error) from None

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        os.fsync(self._file.fileno())

    def _cannot_write(self, error: OSError) -> UserError:
        kept = f"; the {len(self.texts)} rows in it are safe, and the same command continues" if self.texts else ""
        return UserError(
            f"cannot write {self.path} ({error.strerror}): free some space or choose another --output{kept}"
        )


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of the completions file `path`, or None if there is none. Raises UserError for what is not ours, and
    for one that is damaged."""
    found = look(_record_path(path), _is_record, b'{"settings":{')
    if found.state == "absent":
        return None
    if found.state == "ours" and _has_members(found.document):
        return found.document
    raise UserError(
        f"{_record_path(path).name} beside {path} is damaged or somebody else's, so nothing says how the file was "
        "made, and both are left as they are, also with --overwrite: restore it, move both away, or choose another "
        "--output"
    )


def _has_members(document: Mapping[str, Any]) -> bool:
    return isinstance(document.get("settings"), dict) and isinstance(document.get("made_with"), list)


def _is_record(document: Mapping[str, Any]) -> bool:
    """The exact shape of a record before records were marked."""
    if set(document) != {"settings", "made_with"} or not _has_members(document):
        return False
    entries = all(isinstance(each, dict) for each in document["made_with"])
    return entries and {"Model", "Label"} <= set(document["settings"])
