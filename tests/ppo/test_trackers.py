"""Trackers: every key arrives, once for each step, whatever is killed, goes back or fails."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equipoise.cli import main
from equipoise.ppo import run as runs
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.log import RunLog
from equipoise.ppo.tracking import tracker
from equipoise.ppo.tracking.attach import attach
from equipoise.ppo.tracking.rows import rows
from equipoise.ppo.tracking.to_wandb import _records
from equipoise.ppo.tracking.tracker import Opened, Row, Start
from equipoise.ppo.tracking.trackers import RECORD, Trackers
from equipoise.ppo.train import train
from tests import killing
from tests.ppo.small import small_config

INTERPRETER = os.environ.get("EQUIPOISE_TRACKERS", "")
"""A Python with wandb, trackio and MLflow; `make test-slow` makes one."""
ROOT = Path(__file__).parents[2]


class Fake:
    """A tracker that keeps its runs in a folder, a line for each thing that it is told; it takes nothing back."""

    def __init__(self, folder: Path, fails: Callable[[Row], bool] = lambda row: False) -> None:
        self.folder, self.fails = folder, fails

    def open(self, start: Start) -> Opened:
        self.folder.mkdir(exist_ok=True)
        self.path = self.folder / start.id
        assert start.continues or not self.path.exists()
        steps = [step for kind, step, *_ in self.told(self.path) if kind == "row"]
        self.tell("open", start.name, start.config.get("steps"))
        return Opened(max(steps, default=0), "a folder")

    def send(self, row: Row) -> None:
        if self.fails(row):
            raise ConnectionError("nobody answers\nmore of it")
        self.tell("row", row.step, dict(row.values), [sample["text"] for sample in row.samples])

    def files(self, paths: Sequence[Path], kind: str) -> None:
        self.tell("files", kind, [path.name for path in paths])

    def close(self, finished: bool) -> None:
        self.tell("close", finished)

    def tell(self, *what: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(what) + "\n")

    @staticmethod
    def told(path: Path) -> list[Any]:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the fake tracker that every run of this test has in place of wandb."""
    monkeypatch.setattr(runs, "check_installed", lambda names: None)
    monkeypatch.setattr(runs, "Trackers", lambda *given: Trackers(*given, make=lambda name: Fake(tmp_path / "there")))
    return tmp_path / "there"


def tracked(config: TrainConfig) -> TrainConfig:
    return replace(config, run=replace(config.run, track=("wandb",)))


def held(there: Path) -> dict[str, dict[int, dict[str, float]]]:
    """By run of the tracker, then step: what it holds. No step is there twice."""
    out: dict[str, dict[int, dict[str, float]]] = {}
    for path in sorted(there.iterdir()):
        found = [(step, values) for kind, step, values, *_ in (t for t in Fake.told(path) if t[0] == "row")]
        assert [step for step, _ in found] == sorted({step for step, _ in found})
        out[path.name] = dict(found)
    return out


def logged(where: Path) -> dict[int, dict[str, float]]:
    """By step: what metrics.jsonl and eval.jsonl hold."""
    out: dict[int, dict[str, float]] = {}
    for name in ("metrics.jsonl", "eval.jsonl"):
        for line in (where / "out" / name).read_text().splitlines():
            row = json.loads(line)
            out.setdefault(row.pop("step"), {}).update(row)
    return out


def test_a_tracker_gets_every_key_the_samples_and_the_summary(model: Path, tmp_path: Path, followed: Path) -> None:
    assert train(tracked(small_config(model, tmp_path, steps=5, eval_sentences=8, final_sentences=8))).exit_code == 0
    ((name, found),) = held(followed).items()
    assert found == logged(tmp_path) and any(key.startswith("eval/") for key in found[4])
    assert json.loads((tmp_path / "out" / RECORD).read_text())["runs"] == {"wandb": name}
    told = Fake.told(followed / name)
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [text for t in told if t[0] == "row" for text in t[3]] == [sample["text"] for sample in samples]
    assert told[0] == ["open", "out", 5]
    assert told[-2:] == [
        ["files", "summary", ["summary.json", "final_sentences.jsonl", "training_metrics.csv"]],
        ["close", True],
    ]


