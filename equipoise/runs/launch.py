"""Starting the processes of a run on this machine, and knowing of oneself whether one is among such. Needs no torch to
be asked."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.errors import UserError
from equipoise.runs.command import TOLD, typed

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

WORLD = "WORLD_SIZE"
VARIABLES = ("RANK", WORLD, "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, and whatever else starts processes for `torch.distributed`, sets in the environment."""
EXIT_LOST_PROCESS = 1
"""Of a process that could not go on without another one."""
REPORT = "EQUIPOISE_EXIT_CODE"
"""A file for rank 0's exit code: a launcher that was interrupted does not learn it otherwise."""
LAUNCHER = "EQUIPOISE_LAUNCHER"
"""The process id of `launch`, for the processes that it starts."""
SHUTDOWN = ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "50")
"""Seconds that processes have after a signal to finish their step and save, before they are killed; torch 2.11 gives
them 30, whatever this says."""
TORCHRUN_SECONDS = 30
"""What torchrun gives them unless it is told otherwise."""
MOST = 8
"""Processes for each core. More would only take turns, and fill the memory."""


def launched() -> bool:
    """Whether this process was started as one of several that work together. Raises UserError where the variables of
    the environment that say so cannot be true."""
    if not all(name in os.environ for name in VARIABLES):
        return False
    remedy = f"start the processes with torchrun, which sets it, or for one process alone unset {WORLD}"
    size = _number(WORLD, 1, 999_999, remedy)
    if size == 1:
        return False
    for name, most in (("RANK", size - 1), ("LOCAL_RANK", size - 1), ("MASTER_PORT", 65535)):
        _number(name, 0, most, remedy)
    return True


def _number(name: str, least: int, most: int, remedy: str) -> int:
    """That variable of the environment, 0 where it is not there. Raises UserError."""
    given = os.environ.get(name, "0")
    if not (given.isascii() and given.isdecimal() and len(given) < 10 and least <= int(given) <= most):
        raise UserError(f"{name} is {given!r:.40} in the environment, and no number from {least} to {most}: {remedy}")
    return int(given)


def is_first() -> bool:
    """Whether this is the process that keeps the files and speaks to the user; so is one that cannot know."""
    try:
        return not launched() or int(os.environ["RANK"]) == 0
    except UserError:
        return True


def report(code: int, alike: bool = True) -> int:
    """Tell the launcher of rank 0's exit code. Returns that of this process: what ends all processes `alike` is rank
    0's to tell, and another one that ended with a code before it would have it killed."""
    if alike and not is_first():
        return 0
    if is_first() and REPORT in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ[REPORT]).write_text(str(code))
    return code


def end_with_launcher(seconds: float = 1.0) -> None:
    """Have this process receive SIGTERM once the `launch` that started it has ended, in whatever way."""
    launcher = os.environ.get(LAUNCHER)
    if launcher != str(os.getppid()):
        return

    def watch() -> None:
        while str(os.getppid()) == launcher:
            time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def launch(command: Sequence[str], processes: int) -> int:
    """Run Python with `command` in so many processes on this machine. Returns rank 0's exit code, or 128 + N where
    signal N killed one; a signal to this process is passed on, and waited for. Raises UserError for a time to shut down
    that is none."""
    import logging

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    logging.disable(logging.CRITICAL)  # what the launcher says of each signal and code
    with tempfile.TemporaryDirectory() as folder, _environment(processes, code := Path(folder) / "code"):
        try:
            api.elastic_launch(_configured(processes), sys.executable)(*command)
        except ChildFailedError as error:
            return _code_of({rank: int(failure.exitcode) for rank, failure in error.failures.items()})
        except SignalException as error:
            return int(code.read_text()) if code.exists() else 128 + int(error.sigval)
        finally:
            logging.disable(logging.NOTSET)
    return 0


def _configured(processes: int) -> "LaunchConfig":
    """The launcher's settings. It takes the time to shut down from the environment."""
    from torch.distributed.launcher.api import LaunchConfig

    _number(SHUTDOWN[0], 0, 999_999, "give seconds")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="equipoise",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        local_addr="localhost",  # by default a name of this machine, which not everywhere leads back to it
    )
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # `nohup`: the run goes on after the terminal is closed
        config.signals_to_handle = "SIGTERM,SIGINT,SIGQUIT"
    return config


def seconds_to_end() -> int:
    """Seconds that processes have to end after a signal, by the environment and torch; where torchrun and `launch`
    differ, torchrun's, which tells nobody of its option. Raises UserError for a number that is none."""
    from torch.distributed.launcher.api import LaunchConfig

    if SHUTDOWN[0] not in os.environ or not hasattr(LaunchConfig, "shutdown_timeout"):
        return TORCHRUN_SECONDS
    return _number(SHUTDOWN[0], 0, 999_999, "give seconds")


def _code_of(codes: Mapping[int, int]) -> int:
    """The exit code for those of the ranks that failed first, said where a signal killed one. What another process
    that is gone makes the others end with says least."""
    rank = min(codes, key=lambda rank: codes[rank] == EXIT_LOST_PROCESS)
    if codes[rank] >= 0:
        return codes[rank]
    print(
        f"equipoise: process {rank} was killed by signal {-codes[rank]}; the same command continues from what was "
        "saved",
        file=sys.stderr,
    )
    return 128 - codes[rank]


@contextlib.contextmanager
def _environment(processes: int, code: Path) -> Iterator[None]:
    """Inside, what the processes take from the environment. Threads, as many as there are cores in all, are equally
    many in each: their number too decides how a CPU rounds sums."""
    before = dict(os.environ)
    os.environ |= {REPORT: str(code), LAUNCHER: str(os.getpid())}
    os.environ.setdefault(TOLD, typed())
    os.environ.setdefault(*SHUTDOWN)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def processes_of(gpus: int | None, processes: int | None) -> int:
    """How many processes the two options ask for; 1 without them. Raises UserError."""
    if gpus is None and processes is None:
        return 1
    if gpus is not None and processes is not None:
        raise UserError("--gpus and --processes say the same thing: give one of them")
    if launched():
        raise UserError("the processes are started already, by torchrun say: leave --gpus and --processes out")
    wanted, option = (gpus, "--gpus") if gpus is not None else (processes, "--processes")
    assert wanted is not None
    if wanted < 1:
        raise UserError(f"{option} {wanted} must be at least 1")
    cores = os.cpu_count() or 1
    if gpus is None and wanted > MOST * cores:
        raise UserError(
            f"{option} {wanted} is too many for the cores of this machine ({cores}): give at most {MOST * cores}"
        )
    if gpus is not None:
        import torch

        count = torch.cuda.device_count()
        if count < gpus:
            found = f"{count} of them: give --gpus {count}" if count else f"none: --processes {gpus} shares the CPU"
            raise UserError(f"--gpus {gpus} was asked for, and of CUDA GPUs PyTorch sees {found}")
    return wanted
