"""Starting processes on this machine, and what a process makes of the environment that it was started in."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from equipoise import cli
from equipoise.commands.several import started
from equipoise.errors import UserError
from equipoise.policy.graphs import Graphs
from equipoise.runs.launch import MOST, SHUTDOWN, is_first, launch, launched, processes_of
from equipoise.short_help import ALL
from tests.killing import exit_code, in_child

TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def environment(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in (TWO | changes).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "-2"), ("WORLD_SIZE", ""), ("RANK", "2"),
        ("RANK", "-1"), ("RANK", "x"), ("LOCAL_RANK", "a"), ("MASTER_PORT", "http"), ("MASTER_PORT", "65536"),
        ("WORLD_SIZE", "٢"), ("RANK", "9" * 5000),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    environment(monkeypatch, **{name: value})
    assert is_first()  # else nobody would say so
    assert cli.main(["train"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"equipoise: {name} is '") and error.count("\n") == 1 and "unset WORLD_SIZE" in error


def test_what_one_process_alone_was_started_with_says_nothing_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, WORLD_SIZE="1", RANK="0")
    assert not launched() and is_first()
    environment(monkeypatch)
    assert launched() and not is_first()
    monkeypatch.delenv("LOCAL_RANK")  # not everyone who starts processes sets it
    assert launched()


def launcher(monkeypatch: pytest.MonkeyPatch, work: Callable[[api.LaunchConfig], Any]) -> None:
    """Have `work` done in place of processes being started."""
    monkeypatch.setattr(api, "elastic_launch", lambda config, _: lambda *command: work(config))


@pytest.mark.skipif(not hasattr(api.LaunchConfig, "shutdown_timeout"), reason="this torch gives them 30 s in any case")
def test_processes_have_fifty_seconds_to_save_or_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int | None] = []
    launcher(monkeypatch, lambda config: seen.append(config.shutdown_timeout))
    monkeypatch.delenv(SHUTDOWN[0], raising=False)
    assert launch(["-c", ""], 2) == 0
    monkeypatch.setenv(SHUTDOWN[0], "600")
    assert launch(["-c", ""], 2) == 0
    assert seen == [50, 600]
    for wrong in ("soon", "-1"):
        monkeypatch.setenv(SHUTDOWN[0], wrong)
        with pytest.raises(UserError, match=f"{SHUTDOWN[0]} is '{wrong}'.*give seconds"):
            launch(["-c", ""], 2)


@pytest.mark.parametrize(
    ("codes", "told", "said"),
    [
        ({0: 1, 1: -9}, 137, "process 1 was killed by signal 9"),
        ({0: 1, 1: 2}, 2, ""),  # the second said why, the first only that the second is gone
        ({0: 1}, 1, ""),
        ({0: 3, 1: 1}, 3, ""),
    ],
)
def test_the_code_is_that_of_what_began_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], codes: dict[int, int], told: int, said: str
) -> None:
    def failing(_: api.LaunchConfig) -> None:
        failures = {rank: ProcessFailure(rank, 1000 + rank, code, "") for rank, code in codes.items()}
        raise ChildFailedError("equipoise", failures)

    launcher(monkeypatch, failing)
    assert launch(["-c", ""], 2) == told
    assert said in capsys.readouterr().err


HANGS_UP = """import os, signal, sys
os.kill(os.getppid(), signal.SIGHUP)
sys.exit(0 if os.environ["MASTER_ADDR"] == "localhost" else 9)"""


@pytest.mark.skipif(not hasattr(api.LaunchConfig, "signals_to_handle"), reason="this torch handles SIGHUP in any case")
@pytest.mark.parametrize(("disposition", "code"), [(signal.SIG_IGN, 0), (signal.SIG_DFL, 129)])
def test_a_closed_terminal_stops_the_processes_but_under_nohup(disposition: Any, code: int) -> None:
    def work() -> int:
        signal.signal(signal.SIGHUP, disposition)
        return launch(["-c", HANGS_UP], 1)

    assert exit_code(in_child(work)) == code


def test_a_recording_binds_its_own_thread_alone_where_nccl_has_another_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Graphs(torch.device("cpu")).capture == "global"
    environment(monkeypatch)
    assert Graphs(torch.device("cpu")).capture == "thread_local"


def test_help_is_shown_by_the_process_that_was_asked() -> None:
    for word in ("--help", "-h", ALL):
        assert started(["--processes", "2", word], ("-m", "equipoise", "train"), "x") == (None, [word])


def test_more_processes_than_could_do_anything_are_refused() -> None:
    most = MOST * (os.cpu_count() or 1)
    assert processes_of(None, most) == most
    with pytest.raises(UserError, match=f"--processes {most + 1} is too many for the cores .*: give at most {most}"):
        processes_of(None, most + 1)