@pytest.mark.parametrize("kill_before", [1, 4])
def test_killed_and_resumed_it_goes_on_in_the_same_run_and_no_step_is_there_twice(
    model: Path, tmp_path: Path, followed: Path, monkeypatch: pytest.MonkeyPatch, kill_before: int
) -> None:
    plain, config = RunLog.step, tracked(small_config(model, tmp_path))

    def killed() -> int:
        def step(self: RunLog, number: int, *given: Any) -> None:
            if number == kill_before:
                os.kill(os.getpid(), 9)
            plain(self, number, *given)

        RunLog.step = step  # type: ignore[method-assign]
        return train(config).exit_code

    assert killing.exit_code(killing.in_child(killed)) == -9
    sent = max((step for found in held(followed).values() for step in found), default=0)
    assert sent <= kill_before - 1 and sent in (0, 2, 4)  # never more than a checkpoint holds
    assert train(config).exit_code == 0
    (found,) = held(followed).values()
    assert found == logged(tmp_path) and list(found) == [1, 2, 3, 4, 5, 6]


def trackers(tmp_path: Path, step: int, make: Callable[[str], Any], **options: float) -> Trackers:
    return Trackers(("wandb",), tmp_path, "a1", {"steps": 9}, step, make, **options)


def write_rows(folder: Path, last: int, shift: float = 0.0) -> None:
    lines = [json.dumps({"step": step, "reward/mean": step + shift}) + "\n" for step in range(1, last + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_a_process_killed_while_it_sends_leaves_no_gap_and_no_step_twice(tmp_path: Path) -> None:
    write_rows(tmp_path, 6)

    def dies(row: Row) -> bool:
        if row.step == 4:
            os.kill(os.getpid(), 9)
        return False

    def sends() -> int:
        trackers(tmp_path, 0, lambda name: Fake(tmp_path / "there", dies)).kept(6)
        threading.Event().wait()
        return 0

    assert killing.exit_code(killing.in_child(sends)) == -9
    assert list(held(tmp_path / "there")["a1"]) == [1, 2, 3]
    trackers(tmp_path, 6, lambda name: Fake(tmp_path / "there")).close()
    assert {name: list(found) for name, found in held(tmp_path / "there").items()} == {"a1": [1, 2, 3, 4, 5, 6]}


def test_steps_that_a_run_gave_up_stay_in_the_old_run_and_a_new_one_has_the_others(tmp_path: Path) -> None:
    write_rows(tmp_path, 6)
    followed = trackers(tmp_path, 6, lambda name: Fake(tmp_path / "there"))
    followed.rewind()
    write_rows(tmp_path, 4)
    followed.rewound(4)
    followed.rewind()  # a run only adds to its rows; here the file is written anew, which none may be reading
    write_rows(tmp_path, 7, 0.5)
    followed.kept(7)
    followed.close()
    assert any("a new run" in line for line in followed.notices())
    found = held(tmp_path / "there")
    assert found["a1"][6] == {"reward/mean": 6.0}
    assert list(found["a1-2"]) == [1, 2, 3, 4, 5, 6, 7] and found["a1-2"][6] == {"reward/mean": 6.5}
    # Likewise where a checkpoint was lost between two sessions, and where no tracker followed while the run went back.
    trackers(tmp_path, 5, lambda name: Fake(tmp_path / "there")).close()
    assert list(held(tmp_path / "there")["a1-3"]) == [1, 2, 3, 4, 5]
    Trackers((), tmp_path, "a1", {}, 5).rewound(3)
    trackers(tmp_path, 7, lambda name: Fake(tmp_path / "there")).close()
    assert list(held(tmp_path / "there")["a1-4"]) == [1, 2, 3, 4, 5, 6, 7]


def test_going_back_to_what_was_not_sent_yet_needs_no_new_run(tmp_path: Path) -> None:
    write_rows(tmp_path, 4)
    followed = trackers(tmp_path, 2, lambda name: Fake(tmp_path / "there"))
    followed.rewind()
    followed.rewound(2)
    followed.kept(4)
    followed.close()
    assert {name: list(found) for name, found in held(tmp_path / "there").items()} == {"a1": [1, 2, 3, 4]}


@pytest.mark.parametrize("at", [3])
def test_a_tracker_that_fails_is_one_line_and_the_run_is_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: int
) -> None:
    monkeypatch.setattr(runs, "check_installed", lambda names: None)
    fails: list[int] = [at]

    def make(name: str) -> Fake:
        return Fake(tmp_path / "there", lambda row: row.step in fails)

    monkeypatch.setattr(runs, "Trackers", lambda *given: Trackers(*given, make=make))
    one, other = small_config(model, tmp_path / "one"), small_config(model, tmp_path / "other")
    assert train(other).exit_code == 0
    capsys.readouterr()
    assert train(tracked(one)).exit_code == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "gets nothing more" in line]
    assert lines == [
        "wandb gets nothing more of this run (nobody answers); training goes on, and the same command later sends "
        "what is missing"
    ]
    for name in ("training_metrics.csv", "samples.jsonl", "model.safetensors"):
        assert (tmp_path / "one/out" / name).read_bytes() == (tmp_path / "other/out" / name).read_bytes()
    # The same command later sends what is missing, though the run itself is complete.
    fails.clear()
    assert train(tracked(one)).exit_code == 0
    (found,) = held(tmp_path / "there").values()
    assert found == logged(tmp_path / "one")


