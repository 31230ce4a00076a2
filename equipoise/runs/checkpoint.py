"""Checkpoints that are whole or do not count: safetensors and JSON files in a folder that appears in one rename.

`folder/checkpoint-{step}` holds `{name}.safetensors`, `{name}.json` and, written last, `manifest.json` with the size
and sha256 of every other file. All of it is written into a hidden sibling, synced to the disk, then renamed. A process
killed at any moment therefore leaves either no new checkpoint or a complete one. No pickle is written or read.

Hidden siblings (`.saving-N`, `.replaced-N`, `.deleting-N`) exist only while a process holds `folder/.lock`. The kernel
releases that lock when its holder dies, so whoever gets it knows every hidden sibling to be a leftover; process ids
could not tell, since a restarted container hands out the same ones again.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor

from equipoise.documents import read_json
from equipoise.errors import NonFiniteError, UserError
from equipoise.runs.files import sync_folder
from equipoise.runs.locks import flock
from equipoise.runs.tensors import DTYPES, Deferred, encode, is_finite

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

FORMAT = 1
MANIFEST = "manifest.json"
LOCK_WAIT_S = 600.0

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_TEMPORARY = re.compile(r"\.(deleting|replaced|saving)-([0-9]+)")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says about one file."""

    size: int  # bytes
    sha256: str  # 64 hexadecimal digits


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose files matched its manifest when `newest` opened it."""

    step: int
    path: Path
    files: Mapping[str, FileRecord]

    def tensors(self, name: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The tensors saved under `name`. On the CPU they map the file, which is read as they are touched."""
        return load_file(self._file(f"{name}.safetensors"), device=str(device))

    def document(self, name: str) -> Any:
        """The JSON document saved under `name`; tuples come back as lists."""
        return read_json(self._file(f"{name}.json"))

    def _file(self, file_name: str) -> Path:
        if file_name not in self.files:
            raise UserError(
                f"{self.path} holds no {file_name}, only {', '.join(sorted(self.files))}: "
                f"continue with the version and options that wrote it, or start anew in another folder"
            )
        return self.path / file_name


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor | Deferred]], documents: Mapping[str, Json]
) -> Path:
    """Write `folder/checkpoint-{step}`, replacing a complete one of the same step, and return its path.

    Tensors may be on any device, share memory or be non-contiguous; each travels to the CPU alone, just before its
    bytes are written, so no second copy of the model is made. They must not change during the call: to save in a
    background thread, pass CPU copies.

    Raises NonFiniteError, before anything is written, if a tensor or a document holds a NaN or an infinity; UserError
    if the disk is full or refuses the write. Then no trace of the attempt stays and older checkpoints are as they were.
    """
    assert step >= 0, step
    assert all(_NAME.fullmatch(name) for name in (*tensors, *documents)), [*tensors, *documents]
    assert "manifest" not in documents, "the manifest's name is taken"
    for group, named in tensors.items():
        for name, tensor in named.items():
            assert tensor.dtype in DTYPES, f"{name} of {group} is {tensor.dtype}"
            if not is_finite(tensor):
                raise NonFiniteError(f"tensor {name} of {group} holds a NaN or an infinity; step {step} was not saved")
    for name, document in documents.items():
        _check_document(document, name)
    contents: dict[str, Iterable[bytes | memoryview]] = {
        **{f"{name}.json": [json.dumps(document, allow_nan=False).encode()] for name, document in documents.items()},
        **{f"{name}.safetensors": encode(named) for name, named in tensors.items()},  # lazily, while written
    }
    needed = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())

    target, saving, replaced = (folder / f"{kind}-{step}" for kind in ("checkpoint", ".saving", ".replaced"))
    with _explained(f"cannot save {target}", folder, needed), _only_writer(folder):
        saving.mkdir()
        files = {name: asdict(_write(saving / name, chunks)) for name, chunks in contents.items()}
        manifest = {"format": FORMAT, "step": step, "torch": str(torch.__version__), "files": files}
        _write(saving / MANIFEST, [json.dumps(manifest, indent=1).encode()])
        sync_folder(saving)
        if _is_ours(target):
            target.rename(replaced)
        elif os.path.lexists(target):
            _set_aside(target)
        saving.rename(target)
        sync_folder(folder)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder (those with a manifest) by step; none if there is no such folder."""
    return [path for path in _candidates(folder) if _is_complete(path)]


def newest(folder: Path) -> Checkpoint | None:
    """The complete checkpoint of the highest step, every file compared with its sha256; None where there is none.

    Incomplete ones are passed over with a logged warning, and what an interrupted save left is cleared. A complete one
    that is damaged raises UserError, naming the newest intact one before it: falling back unasked would lose steps.
    """
    with _explained(f"cannot open the newest checkpoint in {folder}", folder):
        if _temporaries(folder):
            # A reader without the right to write, or beside a running save, leaves them alone.
            with contextlib.suppress(OSError), _only_writer(folder, wait=False):
                pass
        for path in _candidates(folder):
            if not _is_complete(path):
                log.warning("%s is incomplete (it has no %s) and is passed over", path, MANIFEST)
        complete = list_checkpoints(folder)
        if not complete:
            return None
        last = _open_verified(complete[-1])
        if isinstance(last, Checkpoint):
            return last
        older = next((path for path in reversed(complete[:-1]) if isinstance(_open_verified(path), Checkpoint)), None)
    rerun = f"continue from {older.name}" if older else "start anew, or restore it from a backup"
    raise UserError(f"{last}: move {complete[-1]} away and rerun to {rerun}")


def at_step(folder: Path, step: int) -> Checkpoint | None:
    """The complete checkpoint of that step, verified as `newest` does; None where there is none. Raises UserError."""
    path = folder / f"checkpoint-{step}"
    if not _is_complete(path):
        return None
    with _explained(f"cannot open {path}", folder):
        found = _open_verified(path)
    if isinstance(found, Checkpoint):
        return found
    raise UserError(f"{found}: move {path} away and rerun to do without it")


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, verified as `newest` does. Raises UserError."""
    if not _CHECKPOINT.fullmatch(path.resolve().name):
        raise UserError(f"{path} is not named as a checkpoint is: give it its name checkpoint-STEP again")
    with _explained(f"cannot open {path}", path):
        found = _open_verified(path.resolve())
    if isinstance(found, Checkpoint):
        return found
    raise UserError(f"{found}: restore it, or name another checkpoint")


