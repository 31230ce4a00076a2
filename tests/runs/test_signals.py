"""Stop signals, sent for real to real processes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from equipoise.runs.signals import StopSignals

ROOT = Path(__file__).parents[2]

# Says it is ready, waits for its stop signal, says "saved" and exits with the documented code.
RUN = """
import os, signal, sys
from equipoise.runs.signals import StopSignals
came, told = os.pipe()
os.set_blocking(told, False)
signal.set_wakeup_fd(told)
with StopSignals() as stop:
    print("ready", os.getpid(), flush=True)
    while not stop.received:
        os.read(came, 1)  # a byte for every signal
    os.read(0, 1)  # until the test closes its end; a signal alone does not end it
    print("saved", stop.received.name, flush=True)
    sys.exit(stop.exit_code)
"""


STARTED: list[tuple[subprocess.Popen[str], int]] = []


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    yield
    while STARTED:
        process, run = STARTED.pop()
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(run, signal.SIGKILL)
            process.wait()


def heard() -> None:
    """Hangups reach what is started, as from a terminal, also where the tests run under `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(*prefix: str, stderr: int = subprocess.PIPE) -> tuple[subprocess.Popen[str], int]:
    """The started process, once it handles signals, and the process id of the run in it."""
    command = [*prefix, sys.executable, "-c", RUN]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
        preexec_fn=heard,
    )  # fmt: skip
    assert process.stdout
    STARTED.append((process, process.pid))
    line = process.stdout.readline().split()
    assert line[0] == "ready"
    STARTED.append((process, int(line[1])))
    return process, int(line[1])


def send_and_read_notice(process: subprocess.Popen[str], run: int, number: signal.Signals) -> str:
    os.kill(run, number)
    assert process.stderr
    assert process.stderr.readline() == "\n"  # a bar may be on the line
    return process.stderr.readline()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=str
)
def test_a_signal_lets_the_step_finish_then_the_process_exits_with_its_code(number: signal.Signals, code: int) -> None:
    process, run = start()
    assert f"{number.name} received: finishing this step, then saving" in send_and_read_notice(process, run, number)
    assert process.communicate() == (f"saved {number.name}\n", "")
    assert process.returncode == code


def test_only_the_first_signal_counts() -> None:
    process, run = start()
    assert "SIGTERM" in send_and_read_notice(process, run, signal.SIGTERM)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(run, number)
    assert process.communicate() == ("saved SIGTERM\n", "")
    assert process.returncode == 143


def test_a_second_interrupt_stops_at_once() -> None:
    process, run = start()
    send_and_read_notice(process, run, signal.SIGINT)
    os.kill(run, signal.SIGINT)
    process.wait()  # its input is still open
    out, err = process.communicate()
    assert out == "" and "KeyboardInterrupt" in err and process.returncode == -signal.SIGINT


def test_under_nohup_a_hangup_changes_nothing() -> None:
    process, run = start("nohup")
    os.kill(run, signal.SIGHUP)
    os.kill(run, signal.SIGTERM)
    # Were the first one heard, it would be the one that counts.
    assert process.communicate()[0] == "saved SIGTERM\n" and process.returncode == 143


def test_a_background_job_of_a_script_which_starts_with_interrupts_ignored_is_saved_by_kill_int() -> None:
    process, run = start("sh", "-c", 'grep SigIgn /proc/self/status >&2 & wait; "$@" & wait $!', "sh")
    os.kill(run, signal.SIGINT)
    out, err = process.communicate()
    ignored = int(err.split()[1], 16)
    assert ignored >> (signal.SIGINT - 1) & 1, "the shell did not start the job that way"
    assert out == "saved SIGINT\n" and process.returncode == 130


def test_a_closed_terminal_does_not_stop_the_save() -> None:
    reader, writer = os.pipe()
    process, run = start(stderr=writer)
    os.close(reader)
    os.close(writer)
    os.kill(run, signal.SIGHUP)
    assert process.communicate()[0] == "saved SIGHUP\n" and process.returncode == 129


def test_handlers_are_as_before_once_it_is_left_even_by_an_exception() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    earlier: list[Any] = [lambda number, frame: None, signal.SIG_IGN, signal.SIG_DFL]
    outer = [signal.signal(number, handler) for number, handler in zip(numbers, earlier, strict=True)]
    try:
        with pytest.raises(ZeroDivisionError), StopSignals():
            assert all(signal.getsignal(number) not in earlier for number in numbers)
            raise ZeroDivisionError
        assert [signal.getsignal(number) for number in numbers] == earlier
    finally:
        for number, handler in zip(numbers, outer, strict=True):
            signal.signal(number, handler)


def test_the_notice_is_given_once_and_what_was_received_stays_readable_afterwards() -> None:
    notices: list[signal.Signals] = []
    with StopSignals(notices.append) as stop:
        assert stop.received is None and stop.exit_code == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert notices == [signal.SIGTERM] and stop.received is signal.SIGTERM and stop.exit_code == 143


def test_in_another_thread_it_does_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def enter() -> None:
        with StopSignals() as stop:
            seen.extend([signal.getsignal(signal.SIGTERM), stop.received])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before, None]


def test_what_is_entered_inside_another_passes_on_what_it_receives() -> None:
    notices: list[signal.Signals] = []
    with StopSignals(notices.append) as outer:
        with StopSignals(notices.append) as inner:
            signal.raise_signal(signal.SIGTERM)
        with StopSignals(notices.append) as later:
            pass
        assert (outer.received, inner.received, later.received) == (signal.SIGTERM, signal.SIGTERM, None)
    assert notices == [signal.SIGTERM]
    with pytest.raises(KeyboardInterrupt), StopSignals(notices.append):
        with StopSignals(notices.append):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_process_ends_with_the_pipe_that_it_was_told_to_watch() -> None:
    code = "import signal; from equipoise.runs.signals import end_with_parent; end_with_parent(); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE)
    process.communicate()  # closes the pipe
    assert process.returncode == -signal.SIGTERM


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, equipoise.runs.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