def test_of_two_trackers_one_fails_the_other_goes_on_and_two_resumes_leave_no_step_twice(tmp_path: Path) -> None:
    write_rows(tmp_path, 6)
    fails = {"wandb": 3}

    def session(step: int, *kept: int) -> list[str]:
        def make(name: str) -> Fake:
            return Fake(tmp_path / name, lambda row: row.step == fails.get(name))

        followed = Trackers(("wandb", "mlflow"), tmp_path, "a1", {}, step, make)
        for each in kept:
            followed.kept(each)
        followed.close()
        return [line for line in followed.notices() if "gets nothing more" in line]

    def both() -> list[list[int]]:
        return [list(steps) for name in ("wandb", "mlflow") for steps in held(tmp_path / name).values()]

    (line,) = session(0, 2, 4)
    assert line.startswith("wandb gets nothing more of this run (nobody answers)") and both() == [[1, 2], [1, 2, 3, 4]]
    fails["wandb"] = 5
    (line,) = session(4, 6)
    assert "wandb" in line and both() == [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]
    fails.clear()
    assert not session(6) and both() == [[1, 2, 3, 4, 5, 6]] * 2
    assert not session(6) and both() == [[1, 2, 3, 4, 5, 6]] * 2


def test_a_tracker_that_cannot_be_opened_or_hangs_does_not_hold_the_run_up(tmp_path: Path) -> None:
    write_rows(tmp_path, 2)

    class Closed(Fake):
        def open(self, start: Start) -> Opened:
            raise SystemExit("no key")

    followed = trackers(tmp_path, 2, lambda name: Closed(tmp_path / "there"))
    followed.kept(2)
    followed.close()
    (line,) = followed.notices()
    assert line.startswith("wandb gets nothing more of this run (no key)")

    class Hangs(Fake):
        def open(self, start: Start) -> Opened:
            threading.Event().wait()
            raise AssertionError

    followed = trackers(tmp_path, 2, lambda name: Hangs(tmp_path / "there"), opening=0.01)
    followed.kept(2)
    followed.rewind()
    followed.close()
    (line,) = followed.notices()
    assert line.startswith("wandb did not answer within 0.01 seconds")