def discard_after(folder: Path, step: int) -> None:
    """Take the checkpoints of later steps away, as the run has gone back: those that are wholly ours are deleted, any
    other gets another name."""
    with _explained(f"cannot delete checkpoints in {folder}", folder):
        later = [path for path in list_checkpoints(folder) if _step(path) > step]
        _delete(folder, [path for path in later if _is_ours(path)])
        for path in later:
            if os.path.lexists(path):
                _set_aside(path)


def discard_all(folder: Path) -> None:
    """`discard_after` of every checkpoint: the run starts anew."""
    discard_after(folder, -1)


def prune(folder: Path, keep_last: int, keep_every: int, keep: Collection[int] = ()) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints, multiples of `keep_every` (0: none), and the steps in `keep`;
    return the deleted.

    The newest always stays, and so does a folder with anything in it that no save wrote. Each loses its name before its
    first file, so a kill leaves no half checkpoint.
    """
    assert keep_last >= 0 and keep_every >= 0, (keep_last, keep_every)
    with _explained(f"cannot delete old checkpoints in {folder}", folder):
        older = list_checkpoints(folder)[: -max(keep_last, 1)]
        doomed = [path for path in older if not (keep_every and _step(path) % keep_every == 0)]
        doomed = [path for path in doomed if _step(path) not in keep and _is_ours(path)]
        _delete(folder, doomed)
    return doomed


def _delete(folder: Path, doomed: Sequence[Path]) -> None:
    if doomed:
        with _only_writer(folder):
            for path in doomed:
                path.rename(folder / f".deleting-{_step(path)}")
            sync_folder(folder)


# Verifying


def _open_verified(path: Path) -> Checkpoint | str:
    """The checkpoint, or in words which of its files is damaged and how."""
    try:
        files = _read_manifest(path)
    except ValueError as error:  # not JSON, not UTF-8, or not a manifest
        return f"{path / MANIFEST} is damaged or of another version ({str(error).splitlines()[0]})"
    for name, record in files.items():
        file = path / name
        # lstat, so that neither a link nor a pipe is opened in place of the file that was saved.
        if not os.path.lexists(file) or not stat.S_ISREG(file.lstat().st_mode):
            return f"{file} is missing"
        if file.lstat().st_size != record.size:
            return f"{file} is damaged ({file.lstat().st_size} bytes, {record.size} were written)"
    for name, record in files.items():
        with (path / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != record.sha256:
                return f"{path / name} is damaged (its sha256 is not the one in {MANIFEST})"
    return Checkpoint(_step(path), path, files)


def _read_manifest(path: Path) -> dict[str, FileRecord]:
    """The manifest's file records; ValueError says what is wrong with it."""
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("not a checkpoint's manifest")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"format {manifest.get('format')!r}, this version of equipoise reads {FORMAT}")
    if manifest.get("step") != _step(path):
        raise ValueError(f"it belongs to step {manifest.get('step')!r}")
    files = {}
    for name, record in manifest["files"].items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"it names {name!r}, which is not a file of this folder")
        if not isinstance(record, dict) or not isinstance(record.get("size"), int) or "sha256" not in record:
            raise ValueError(f"no size and sha256 for {name}")
        files[name] = FileRecord(record["size"], record["sha256"])
    return files


