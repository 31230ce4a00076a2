"""Supervised fine-tuning by several processes: the model of one, whatever happens to any of them."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import cli
from equipoise.commands import sft as commands
from equipoise.learning import supervised
from equipoise.methods.sft import sft
from equipoise.methods.sft_config import SftConfig
from equipoise.policy.config import PolicyConfig
from equipoise.protocol.task import PROTOCOL
from tests.ranked import only_first_has_disk, rank, read_only, together
from tests.tiny import words_folder

from .test_sft import quiet

LEARNT = ("model.safetensors", "sentences.csv")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "base", prompt=None)


def config(base: Path, folder: Path, **changes: Any) -> SftConfig:
    settings: dict[str, Any] = {"data": "forced", "sentences": 36, "candidates": 2, "held_out": 0.2, "check": 1}
    settings |= {"prompt": "raw", "epochs": 2, "learning_rate": 0.03, "pieces": 4} | changes
    policy = PolicyConfig(str(base), dtype="float32", device="cpu", lora_rank=8)
    return SftConfig(output_dir=str(folder), policy=policy, **settings)


def learning(asked: SftConfig, say: Callable[[str], None] = quiet) -> Callable[[], int]:
    def work() -> int:
        only_first_has_disk(Path(asked.output_dir).parent)
        sft(asked, say)
        return 0

    return lambda: cli.run_command(lambda _: work(), [])


def learnt(folder: Path) -> dict[str, Any]:
    """What was learnt, without what time decides."""
    record = json.loads((folder / "run.json").read_text())
    told = {name: value for name, value in record["training"].items() if "seconds" not in name}
    made = {name: (folder / name).read_bytes() for name in LEARNT if (folder / name).exists()}
    return made | {"config": record["config"], "training": told}


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte_of_what_is_found_and_learnt(base: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 2, 4):
        assert together(size, learning(config(base, tmp_path / f"{size}"))) == [0] * size
        found.append(learnt(tmp_path / f"{size}"))
    assert found[0] == found[1] == found[2]
    assert len(found[0]["sentences.csv"].splitlines()) == 37 and found[0]["training"]["held_out"] > 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough to learn from."""
    path = tmp_path_factory.mktemp("data") / "data.csv"
    agentic, communal = (each.terms for each in PROTOCOL.classes)
    lines = ["Occupation,Text"]
    for i, o in enumerate(PROTOCOL.names):
        lines.append(f"{o},The {o} was {agentic[i % 10]} and {communal[i // 2]} in a pilot .")
    path.write_text("\n".join(lines) + "\n")
    return path


def of_file(base: Path, data: Path, folder: Path, **changes: Any) -> SftConfig:
    settings: dict[str, Any] = {"data": str(data), "sentences": None, "candidates": 1, "epochs": 2, "check": 0}
    return config(base, folder, **settings | {"held_out": 0.0, "pieces": 2} | changes)


@pytest.fixture(scope="module")
def alone(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone") / "sft"
    assert together(1, learning(of_file(base, data, folder))) == [0]
    return learnt(folder)


def test_two_processes_leave_the_model_of_one_which_any_number_then_finds(
    base: Path, data: Path, tmp_path: Path, alone: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert together(2, learning(of_file(base, data, tmp_path / "sft"), print)) == [0, 0]
    assert learnt(tmp_path / "sft") == alone and alone["training"]["pieces"] == 2
    assert capfd.readouterr().out.count("the model is in") == 1
    # It is the very same model, whatever it is cut into.
    assert together(1, learning(of_file(base, data, tmp_path / "sft", pieces=1), print)) == [0]
    assert "holds this very model already" in capfd.readouterr().out


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_it_is_learnt_anew_by_another_number_as_if_nothing_had_been(
    base: Path, data: Path, tmp_path: Path, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    plain, calls = supervised.score, []

    def score(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if rank() == number and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(supervised, "score", score)
        found = together(2, learning(of_file(base, data, tmp_path / "sft")))
    assert found[number] == -signal.SIGKILL and found[1 - number] == 1  # LostProcess
    assert not (tmp_path / "sft" / "model.safetensors").exists()
    assert together(1, learning(of_file(base, data, tmp_path / "sft"))) == [0]
    assert learnt(tmp_path / "sft") == alone


@pytest.mark.parametrize(
    "fault",
    [
        *("read-only", "no such file", "pieces"),
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("not finite", "flipped bit")),
    ],
)
def test_what_goes_wrong_on_one_rank_ends_all_with_one_line(
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    given, pieces = Path("nowhere.csv") if fault == "no such file" else data, 3 if fault == "pieces" else 2
    plain, flips = supervised.MasterAdam.put, []

    def put(self: Any, total: Any) -> None:
        plain(self, total)
        flips.append(1)
        if rank() == 1 and fault == "flipped bit" and len(flips) == 1:
            self.groups["policy"].master.data.view(torch.int32)[5] ^= 1

    monkeypatch.setattr(supervised.MasterAdam, "put", put)
    score = supervised.score

    def spoilt(policy: Any, *given: Any, **named: Any) -> Any:
        if rank() == 1 and fault == "not finite":
            next(p for p in policy.model.parameters() if p.requires_grad).data[0] = torch.nan
        return score(policy, *given, **named)

    monkeypatch.setattr(supervised, "score", spoilt)
    argv = ["--data", str(given), "--output-dir", str(tmp_path / "sft"), "--prompt", "raw", "--epochs", "1"]
    argv += ["--pieces", str(pieces), "--held-out", "0", "--model", str(base), "--dtype", "float32", "--check", "0"]

    def work() -> int:
        if fault == "read-only":
            read_only(tmp_path)
        return cli.run_command(commands.main, [*argv, "--device", "cpu", "--lora-rank", "8"])

    assert together(2, work) == [3 if fault == "not finite" else 2, 0]
    shown = capfd.readouterr()
    told = {
        "read-only": "Read-only file system",
        "no such file": "nowhere.csv",
        "not finite": "stopped: the cross-entropy is not finite",
        "flipped bit": "the weights or the state of process 1 are not those of process 0",
        "pieces": "3 pieces cannot be shared alike by 2 processes: give --pieces 4",
    }
    assert told[fault] in (shown.out if fault == "not finite" else shown.err) and "Traceback" not in shown.err
    assert shown.err.count("equipoise:") == (fault != "not finite") and shown.out.count("stopped:") <= 1
    assert not (tmp_path / "sft" / "model.safetensors").exists()
