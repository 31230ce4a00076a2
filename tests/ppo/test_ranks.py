"""Runs of several processes: the bytes of one. Real processes, every byte compared."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from equipoise import cli
from equipoise.ppo.log import undefined_keys
from equipoise.ppo.train import train
from tests.killing import command
from tests.ranked import together

from .several import LIGHT, METRICS, SLOW, alone, run
from .small import results, rows, small_config
from .started import EVERYTHING, ROOT

pytestmark = pytest.mark.usefixtures("small_blocks")


CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "grpo": {"algorithm": "grpo", "num_generations": 4, "kl_coef": 0.2},
    "rloo": {"algorithm": "rloo", "num_generations": 2, "scoring": "padded"},
    "reinforce++": {"algorithm": "reinforce++", "average_weights": 0.5},
    "everything": EVERYTHING | {"steps": 3, "pieces": 4, "final_sentences": 30},
    "early stops, padded, bfloat16": {"target_kl": 1e-3, "scoring": "padded", "dtype": "bfloat16"},
    "micro-batches of one, samples": {
        "batch_size": 16, "mini_batch_size": 8, "micro_batch_size": 1, "warm_start": "samples-if-found",
        "warm_start_rounds": 2, "warm_start_sentences": 18, "warm_start_keep": "conditional",
        "warm_start_candidates": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        pytest.param("lora", (2,), marks=SLOW),
        pytest.param("grpo", (2,), marks=SLOW),
        pytest.param("rloo", (2, 4), marks=SLOW),
        pytest.param("reinforce++", (2,), marks=SLOW),
        ("everything", (2,)),
        pytest.param("everything", (4,), marks=SLOW),
        ("early stops, padded, bfloat16", (2,)),
        pytest.param("lora", (4,), marks=SLOW),
        pytest.param("early stops, padded, bfloat16", (4,), marks=SLOW),
        pytest.param("micro-batches of one, samples", (2, 4), marks=SLOW),
    ],
)
def test_the_number_of_processes_changes_no_byte(model: Path, tmp_path: Path, case: str, sizes: Sequence[int]) -> None:
    changes = LIGHT | CASES[case]
    expected = alone(model, tmp_path / "1", **changes)
    if "early" in case:
        assert any(row["ppo/early_stop"] for row in rows(tmp_path / "1"))
    files = {path.name for path in (tmp_path / "1" / "checkpoints" / f"checkpoint-{changes['steps']}").iterdir()}
    for size in sizes:
        where = tmp_path / str(size)
        assert together(size, run(small_config(model, where, **changes))) == [0] * size
        assert results(where, changes["steps"]) == expected
        assert {p.name for p in (where / "checkpoints" / f"checkpoint-{changes['steps']}").iterdir()} == files
        assert json.loads((where / "out" / "run.json").read_text())["config"]["ppo"]["pieces"] == 4


def test_pieces_do_round_otherwise_than_none(model: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    assert expected["tensors"] != alone(model, tmp_path / "1", pieces=1)["tensors"]


@pytest.mark.parametrize("then", [1, pytest.param(4, marks=SLOW)])
def test_begun_on_two_and_continued_on_another_number(model: Path, tmp_path: Path, then: int) -> None:
    changes = LIGHT | CASES["everything"] | {"save_every": 1}
    expected = alone(model, tmp_path / "1", **changes)
    where = tmp_path / "2"
    assert together(2, run(small_config(model, where, **changes | {"steps": 2}))) == [0, 0]
    # Nobody asks for four pieces again: the run has them.
    assert together(then, run(small_config(model, where, **changes | {"pieces": 0}))) == [0] * then
    assert results(where, 3) == expected


def test_a_run_that_cannot_keep_its_pieces_says_so_in_one_line(model: Path, tmp_path: Path) -> None:
    alone(model, tmp_path, steps=1, pieces=1)
    said = tmp_path / "said"

    def work() -> int:
        with said.open("a") as sys.stdout:
            return train(small_config(model, tmp_path, **LIGHT | {"steps": 2, "pieces": 0})).exit_code

    assert together(2, work) == [0, 0]
    logged = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (
        logged["ranks/size"] == 2
        and logged["time/wait"] > 0
        and undefined_keys(logged.keys() - {"step"}, METRICS) == []
    )
    assert not any(key.startswith(("time/", "ranks/")) for key in rows(tmp_path)[0])
    assert said.read_text().count("mini-batches are now cut into 2 pieces and were cut into 1") == 1


def options(model: Path, where: Path, *more: str) -> list[str]:
    return [
        *("--preset", "bundled-cpu", "--model", str(model), "--prompt", "raw", "--dtype", "float32", "--pieces", "2"),
        *("--batch-size", "8", "--mini-batch-size", "4", "--max-new-tokens", "8", "--save-every", "5"),
        *("--warm-start", "off", "--base-samples", "0", "--eval-sentences", "0", "--final-sentences", "0"),
        *("--output-dir", str(where / "out"), "--checkpoint-dir", str(where / "checkpoints")),
        *("--tensorboard-dir", str(where / "runs"), *more),
    ]


def interrupted(arguments: list[str], where: Path) -> int:
    """The step at which a run in several processes ended, after an interrupt in one of its first."""
    with command(arguments, cwd=ROOT) as process:
        assert process.stdout is not None
        assert any(line.startswith("step 2/") for line in process.stdout), "the run did not begin"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert "stopped by SIGINT after step" in out, err
    return len(rows(where))


@SLOW
def test_processes_of_our_own_interrupted_and_continued_leave_the_bytes_of_one(model: Path, tmp_path: Path) -> None:
    where = tmp_path / "2"
    own = [sys.executable, "-m", "equipoise", "train", *options(model, where, "--steps", "100000"), "--processes", "2"]
    step = interrupted(own, where) + 2
    assert json.loads((where / "out" / "run.json").read_text())["command"].endswith("--processes 2")
    for folder in (where, tmp_path / "1"):
        assert cli.main(["train", *options(model, folder, "--steps", str(step))]) == 0
    assert results(where, step) == results(tmp_path / "1", step)


@SLOW
def test_torchrun_interrupted_and_processes_of_our_own_leave_the_bytes_of_one(model: Path, tmp_path: Path) -> None:
    where = tmp_path / "2"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    step = interrupted([*torchrun, "train_rlhf.py", *options(model, where, "--steps", "100000")], where) + 2
    own = [sys.executable, "-m", "equipoise", "train", *options(model, where, "--steps", str(step))]
    done = subprocess.run([*own, "--processes", "2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert done.stdout.count("summary of") == 1
    assert cli.main(["train", *options(model, tmp_path / "1", "--steps", str(step))]) == 0
    assert results(where, step) == results(tmp_path / "1", step)
