"""What the processes of a run do together, each verb against what one process would do."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise import cli
from equipoise.errors import LostProcess, NonFiniteError, UserError
from equipoise.runs import ranks as running
from equipoise.runs.launch import launched, processes_of
from equipoise.runs.pieces import PieceSum, tree_sum
from equipoise.runs.ranks import ALONE, Ranks, joined
from tests.killing import exit_code, in_child
from tests.ranked import SECONDS, rank, start, with_ranks


def by_hand(values: Sequence[Tensor]) -> Tensor:
    """The balanced tree, the other way round: the left subtree is the largest power of two below the number."""
    if len(values) == 1:
        return values[0]
    left = 1 << ((len(values) - 1).bit_length() - 1)
    return by_hand(values[:left]) + by_hand(values[left:])


class Threads(Ranks):
    """Ranks that are threads of this process."""

    shared: dict[str, Any]

    def gather(self, x: Tensor) -> list[Tensor]:
        self.shared["barrier"].wait()
        self.shared[self.rank] = x
        self.shared["barrier"].wait()
        return [self.shared[rank].clone() for rank in range(self.size)]


def sums_of(size: int, values: Sequence[Tensor]) -> list[Tensor]:
    """What each of `size` ranks makes of the pieces."""
    shared: dict[str, Any] = {"barrier": threading.Barrier(size)}
    results: dict[int, Tensor] = {}

    def member(rank: int) -> None:
        ranks = Threads(rank, size, pieces=len(values))
        object.__setattr__(ranks, "shared", shared)
        summed = PieceSum(ranks)
        for piece in ranks.mine:
            summed.add(values[piece].clone())
        results[rank] = summed.total()

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(size)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 13), st.integers(0, 2**32))
def test_the_tree_is_that_of_neighbours_and_the_number_of_ranks_changes_no_bit(pieces: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randint(-20, 20, (pieces, 8), generator=generator)
    values = list(torch.randn(pieces, 8, generator=generator) * 2.0**scale)
    expected = by_hand(values)
    assert torch.equal(tree_sum([v.clone() for v in values]), expected)
    for size in (n for n in range(1, 7) if pieces % n == 0):
        for found in sums_of(size, values):
            assert torch.equal(found, expected), size


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 100))
def test_pieces_are_dealt_as_neighbours_alike_and_hold_every_row_once(size: int, each: int, rows: int) -> None:
    members = [Ranks(rank, size).cut_into(size * each) for rank in range(size)]
    assert [piece for ranks in members for piece in ranks.mine] == list(range(size * each))
    assert {len(ranks.mine) for ranks in members} == {each}
    runs = members[0].runs(torch.arange(rows))
    assert len(runs) == size * each and torch.cat(runs).tolist() == list(range(rows))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_alone_every_verb_is_the_identity() -> None:
    x = torch.arange(3)
    assert ALONE.gather(x)[0] is x and ALONE.first and ALONE.one_signal(15) == 15 and list(ALONE.mine) == [0]
    assert ALONE.each(lambda: 1) == [1] and ALONE.first_does(lambda: 2) == 2
    assert ALONE.deal("abc", str.upper) == ["A", "B", "C"]
    with pytest.raises(KeyError):
        ALONE.first_does(lambda: {}["x"])
    with joined() as ranks:
        assert ranks is ALONE


class Odd(Exception):
    """An error that cannot be made again from its message."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def test_results_and_errors_reach_all_ranks() -> None:
    def work(ranks: Ranks) -> None:
        rank = ranks.rank
        assert [int(x) for x in ranks.gather(torch.tensor(10 + rank))] == [10, 11, 12]
        assert ranks.each(lambda: {"rank": rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert ranks.deal(range(7), lambda i: (i, i * i)) == [(i, i * i) for i in range(7)]
        assert ranks.deal([], str) == []
        calls: list[int] = []
        assert ranks.first_does(lambda: calls.append(rank) or "done") == "done"
        assert calls == ([0] if rank == 0 else [])

        def fails(error: Exception, on: int) -> Any:
            if rank == on:
                raise error
            return rank

        for error, kind, text in (
            (UserError("a fault"), UserError, "a fault"),
            (NonFiniteError("not finite"), NonFiniteError, "not finite"),
            (torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "full"),
            (Odd(1, 2), (Odd, RuntimeError), "1 and 2"),
            (OSError(28, "No space left on device"), OSError, "No space left"),
        ):
            with pytest.raises(kind, match=text) as first:
                ranks.first_does(lambda error=error: fails(error, 0))
            assert getattr(first.value, "told", False) == (rank != 0)
            with pytest.raises(kind, match=text) as other:
                ranks.each(lambda error=error: fails(error, 2))
            assert getattr(other.value, "told", False) == (rank != 0)
            if kind is UserError and rank != 2:
                assert str(other.value) == "process 2: a fault"
        assert ranks.each(lambda: rank) == [0, 1, 2]  # and they are still in step
        assert ranks.one_signal(0) == 0
        assert ranks.one_signal({0: 0, 1: 15, 2: 2}[rank]) == 15
        x = torch.full((2,), float(rank))
        ranks.share_(x)
        assert x.tolist() == [0.0, 0.0]

    with_ranks(3, work)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("error", [None, UserError("a fault"), KeyboardInterrupt()])
def test_no_thread_of_a_group_is_left_for_the_interpreter_to_tear_down(own: bool, error: BaseException | None) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def work() -> int:
        before, held = threads(), []
        try:
            with joined() as ranks:
                held.append(ranks)  # as the frames of an error's traceback hold it
                ranks.first_does(lambda: b"x" * 1000)
                assert threads() > before
                if error is not None:
                    raise error
        except (UserError, KeyboardInterrupt):
            pass
        assert dist.is_initialized() != own
        if rank() == 1:  # rank 0 has the store, which the others may still ask
            assert threads() == before
        return 0

    if own:
        port = free_port()
        children = [in_child(partial(as_torchrun, number, port, work)) for number in (0, 1)]
    else:
        children = start(2, work)
    assert [exit_code(child) for child in children] == [0, 0]


def test_none_goes_on_and_may_end_before_all_have_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def new_group(*given: Any, **options: Any) -> Any:
        group = plain(*given, **options)
        if rank() == 1:
            (tmp_path / "ready").touch()
            return group
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        time.sleep(0.3)  # in which the other one would go on, if it could
        (tmp_path / "met").touch()
        return group

    def work(ranks: Ranks) -> None:
        if ranks.rank == 1:
            os._exit(7 if (tmp_path / "met").exists() else 8)
        ranks.first_does(lambda: ranks.gather(torch.zeros(1)))

    plain = dist.new_group
    monkeypatch.setattr(dist, "new_group", new_group)
    port = free_port()
    children = [meeting(number, port, work) for number in (0, 1)]
    assert [exit_code(child) for child in children] == [1, 7]
    assert "another process of this run has ended" in capfd.readouterr().err


def test_one_flipped_bit_is_found_and_named() -> None:
    def work(ranks: Ranks) -> None:
        ranks.agree(5, 1 << 40, 7)
        with pytest.raises(UserError, match="step 5 the weights or the state of process 1, 2 are not those"):
            ranks.agree(5, 1 << 40 if ranks.rank == 0 else (1 << 40) + 1, 7)

    with_ranks(3, work)


def test_a_process_that_is_gone_is_noticed_by_those_that_wait_for_it() -> None:
    def member() -> int:
        with joined() as ranks:
            if ranks.rank == 1:
                os._exit(7)
            with pytest.raises(LostProcess, match=r"the same command continues .* \([^.]*(\d\.[^.]*)*\w\)$"):
                ranks.first_does(lambda: ranks.gather(torch.zeros(1)))
        return 5

    assert [exit_code(child) for child in start(2, member)] == [5, 7]


@pytest.mark.parametrize(
    ("gpus", "processes", "fault"),
    [
        (None, 0, "--processes 0 must be at least 1"),
        (2, 2, "say the same thing"),
        (64, None, "--gpus 64 was asked for, and of CUDA GPUs PyTorch sees"),
    ],
)
def test_numbers_of_processes_that_cannot_be_are_refused(gpus: int | None, processes: int | None, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        processes_of(gpus, processes)


def test_a_number_is_refused_where_the_processes_are_started_already(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launched() and processes_of(None, None) == 1
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched()
    with pytest.raises(UserError, match="started already"):
        processes_of(None, 2)


def as_torchrun(rank: int, port: int, work: Callable[[], int], size: int = 2) -> int:
    """`work` in the environment of that rank."""
    signal.alarm(SECONDS)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return work()


def meeting(rank: int, port: int, work: Callable[[Ranks], object], size: int = 2) -> int:
    """The process id of one that meets the others as torchrun has them meet, and ends as a command does."""

    def command(_: list[str]) -> int:
        with joined() as ranks:
            work(ranks)
        return 0

    return in_child(lambda: as_torchrun(rank, port, lambda: cli.run_command(command, []), size))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def test_where_not_every_process_has_a_gpu_none_waits_for_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the first process alone finds one for itself

    def work(ranks: Ranks) -> None:
        assert dist.get_backend() == "gloo"
        assert [int(x) for x in ranks.gather(torch.tensor(ranks.rank))] == [0, 1]

    port = free_port()
    assert [exit_code(child) for child in [meeting(rank, port, work) for rank in (0, 1)]] == [0, 0]


@pytest.mark.parametrize("have", [(True, True, True), (True, False, True), (False, False, False)])
def test_all_learn_of_each_whether_it_has_something(have: tuple[bool, ...]) -> None:
    store, found = dist.HashStore(), dict[int, bool]()

    def member(rank: int) -> None:
        found[rank] = running._all_have(store, "gpu", rank, len(have), have[rank])

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(len(have))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [all(have)] * len(have)


def test_a_port_that_is_taken_and_others_who_do_not_come_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "COLLECTIVE", timedelta(seconds=0.2))

    def told() -> str:
        error = capfd.readouterr().err
        assert "Traceback" not in error
        (line,) = (line for line in error.splitlines() if line.startswith("equipoise:"))
        return line

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert exit_code(meeting(0, port, print)) == 2
    assert f"process 0 of 2 did not meet the others at localhost:{port} (" in (line := told()) and "in use" in line
    assert exit_code(meeting(0, free_port(), print)) == 2
    assert "process 0 of 2 did not meet" in told()
    assert exit_code(meeting(1, free_port(), print)) == 2
    assert "process 1 of 2 did not meet" in told()


def test_a_group_of_the_callers_own_must_take_tensors_of_the_cpu() -> None:
    def member() -> int:
        dist.get_backend_config = lambda group=None: "cuda:nccl"
        with pytest.raises(UserError, match="started with cuda:nccl alone: start it with cpu:gloo,cuda:nccl"), joined():
            pass
        return 0

    assert [exit_code(child) for child in start(2, member)] == [0, 0]