def _candidates(folder: Path) -> list[Path]:
    """Everything in the folder that has a checkpoint's name, complete or not, by step."""
    names = os.listdir(folder) if folder.exists() else []
    return sorted((folder / name for name in names if _CHECKPOINT.fullmatch(name)), key=_step)


def _is_complete(path: Path) -> bool:
    return os.path.lexists(path / MANIFEST)


def _is_ours(path: Path) -> bool:
    """Whether a save wrote the folder and all that is in it, damaged as it may be."""
    try:
        return not path.is_symlink() and set(os.listdir(path)) == {MANIFEST, *_read_manifest(path)}
    except (OSError, ValueError):
        return False


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


# Writing


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write and sync a new file, hashing on the way: what is recorded is what was meant, not what the disk returns."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=1 << 20) as stream:
        for chunk in chunks:
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(size, digest.hexdigest())


def _check_document(value: Json, where: str) -> None:
    """Refuse what JSON would not bring back: a non-finite float, a key that is not a string."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            assert isinstance(key, str), f"{where}: JSON would turn the key {key!r} into a string"
            _check_document(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_document(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise NonFiniteError(f"document {where} is {value}; nothing was saved")


# The folder


@contextlib.contextmanager
def _only_writer(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the folder's lock. Leftovers of the dead are cleared on entry, one's own on exit, however it comes about."""
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        _wait_for(lock, folder, LOCK_WAIT_S if wait else 0.0)
        for leftover in _temporaries(folder):
            log.warning("%s was left by an interrupted save; it is cleared", leftover)
        _clear(folder)
        try:
            yield
        finally:
            _clear(folder)
    finally:
        with contextlib.suppress(OSError):  # explicitly, as a child forked meanwhile holds a copy of the descriptor
            fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _wait_for(lock: int, folder: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return flock(lock, folder)
        except BlockingIOError:
            if not wait_s:
                raise
            if time.monotonic() >= deadline:
                waited = f"another process has been writing checkpoints in {folder} for {wait_s:.0f} s"
                raise UserError(f"{waited}: stop it, or give this run a folder of its own") from None
            time.sleep(0.05)


def _temporaries(folder: Path) -> list[Path]:
    """Hidden siblings in an order that `_clear` can follow: `.deleting-N` goes before another takes its name."""
    names = os.listdir(folder) if folder.exists() else []
    return [folder / name for name in sorted(names) if _TEMPORARY.fullmatch(name)]


def _clear(folder: Path) -> None:
    """Restore a checkpoint whose replacement did not come, delete every other hidden sibling. Needs the lock."""
    for path in _temporaries(folder):
        kind, step = path.name[1:].split("-")
        target = folder / f"checkpoint-{step}"
        if kind == "replaced" and not os.path.lexists(target):
            path.rename(target)
            continue
        if kind == "replaced":  # never half deleted under this name, or a later `_clear` might restore it
            path = path.rename(folder / f".deleting-{step}")
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)


def _set_aside(path: Path) -> None:
    """Give way to a new checkpoint without deleting what is not ours: half a copy, another trainer's folder."""
    names = (path.with_name(f"incomplete-{path.name}-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    log.warning("%s holds what no save here wrote, or not all of it; it is now %s", path, aside)


@contextlib.contextmanager
def _explained(failure: str, folder: Path, needed: int = 0) -> Iterator[None]:
    """Turn the system's refusal into one line with a remedy; `needed` is in bytes."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"it needs {needed / 1e6:,.1f} MB; free some disk space or choose another folder"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = f"get the right to read and write {folder}, or choose another folder"
        else:
            remedy = f"check {folder} and its disk, or choose another folder"
        cause = error.strerror or type(error).__name__
        raise UserError(f"{failure} ({cause}): {remedy}; older checkpoints were not touched") from error
