"""Several processes that work together, as forks of the test process: real ones, and torch is imported already."""

import errno
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from equipoise.runs.ranks import Ranks, joined
from tests.killing import exit_code, in_child, kill_before

SECONDS = 100
"""After which a rank that still waits is ended, so that a test fails and does not hang."""


def rank() -> int:
    """Which rank this process is; 0 alone."""
    return int(os.environ.get("RANK", 0))


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def read_only(folder: Path) -> None:
    """From now on, and until this process ends, nothing in the folder can be changed by it, whoever it is."""
    place = str(folder)

    def refuse(event: str, given: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & WRITES):
            path = os.fsdecode(given[0]) if isinstance(given[0], str | bytes | os.PathLike) else ""
            if path.startswith(place):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    sys.addaudithook(refuse)


def only_first_has_disk(folder: Path) -> None:
    """On the other ranks, nothing in the folder can be changed."""
    if rank():
        read_only(folder)


def start(size: int, work: Callable[[], int], kill_at: Mapping[int, int] | None = None) -> list[int]:
    """The process ids of ranks 0, 1, … that do `work`. A rank in `kill_at` is killed before that call of its own, once
    they have met."""
    meeting = Path(tempfile.mkdtemp()) / "meeting"

    def member(number: int) -> Callable[[], int]:
        def run() -> int:
            signal.alarm(SECONDS)
            if size > 1:
                os.environ |= {"RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_RANK": str(number)}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # not used: they meet at a file
                dist.init_process_group(
                    "gloo", init_method=f"file://{meeting}", rank=number, world_size=size, timeout=timedelta(minutes=2)
                )
            if kill_at is not None and number in kill_at:
                kill_before(kill_at[number])
            return work()

        return run

    return [in_child(member(number)) for number in range(size)]


def codes(children: list[int]) -> list[int]:
    """How the ranks ended: see `exit_code`."""
    return [exit_code(child) for child in children]


def together(size: int, work: Callable[[], int], kill_at: Mapping[int, int] | None = None) -> list[int]:
    """`work` on so many ranks, to its end; their exit codes."""
    return codes(start(size, work, kill_at))


def with_ranks(size: int, work: Callable[[Ranks], object]) -> None:
    """The same for what takes the `Ranks`, and fails by raising."""

    def run() -> int:
        with joined() as ranks:
            work(ranks)
        return 0

    assert together(size, run) == [0] * size
