"""A run on disk: killed, stopped, resumed. Real processes, a tiny model, every byte compared."""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import cli
from equipoise.ppo.claim import FREE_TO_CHANGE
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.train import Outcome, train
from equipoise.runs.records import differences
from tests.killing import command, counted, exit_code, in_child, killed_until_done

from .small import checkpoints, events, results, rows, small_config
from .started import EVERYTHING, ROOT, options, own, work


@pytest.mark.parametrize(
    "changes",
    [pytest.param({"save_every": 1}, marks=pytest.mark.slow), EVERYTHING],
    ids=["lora float32", "everything bfloat16"],
)
def test_killed_between_any_two_calls_and_resumed_it_ends_with_the_very_same_bytes(
    model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train(small_config(model, straight, **changes), own) == Outcome("done", 6, 0)
    calls = counted(work(small_config(model, tmp_path / "counted", **changes)))
    expected = results(straight, 6)
    kills, draw = 0, random.Random(0)
    while kills < 5:
        kills += killed_until_done(work(small_config(model, killed, **changes)), calls, draw, most=5 - kills)
        assert results(killed, 6) == expected
        shutil.rmtree(killed)


@pytest.mark.parametrize("changes", [{}, {"scoring": "padded"}, EVERYTHING], ids=["packed", "padded", "everything"])
def test_three_steps_and_three_more_are_six(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    train(small_config(model, straight, **changes))
    train(small_config(model, parts, **(changes | {"steps": 3})))
    assert train(small_config(model, parts, **changes)) == Outcome("done", 6, 0)
    assert results(parts, 6) == results(straight, 6)


def test_two_runs_of_one_seed_are_the_same_and_of_another_seed_are_not(model: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small_config(model, tmp_path / name, seed=seed))
    a, b, c = (results(tmp_path / name, 6) for name in "abc")
    assert a == b
    assert a["training_metrics.csv"] != c["training_metrics.csv"]


def test_a_real_process_stopped_by_sigterm_exits_143_saved_and_the_same_command_goes_on(
    model: Path, tmp_path: Path
) -> None:
    stopped = tmp_path / "stopped"
    script = [sys.executable, "train_rlhf.py", *options(model, stopped, "--steps", "100000")]
    with command(script, cwd=ROOT) as process:
        assert process.stdout is not None
        assert any(line.startswith("step 3/") for line in process.stdout), "the run did not begin"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert process.returncode == 143, err
    assert "SIGTERM received: finishing this step, then saving" in err and "Traceback" not in err
    assert "The same command continues." in out and "\x1b" not in out
    step = len(rows(stopped))
    assert checkpoints(stopped)[-1] == step and "signal" in events(stopped)

    ends = options(model, stopped, "--steps", str(step + 3)), options(model, tmp_path / "s", "--steps", str(step + 3))
    assert [cli.main(["train", *argv]) for argv in ends] == [0, 0]
    assert results(stopped, step + 3) == results(tmp_path / "s", step + 3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=str)
def test_other_stop_signals_save_and_exit_with_their_codes(
    model: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    calls: list[int] = []

    def reward(texts: Sequence[str], occupations: Sequence[str]) -> list[float]:
        calls.append(len(texts))
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return own(texts, occupations)

    child = in_child(work(small_config(model, tmp_path, steps=100_000), reward))
    assert exit_code(child) == code
    step = len(rows(tmp_path))
    assert checkpoints(tmp_path)[-1] == step
    straight = tmp_path / "straight"
    for where in (tmp_path, straight):
        config = small_config(model, where, steps=step + 1)
        assert train(config, own, changed_functions=True).exit_code == 0  # `reward` does not stop a run twice
    assert results(tmp_path, step + 1) == results(straight, step + 1)


def test_the_first_lines_say_what_was_found_and_chosen(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = options(model, tmp_path, "--steps", "1")
    assert cli.main(["doctor", *argv]) == 0
    doctor = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert cli.main(["train", *argv]) == 0
    trained = capsys.readouterr().out

    def steady(text: str) -> list[str]:
        return [line for line in text.splitlines() if "free" not in line]

    assert steady(trained)[: len(steady(doctor))] == steady(doctor)
    for word in ("preset", "machine", "model", "compute", "memory", "disk", "task", "files"):
        assert any(line.startswith(word) for line in doctor.splitlines()), word
    assert str(model) in doctor and "cpu, float32" in doctor


def test_run_json_says_what_made_the_run(finished: TrainConfig, tmp_path: Path) -> None:
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["config"]["ppo"]["batch_size"] == 8 and record["config"]["prompt"] == "raw"
    # A build for a GPU calls itself 2.13.0+cu130, and its package 2.13.0.
    assert record["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"command", "equipoise", "python", "gpu"} <= set(record)


def test_differences_name_what_changed_and_pass_over_what_does_not_matter() -> None:
    old = {"steps": 5, "seed": 1, "ppo": {"clip": 0.2, "gone": 1}, "run": {"save_every": 3}}
    new = {"steps": 9, "seed": 2, "ppo": {"clip": 0.2, "new_one": None}, "run": {"save_every": 4}}
    assert differences(old, new, FREE_TO_CHANGE) == ["seed: 1 → 2", "gone: 1 → None"]
