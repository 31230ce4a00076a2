"""Sentences written by several processes: the file of one, whatever happens to any of them."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipoise import cli
from equipoise.commands import generate as commands
from equipoise.errors import UserError
from equipoise.methods import generate as generating
from equipoise.methods import prompted
from equipoise.methods.generate import generate
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.sample import NonFiniteLogits
from equipoise.policy.ways import Ways
from equipoise.runs.ranks import Ranks
from tests.ranked import only_first_has_disk, rank, together, with_ranks

from .test_generate import config, quiet, read

WANTED: dict[str, Any] = {"n": 3}  # 60 rows, eight at a time


def writing(model: Path, path: Path, **changes: Any) -> Callable[[], int]:
    def work() -> int:
        only_first_has_disk(path.parent)
        return generate(config(model, path, **WANTED | changes), quiet).exit_code

    return lambda: cli.run_command(lambda _: work(), [])


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "out.csv"
    assert together(1, writing(tiny_model, path)) == [0]
    return path


def on_rank(monkeypatch: pytest.MonkeyPatch, number: int, batch: int, act: Callable[[], Any]) -> None:
    """Have `act` called on that rank in place of drawing its batch of that number."""
    plain, calls = prompted.sample, []

    def sample(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if rank() == number and len(calls) == batch:
            act()
        return plain(*given, **named)

    monkeypatch.setattr(prompted, "sample", sample)


@pytest.mark.parametrize("size", [2, 3])
def test_the_number_of_processes_changes_no_byte_of_the_file(
    tiny_model: Path, tmp_path: Path, alone: Path, size: int
) -> None:
    path = tmp_path / "out.csv"
    assert together(size, writing(tiny_model, path)) == [0] * size
    assert path.read_bytes() == alone.read_bytes()
    records = [json.loads(Path(f"{p}.json").read_text()) for p in (path, alone)]
    assert records[0].keys() == records[1].keys() and records[0]["settings"] == records[1]["settings"]


@pytest.mark.parametrize("number", [0, 1])
def test_killed_and_continued_with_another_number_it_is_the_same_file(
    tiny_model: Path, tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "out.csv"
    with monkeypatch.context() as patched:
        on_rank(patched, number, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
        found = together(2, writing(tiny_model, path))
    assert found[number] == -signal.SIGKILL and found[1 - number] == 1  # LostProcess
    assert 0 < len(read(path)) < 60 and len(read(path)) % 8 == 0
    assert together(3, writing(tiny_model, path)) == [0, 0, 0]
    assert path.read_bytes() == alone.read_bytes()


def test_a_signal_to_another_rank_stops_after_the_batches_at_work(
    tiny_model: Path, tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.csv"
    with monkeypatch.context() as patched:
        on_rank(patched, 1, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert together(2, writing(tiny_model, path)) == [143, 0]
    assert len(read(path)) == 32
    assert together(2, writing(tiny_model, path)) == [0, 0]
    assert path.read_bytes() == alone.read_bytes()


def test_what_fails_on_one_rank_is_told_by_the_first(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def not_finite() -> None:
        raise NonFiniteLogits("non-finite logits")

    path = tmp_path / "out.csv"
    with monkeypatch.context() as patched:
        on_rank(patched, 1, 2, not_finite)
        assert together(2, writing(tiny_model, path)) == [3, 0]
    assert len(read(path)) == 16
    assert together(2, writing(tiny_model, path, temperature=0.5)) == [2, 0]
    error = capfd.readouterr().err
    assert error.count("equipoise:") == 1 and "temperature" in error
    assert together(2, writing(tmp_path / "nowhere", tmp_path / "b.csv")) == [2, 0]
    assert capfd.readouterr().err.count("equipoise:") == 1


@pytest.mark.parametrize("fault", ["none", "other"])
def test_a_host_without_the_model_or_with_another_ends_all_with_one_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str
) -> None:
    def missing(_: str) -> None:
        if rank() == 1:
            raise UserError("there is no model")

    if fault == "none":
        monkeypatch.setattr(generating, "check_trained", missing)
    else:
        monkeypatch.setattr(prompted, "fingerprint", lambda _: f"sha256 {rank()}")
    assert together(2, writing(tiny_model, tmp_path / "out.csv")) == [2, 0]
    error = capfd.readouterr().err
    told = {
        "none": "process 1: there is no model",
        "other": "process 1 would write other sentences than process 0 (weights: sha256 0 → sha256 1)",
    }
    assert error.count("equipoise:") == 1 and told[fault] in error
    assert not (tmp_path / "out.csv").exists()


def test_a_task_file_need_be_with_the_first_process_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = commands.parse

    def parse(*given: Any, **named: Any) -> Any:
        if rank() == 1:
            raise UserError("there is no task file")
        return plain(*given, **named)

    monkeypatch.setattr(commands, "parse", parse)
    path = tmp_path / "out.csv"
    argv = ["--model", str(tiny_model), "--n", "1", "--output", str(path), "--dtype", "float32", "--device", "cpu"]
    assert together(2, lambda: cli.run_command(commands.main, argv)) == [0, 0]
    assert len(read(path)) == 20
    assert capfd.readouterr().out.count("is complete") == 1


def test_all_compute_in_the_ways_that_the_first_has_found(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settled(policy: Any, *_: Any) -> None:
        policy.ways = Ways(packed=rank() == 0, nodes=100 + rank())

    monkeypatch.setattr(prompted, "settle", settled)

    def work(ranks: Ranks) -> None:
        policy = PolicyConfig(str(tiny_model), dtype="float32", device="cpu")
        writer = prompted.Prompted(policy, prompt=None, sampling=SamplingConfig(), seed=0)
        writer.load(quiet, ranks)
        assert writer.policy is not None and writer.policy.ways == Ways(packed=True, nodes=100)

    with_ranks(2, work)
