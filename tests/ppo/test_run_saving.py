"""When a run is saved, what is written beside training, and runs whose files were damaged."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from equipoise.errors import UserError
from equipoise.ppo import run as runs
from equipoise.ppo import train as loop
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.run import Run
from equipoise.ppo.train import Outcome, train
from tests.default import score

from .small import checkpoints, results, small_config
from .started import EVERYTHING


def test_slow_steps_are_saved_between_the_multiples_of_save_every_and_the_newest_of_those_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = iter(range(0, 100_000, 6))  # every look at the clock is six minutes later than the last
    monkeypatch.setattr(runs.time, "monotonic", lambda: 60.0 * next(minutes))
    seen: list[list[int]] = []

    def reward(texts: Sequence[str], _: Sequence[str]) -> list[float]:
        seen.append(checkpoints(tmp_path))
        return [score(text).reward for text in texts]

    train(small_config(model, tmp_path, steps=7, save_every=4, save_minutes=10.0), reward)
    assert [] in seen[:2] and [2] in seen and [4] in seen and [4, 6] in seen
    assert checkpoints(tmp_path) == [4, 7]


def test_the_lock_is_released_when_the_run_is_closed(model: Path, tmp_path: Path) -> None:
    config = small_config(model, tmp_path)
    for _ in range(2):
        with Run.open(config, overwrite=False) as run:
            assert run.resumed is None and not run.complete


def save_beside_training(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Run.__init__

    def beside(self: Run, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self._asynchronous = True

    monkeypatch.setattr(Run, "__init__", beside)


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["lora float32", "everything bfloat16"])
def test_checkpoints_written_while_training_goes_on_hold_the_state_of_their_step(
    model: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(small_config(model, tmp_path / "waits", **changes)) == Outcome("done", 6, 0)
    plain, late, begun, changed = runs.save_checkpoint, [], [0], threading.Condition()
    step = loop.ppo_step

    def stepping(training: Any) -> Any:
        with changed:
            begun[0] = training.state.step + 1
            changed.notify_all()
        return step(training)

    monkeypatch.setattr(loop, "ppo_step", stepping)

    def slow(*args: Any, **kwargs: Any) -> Path:
        if args[1] < 6:
            with changed:
                assert changed.wait_for(lambda: begun[0] > args[1], 60), "no step begins while a checkpoint is written"
        late.append(args[1])
        return plain(*args, **kwargs)

    monkeypatch.setattr(runs, "save_checkpoint", slow)
    save_beside_training(monkeypatch)
    assert train(small_config(model, tmp_path / "beside", **changes)) == Outcome("done", 6, 0)
    assert late
    assert checkpoints(tmp_path / "beside") == checkpoints(tmp_path / "waits")
    assert results(tmp_path / "beside", 6) == results(tmp_path / "waits", 6)


def test_what_goes_wrong_with_a_checkpoint_written_beside_training_is_said_in_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Path:
        raise UserError("cannot save checkpoint-2 (No space left on device): free some disk space")

    monkeypatch.setattr(runs, "save_checkpoint", full)
    save_beside_training(monkeypatch)
    with pytest.raises(UserError, match="No space left"):
        train(small_config(model, tmp_path))


def test_a_run_whose_last_checkpoint_is_not_on_the_disk_is_not_complete(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = runs.save_checkpoint

    def full(*args: Any, **kwargs: Any) -> Path:
        if args[1] == 3:
            raise UserError("cannot save checkpoint-3 (No space left on device): free some disk space")
        return plain(*args, **kwargs)

    monkeypatch.setattr(runs, "save_checkpoint", full)
    save_beside_training(monkeypatch)
    with pytest.raises(UserError, match="No space left"):
        train(small_config(model, tmp_path, steps=3))
    assert checkpoints(tmp_path) == [2] and not list((tmp_path / "out").glob("*.safetensors"))
    monkeypatch.undo()
    assert train(small_config(model, tmp_path, steps=3)) == Outcome("done", 3, 0)
    assert checkpoints(tmp_path) == [2, 3] and list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl", "run.json"])
def test_a_damaged_record_does_not_keep_a_finished_run_from_its_model(
    finished: TrainConfig, tmp_path: Path, name: str
) -> None:
    model = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "model.safetensors").unlink()  # as if killed at the very end
    with (tmp_path / "out" / name).open("r+b") as file:
        file.write(b"\xff\x00[[\n")
    assert train(finished) == Outcome("done", 2, 0)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model
    assert (tmp_path / "out" / f"{name}.damaged-1").exists()


def test_a_log_damaged_on_the_way_does_not_keep_a_run_from_its_model(model: Path, tmp_path: Path) -> None:
    def reward(texts: Sequence[str], _: Sequence[str]) -> list[float]:
        for name in ("events.jsonl", "metrics.jsonl"):
            with (tmp_path / "out" / name).open("ab") as file:
                file.write(b"\xff{\n[]\n" + b"[" * 100_000 + b"\n")
        return [score(text).reward for text in texts]

    assert train(small_config(model, tmp_path, steps=2), reward) == Outcome("done", 2, 0)


def test_runs_of_one_name_in_several_folders_are_several_in_tensorboard(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("a", "b", "../elsewhere"):
        config = small_config(model, Path(place), steps=1, tensorboard_dir="runs")
        assert train(config).exit_code == 0
    boards = {str(path.parent.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").rglob("events.out*")}
    outside = Path("root", *(tmp_path.parent / "elsewhere" / "out").resolve().parts[1:])
    assert boards == {"a/out", "b/out", str(outside)}
