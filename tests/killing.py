"""Processes that are killed for real, at a point that the test chooses: before the n-th call in this project's code.

Which call that is does not depend on time, so a busy machine changes nothing. Calls of Python functions count, and so
do those of functions in C, of which are all that write, sync, rename and delete.
"""

import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

PACKAGE = f"{os.sep}equipoise{os.sep}"


def _on_call(act: Callable[[], None]) -> None:
    """Have `act` called before every call that code of the package makes, in this thread."""

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_call") and PACKAGE in frame.f_code.co_filename:
            act()

    sys.setprofile(profile)


def counted(work: Callable[[], int]) -> int:
    """How many calls `work` takes in a child of this process, which has what this one keeps in memory."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    def measured() -> int:
        os.close(reader)
        _on_call(count)
        code = work()
        sys.setprofile(None)
        os.write(writer, str(calls).encode())
        return code

    reader, writer = os.pipe()
    child = in_child(measured)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = pipe.read()
    assert exit_code(child) == 0
    return int(found)


def kill_before(call: int) -> None:
    """Have this process killed before its `call`-th call from now on."""
    left = call

    def count() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _on_call(count)


def in_child(work: Callable[[], int], kill_at: int | None = None) -> int:
    """The process id of a fork that does `work` and exits with what it returns: real, and torch is imported already.
    It is killed before its `kill_at`-th call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads; none is at work here
        child = os.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup` it is ignored, which a run respects
        code = 99
        try:
            if kill_at is not None:
                kill_before(kill_at)
            code = work()
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    """Of a child that has ended or soon will; −N where signal N killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_until_done(work: Callable[[], int], whole: int, draw: random.Random, most: int = 12) -> int:
    """Run `work` again and again, killed before a call drawn from the first quarter of the `whole` that it takes
    uninterrupted, which makes three kills at least, `most` of them at most, and then to its end; how many it was."""
    for kills in range(most):
        code = exit_code(in_child(work, draw.randrange(whole // 20, whole // 4)))
        if code == 0:
            return kills
        assert code == -signal.SIGKILL, code
    assert exit_code(in_child(work)) == 0
    return most


@contextmanager
def command(arguments: list[str], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """A started command with pipes for what it says, which does not outlive the block, however that ends."""
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()
