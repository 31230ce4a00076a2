"""What happens to one process of several, or is wrong on one of them, ends or stops all alike."""

import os
import random
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import cli
from equipoise.commands import bench
from equipoise.errors import UserError
from equipoise.policy.sample import NonFiniteLogits
from equipoise.ppo import bench as benchmark
from equipoise.ppo import step as stepping
from equipoise.ppo import train as loop
from equipoise.ppo import update as updating
from equipoise.ppo.config import PPOConfig
from tests.killing import counted
from tests.ranked import rank, read_only, together

from .several import LIGHT, SLOW, command, on_rank, reward, run
from .small import checkpoints, events, results, small_config

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("number", [pytest.param(0, marks=SLOW), 1])
def test_a_signal_to_any_rank_stops_all_after_the_same_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: dict[str, Any]
) -> None:
    where = tmp_path / "2"
    with monkeypatch.context() as patched:
        on_rank(patched, number, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert together(2, run(small_config(model, where, **LIGHT))) == [143, 143]
    assert checkpoints(where) == [2] and events(where)[-1] == "signal"
    assert not (where / "out" / "model.safetensors").exists()
    assert together(2, run(small_config(model, where, **LIGHT))) == [0, 0]
    assert results(where, 4) == expected


def test_a_signal_while_the_untrained_model_is_measured_stops_all(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = loop.base_rates

    def measured(*given: Any, **options: Any) -> Any:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*given, **options)

    monkeypatch.setattr(loop, "base_rates", measured)
    config = small_config(model, tmp_path, **LIGHT, base_samples=40)
    assert together(2, run(config)) == [130, 130]
    assert events(tmp_path) == ["signal"] and checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("size", "number"), [(2, 1), *(pytest.param(*which, marks=SLOW) for which in ((2, 0), (4, 0), (4, 3)))]
)
def test_a_rank_killed_between_any_two_calls_ends_the_others_and_the_next_start_goes_on(
    model: Path, tmp_path: Path, size: int, number: int
) -> None:
    changes = LIGHT | {"save_every": 1, "eval_sentences": 8, "tuning": "full" if number else "lora"}
    whole = counted(run(small_config(model, tmp_path / "1", **changes)))
    expected = results(tmp_path / "1", 4)
    where, draw = tmp_path / "killed", random.Random(number)
    for _ in range(1 if size == 2 else 4):
        at = draw.randrange(whole // 20, whole // 5)
        found = together(size, run(small_config(model, where, **changes)), {number: at})
        assert found[number] == -signal.SIGKILL
        assert all(code == 99 for rank, code in enumerate(found) if rank != number)  # an error: LostProcess
    assert together(size, run(small_config(model, where, **changes))) == [0] * size
    assert results(where, 4) == expected


def test_a_function_is_called_once_and_where_it_raises_all_end_with_the_step_saved(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = tmp_path / "calls"

    def failing(texts: Sequence[str], occupations: Sequence[str]) -> list[float]:
        with calls.open("a") as file:
            file.write(f"{rank()} {len(texts)}\n")
        if len(calls.read_text().splitlines()) == 3:
            raise ValueError("no such judge")
        return reward(texts, occupations)

    assert together(2, command(small_config(model, tmp_path, **LIGHT), failing)) == [2, 0]
    assert calls.read_text().splitlines()[:3] == ["0 8"] * 3 and "1 " not in calls.read_text()
    error = capfd.readouterr().err
    assert error.count("raised ValueError: no such judge") == 1 and "Step 2 is saved" in error
    assert "Traceback" not in error
    assert "no such judge" in (tmp_path / "out" / "function_error.txt").read_text()
    assert checkpoints(tmp_path) == [2]


@pytest.mark.parametrize("tuning", ["lora", pytest.param("full", marks=SLOW)])
def test_a_full_disk_on_rank_0_ends_all_with_one_line_and_they_go_on_once_there_is_room(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    expected: dict[str, Any],
    tuning: str,
) -> None:
    changes = LIGHT | {"tuning": tuning}

    def fill(_: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    where = tmp_path / "2"
    with monkeypatch.context() as patched:
        on_rank(patched, 0, 3, fill)
        assert together(2, command(small_config(model, where, **changes))) == [2, 0]
    error = capfd.readouterr().err
    assert error.count("equipoise:") == 1 and "Traceback" not in error
    assert checkpoints(where) == [2]
    assert together(2, run(small_config(model, where, **changes))) == [0, 0]
    assert tuning == "full" or results(where, 4) == expected


def test_a_folder_that_rank_0_may_not_write_ends_all_with_one_line(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        read_only(tmp_path)
        return command(small_config(model, tmp_path, **LIGHT))()

    assert together(2, work) == [2, 0]
    error = capfd.readouterr().err
    assert error.count("equipoise:") == 1 and "Read-only file system" in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_refused_start_is_refused_by_all_with_one_line(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs.csv").write_text("a,b\n")
    assert together(2, command(small_config(model, tmp_path, **LIGHT))) == [2, 0]
    assert capfd.readouterr().err.count("holds files that no run of equipoise wrote") == 1
    assert together(3, command(small_config(model, tmp_path / "b", **LIGHT))) == [2, 0, 0]
    assert "4 pieces cannot be shared alike by 3 processes" in capfd.readouterr().err
    assert together(3, command(small_config(model, tmp_path / "b", **LIGHT | {"pieces": 0}))) == [2, 0, 0]
    assert "mini-batch-size 4 is not a multiple of 3 pieces" in capfd.readouterr().err
    with pytest.raises(UserError, match="not a multiple of pieces 3"):
        PPOConfig(mini_batch_size=16, pieces=3)


def spoil_gradients(patched: pytest.MonkeyPatch) -> None:
    """A gradient of rank 1's third micro-batch is not a number."""
    plain, calls = updating._backward, []

    def backward(policy: Any, optimizer: Any, *given: Any) -> Any:
        stats = plain(policy, optimizer, *given)
        calls.append(1)
        if rank() == 1 and len(calls) == 3:
            optimizer.groups["policy"].grads[0] = torch.nan
        return stats

    patched.setattr(updating, "_backward", backward)


def spoil_sampling(patched: pytest.MonkeyPatch) -> None:
    plain, calls = stepping.sample_dealt, []

    def sample(policy: Any, prompts: Any, sampling: Any, generator: Any, ranks: Any) -> Any:
        calls.append(1)
        if rank() == 1 and len(calls) == 2:
            policy.model.get_output_embeddings().weight.data[0] += torch.inf
        try:
            return plain(policy, prompts, sampling, generator, ranks)
        except NonFiniteLogits:
            policy.model.get_output_embeddings().weight.data[0] = 0.0
            raise

    patched.setattr(stepping, "sample_dealt", sample)


@pytest.mark.parametrize("spoil", [spoil_gradients, spoil_sampling])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pytest.MonkeyPatch], None]
) -> None:
    spoil(monkeypatch)
    assert together(2, run(small_config(model, tmp_path, **LIGHT | {"eval_sentences": 0}))) == [0, 0]
    assert events(tmp_path).count("nonfinite") == 1
    assert checkpoints(tmp_path)[-1] == 4


@pytest.mark.parametrize("tuning", [pytest.param("lora", marks=SLOW), "full"])
def test_a_flipped_bit_on_one_rank_ends_the_run_before_it_is_saved(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tuning: str
) -> None:
    def flip(training: Any) -> None:
        group = training.optimizer.groups["policy"]
        (group.buffer if tuning == "full" else group.master.data).view(torch.int32)[5] ^= 1

    on_rank(monkeypatch, 1, 4, flip, before=False)
    assert together(2, command(small_config(model, tmp_path, **LIGHT, tuning=tuning))) == [2, 0]
    assert "at step 4 the weights or the state of process 1" in capfd.readouterr().err
    assert checkpoints(tmp_path) == [2]


def test_another_model_on_another_host_is_told_before_anything_is_trained(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = loop.load_policy

    def load(*given: Any, **options: Any) -> Any:
        policy = plain(*given, **options)
        if rank() == 1:
            policy.model.get_input_embeddings().weight.data[3, 4] += 1e-6
        return policy

    monkeypatch.setattr(loop, "load_policy", load)
    assert together(2, command(small_config(model, tmp_path, **LIGHT))) == [2, 0]
    error = capfd.readouterr().err
    assert error.count("equipoise:") == 1 and "process 1 is not as process 0: it has other weights" in error
    assert not (tmp_path / "out").exists()


def test_a_benchmark_that_one_process_cannot_begin_ends_all_with_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = benchmark.load_policy

    def load(*given: Any, **options: Any) -> Any:
        if rank() == 1:
            raise UserError("1 GPU cannot be shared")
        return plain(*given, **options)

    monkeypatch.setattr(benchmark, "load_policy", load)
    argv = ["--preset", "bundled-cpu", "--model", str(model), "--prompt", "raw", "--dtype", "float32"]
    assert together(2, lambda: cli.run_command(bench.main, argv)) == [2, 0]
    error = capfd.readouterr().err
    assert error.count("equipoise:") == 1 and "process 1: 1 GPU cannot be shared" in error