def test_a_missing_package_is_refused_in_one_line_before_anything_is_made(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker, "PACKAGES", {"wandb": "not_there_a", "trackio": "not_there_b", "mlflow": "json"})
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--model", str(model), "--prompt", "raw", "--steps", "2", "--device", "cpu"]
    assert main([*arguments, "--track", "wandb", "--track=trackio", "--track", "mlflow"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    needed = "--track needs not_there_a and not_there_b, not installed here: pip install not_there_a not_there_b"
    assert said.endswith(needed)
    assert not list(tmp_path.iterdir())
    (tmp_path / "run.yaml").write_text("preset: bundled-cpu\ntrack: [trackio, wandb]\n")
    assert main([*arguments, "--config", "run.yaml", "--track", "wandb"]) == 2
    assert "--track needs not_there_b and not_there_a, not" in capsys.readouterr().err
    for words in (["--track"], ["--track", "other"], ["--track", "wandb", "mlflow"]):
        assert main([*arguments, *words]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_report_goes_to_the_trackers_of_its_run_and_one_that_fails_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, 2)
    trackers(tmp_path, 2, lambda name: Fake(tmp_path / "there")).close()
    page = tmp_path / "report.html"
    (line,) = attach(tmp_path, page, lambda name: Fake(tmp_path / "there"))
    assert line == "report.html is with wandb: a folder"
    assert Fake.told(tmp_path / "there/a1")[-2:] == [["files", "report", ["report.html"]], ["close", True]]
    (line,) = attach(tmp_path, page, lambda name: Fake(tmp_path / "metrics.jsonl"))
    assert line.startswith("wandb did not get report.html (")
    for folders in ([], ["--run", str(tmp_path / "there")]):
        assert main(["report", "rows.csv", *folders, "--track", "--output", str(page)]) == 2
        assert re.search("name the run's folder|names no tracker", capsys.readouterr().err)
    assert not page.exists()


def test_rows_are_those_of_the_files_with_numbers_that_json_lacks(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward/mean": 1.0}\n'
        '{"step": 2, "reward/mean": null, "nonfinite": {"reward/mean": "-inf"}}\n'
        '{"step": 3, "reward/mean": 2.0}\n{"step": 4, "rew'
    )
    (tmp_path / "eval.jsonl").write_text('{"step": 2, "eval/n": 8.0}\n')
    (tmp_path / "samples.jsonl").write_text('{"step": 3, "text": "a"}\n{"step": 3, "text": "b"}\n')
    assert rows(tmp_path, 1, 9) == [
        Row(2, {"reward/mean": float("-inf"), "eval/n": 8.0}),
        Row(3, {"reward/mean": 2.0}, [{"step": 3, "text": "a"}, {"step": 3, "text": "b"}]),
    ]


def test_the_records_of_a_wandb_file_are_read_across_its_blocks_and_to_where_it_was_cut() -> None:
    # LevelDB's log format, after seven bytes: (checksum, length, kind) before each piece, blocks of 32 KiB.
    def piece(data: bytes, kind: int) -> bytes:
        return b"\0\0\0\0" + len(data).to_bytes(2, "little") + bytes([kind]) + data

    long = bytes(range(256)) * 200
    room = 32768 - 7 - len(piece(b"one", 1)) - 7
    whole = b":W&B\0\0\0" + piece(b"one", 1) + piece(long[:room], 2) + piece(long[room:], 4)
    assert list(_records(whole + piece(b"last", 1))) == [b"one", long, b"last"]
    assert list(_records((whole + piece(b"last", 1))[:-1])) == [b"one", long]


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETER, reason="needs EQUIPOISE_TRACKERS: make test-slow")
@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "mlflow in files"])
def test_the_real_tracker_offline_holds_every_key_once_after_a_kill_and_a_resume(
    model: Path, tmp_path: Path, name: str
) -> None:
    environment = os.environ | {
        **{"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")},
        **{"MPLCONFIGDIR": str(tmp_path / "mpl"), "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
    }
    if name == "mlflow in files":
        environment |= {"MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
    script = [INTERPRETER, str(ROOT / "tests/ppo/with_trackers.py")]

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    kind = name.split()[0]
    assert call(str(model), ".", "5", "4", kind).returncode == -9
    done = call(str(model), ".", "5", "0", kind)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "gets nothing more" not in done.stdout
    shown = call("read", ".")
    assert shown.returncode == 0, shown.stderr[-3000:]
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("HELD ")]
    found = json.loads(line.removeprefix("HELD "))[kind]
    places = [(step, key) for step, key, _ in found["rows"]]
    assert len(places) == len(set(places))
    expected = logged(tmp_path)
    assert set(places) == {(step, key) for step, values in expected.items() for key in values}
    for step, key, value in found["rows"]:
        assert value == pytest.approx(expected[step][key], rel=1e-12)
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["text"]) for s in found["sentences"]] == [(s["step"], s["text"]) for s in samples]
    assert found["config"] and found["files"]


def test_this_program_needs_no_tracker(tmp_path: Path) -> None:
    code = (
        "import sys; from equipoise.ppo import log; from equipoise.ppo.tracking.trackers import ADAPTERS; "
        "[make() for make in ADAPTERS.values()]; "
        "sys.exit(any(name in sys.modules for name in ('wandb', 'trackio', 'mlflow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
