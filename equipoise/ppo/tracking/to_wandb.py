"""Weights & Biases. Its own variables say where: WANDB_MODE (offline), WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR."""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from equipoise.ppo.tracking.tracker import Opened, Row, Start, cell, columns

PROJECT = "equipoise"


class ToWandb:
    def __init__(self) -> None:
        self._run: Any = None

    def open(self, start: Start) -> Opened:
        import wandb

        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
        # Without this it would ask for a key, and a run at a terminal would wait for the answer.
        if not offline and not wandb.login(prompt=False):
            raise RuntimeError("it has no API key: run `wandb login`, or set WANDB_MODE=offline")
        self._run = run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=start.name,
            id=start.id,
            resume="allow",
            reinit="create_new",
            config=dict(start.config),
            settings=settings,
        )
        run.config.update(dict(start.config), allow_val_change=True)
        if run.offline:
            folder = Path(run.settings.wandb_dir)
            return Opened(_last_written(folder, start.id) if start.continues else 0, f"offline, {folder}")
        return Opened(run.step - 1 if run.step else 0, str(run.url))

    def send(self, row: Row) -> None:
        logged: dict[str, Any] = dict(row.values)
        if row.samples:
            import wandb

            names = columns(row.samples)
            data = [[cell(sample.get(name)) for name in names] for sample in row.samples]
            logged["samples"] = wandb.Table(columns=names, data=data, allow_mixed_types=True)
        self._run.log(logged, step=row.step)

    def files(self, paths: Sequence[Path], kind: str) -> None:
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self._run.id}", type=kind)
        for path in paths:
            artifact.add_file(str(path), name=path.name)
        self._run.log_artifact(artifact)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def _last_written(folder: Path, run: str) -> int | None:
    """The last step in the files that offline runs of this id left, 0 for none; None where they cannot be read.

    What was logged before a kill need not have been written, and only the files tell.
    """
    last = 0
    try:
        for path in folder.glob(f"*run-*-{run}/*.wandb"):
            last = max([last, *logged_steps(path)])
    except (OSError, ImportError, ValueError, struct.error):
        return None
    return last


def logged_steps(path: Path) -> Iterator[int]:
    """The steps of the rows in a .wandb file, up to where it was cut short."""
    from wandb.proto import wandb_internal_pb2

    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            yield int(record.history.step.num)


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after W&B's own seven bytes: blocks of 32 KiB that hold pieces,
    each with checksum, length and kind (1 whole, 2 first, 3 middle, 4 last)."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind == 0 or place + 7 + length > len(data):
            return
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""
