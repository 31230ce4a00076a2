"""A run on disk: killed, stopped, resumed, refused. Real processes, a tiny model, every byte compared."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import cli
from equipoise.errors import UserError
from equipoise.ppo import run as runs
from equipoise.ppo import train as loop
from equipoise.ppo.claim import FREE_TO_CHANGE
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.run import Run
from equipoise.ppo.train import Outcome, train
from equipoise.runs.records import differences
from tests.default import score
from tests.killing import counted, exit_code, in_child, killed_until_done
from tests.tiny import words_folder

from .small import checkpoints, events, results, rows, small_config

ROOT = Path(__file__).parents[2]

# All that has a state: adaptive coefficient, diversity window, warm start, weights in bfloat16 beside masters.
EVERYTHING = {
    "tuning": "full", "dtype": "bfloat16", "learning_rate": 1e-3, "diversity_weight": 0.1, "ref_kl_target": 1.0,
    "kl_horizon": 100, "warm_start": "forced", "warm_start_sentences": 16, "warm_start_epochs": 1,
    "entropy_coef": 0.01, "keep_checkpoints": 2, "save_every": 3, "temperature": 0.9, "top_p": 0.95,
    "missing_eos_penalty": 0.1, "strict_bonus": 0.1, "average_weights": 0.9, "diversity_on": "both",
    "opening_weight": 0.1, "base_samples": 8, "eval_sentences": 12, "value_warmup_steps": 1, "decay_steps": 6,
}  # fmt: skip


def own(texts: Sequence[str], _: Sequence[str]) -> list[float]:
    return [score(text).reward for text in texts]


def work(config: TrainConfig, reward: Callable[..., Any] = own) -> Callable[[], int]:
    def run() -> int:
        with open(os.devnull, "w") as nowhere:
            sys.stdout = nowhere
            return train(config, reward).exit_code

    return run


@pytest.mark.parametrize("changes", [{"save_every": 1}, EVERYTHING], ids=["lora float32", "everything bfloat16"])
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


def options(model: Path, where: Path, *more: str) -> list[str]:
    return [
        *("--preset", "bundled-cpu", "--model", str(model), "--prompt", "raw", "--dtype", "float32", "--device", "cpu"),
        *("--batch-size", "8", "--mini-batch-size", "4", "--max-new-tokens", "8", "--save-every", "5"),
        *("--warm-start", "off", "--base-samples", "16", "--eval-sentences", "0", "--final-sentences", "0"),
        *("--output-dir", str(where / "out"), "--checkpoint-dir", str(where / "checkpoints")),
        *("--tensorboard-dir", str(where / "runs"), *more),
    ]


def test_a_real_process_stopped_by_sigterm_exits_143_saved_and_the_same_command_goes_on(
    model: Path, tmp_path: Path
) -> None:
    stopped = tmp_path / "stopped"
    command = [sys.executable, "train_rlhf.py", *options(model, stopped, "--steps", "100000")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line.startswith("step 3/") for line in process.stdout), "the run did not begin"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
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


# What is refused


@pytest.fixture
def finished(model: Path, tmp_path: Path) -> TrainConfig:
    """A run that has ended, in `tmp_path`."""
    config = small_config(model, tmp_path, steps=2)
    train(config)
    return config


def snapshot(where: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(where.rglob("*")) if p.is_file() and "runs" not in p.parts}


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line on standard error with which the command ended, code 2."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("equipoise: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def test_other_settings_on_a_run_are_refused_with_the_differences_and_code_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *options(model, tmp_path, "--steps", "2")]) == 0
    before = snapshot(tmp_path)
    changed = options(model, tmp_path, "--steps", "2", "--clip", "0.3", "--prompt", "mine=Of {occupation}.")
    err = refused(capsys, ["train", *changed])
    assert "(prompt: raw → mine=Of {occupation}.; clip: 0.2 → 0.3)" in err and "--overwrite" in err
    assert snapshot(tmp_path) == before


def test_a_run_goes_on_with_the_prompts_it_began_with_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = words_folder(tmp_path / "model", prompt=None, chat=True)
    template = model / "chat_template.jinja"
    began_with = template.read_text()

    def argv(steps: int, *more: str) -> list[str]:
        return ["train", *options(model, tmp_path, "--steps", str(steps), "--prompt", "describe", *more)]

    assert cli.main(argv(2)) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())["prompts"]
    saved = json.loads((tmp_path / "checkpoints" / "checkpoint-2" / "prompts.json").read_text())
    assert list(record) == ["prompts"] and re.fullmatch("[0-9a-f]{64}", record["prompts"]) and saved == record

    template.write_text(began_with + "{% if false %}{{ strftime_now('%Y') }}{% endif %}")  # asks for a date
    assert "(prompt-date: None → 2024-07-26)" in refused(capsys, argv(4))
    template.write_text("Be brief." + began_with)
    before = snapshot(tmp_path)
    err = refused(capsys, argv(4))
    assert f"prompts were rendered otherwise (prompts: {record['prompts']} →" in err and "--overwrite" in err
    # Another output folder is no way round it, nor is an old one whose checkpoints are gone.
    assert "name that --output-dir" in refused(capsys, argv(4, "--output-dir", str(tmp_path / "elsewhere")))
    # What does not render is refused before anything of the old run is removed.
    template.write_text("{{ raise_exception('no') }}")
    assert "cannot begin the answer" in refused(capsys, argv(4, "--overwrite"))
    template.write_text("Be brief." + began_with)
    assert snapshot(tmp_path) == before
    template.write_text(began_with)
    assert cli.main(argv(4)) == 0
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_what_has_no_influence_on_the_numbers_may_change(finished: TrainConfig, model: Path, tmp_path: Path) -> None:
    longer = small_config(model, tmp_path, steps=4, save_every=1, gradient_checkpointing=True, preset="guide")
    assert train(longer) == Outcome("done", 4, 0)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_fewer_steps_than_were_made_are_refused(finished: TrainConfig, model: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="at step 2, past --steps 1"):
        train(small_config(model, tmp_path, steps=1))
    assert snapshot(tmp_path) == before


def test_a_complete_run_says_so_and_changes_nothing(
    finished: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert train(finished) == Outcome("done", 2, 0)
    assert "this run is complete (2 steps): raise --steps to go on" in capsys.readouterr().out
    assert snapshot(tmp_path) == before


def test_overwrite_starts_anew_and_leaves_other_files_alone(finished: TrainConfig, model: Path, tmp_path: Path) -> None:
    first = results(tmp_path, 2)
    (tmp_path / "out" / "rlhf_llama3_completions.csv").write_text("mine")
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    other = small_config(model, tmp_path, steps=2, seed=9)
    assert train(other, overwrite=True) == Outcome("done", 2, 0)
    assert results(tmp_path, 2)["training_metrics.csv"] != first["training_metrics.csv"]
    assert (tmp_path / "out" / "rlhf_llama3_completions.csv").read_text() == "mine"
    assert (tmp_path / "out" / "notes").is_dir() and (tmp_path / "checkpoints" / "notes.txt").read_text() == "mine"
    train(finished, overwrite=True)
    assert results(tmp_path, 2) == first


def test_a_finished_model_whose_checkpoints_are_elsewhere_is_not_overwritten(
    finished: TrainConfig, model: Path, tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"finished model.*no checkpoint.*--overwrite"):
        train(small_config(model, tmp_path, steps=2, checkpoint_dir=str(tmp_path / "other")))
    assert snapshot(tmp_path) == before and not (tmp_path / "other").exists()


def test_the_records_of_another_run_are_not_cut_because_only_the_checkpoints_are_new(
    model: Path, tmp_path: Path
) -> None:
    train(small_config(model, tmp_path, steps=3))
    (tmp_path / "out" / "model.safetensors").unlink()  # as if it had been stopped on the way
    metrics = (tmp_path / "out" / "training_metrics.csv").read_bytes()
    with pytest.raises(UserError, match=r"out holds a run with other settings .seed: 0 → 5"):
        train(small_config(model, tmp_path, steps=3, seed=5, checkpoint_dir=str(tmp_path / "other")))
    assert (tmp_path / "out" / "training_metrics.csv").read_bytes() == metrics


def test_settings_may_be_mended_after_a_start_that_failed(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--prompt raw"):
        train(small_config(model, tmp_path, prompt="describe"))
    assert train(small_config(model, tmp_path, prompt="raw")) == Outcome("done", 6, 0)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "data.csv", "pytorch_model.bin"])
def test_an_output_folder_with_somebody_elses_files_is_refused(
    model: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    for more in ([], ["--overwrite"]):
        assert "no run of equipoise wrote" in refused(capsys, ["train", *options(model, tmp_path, *more)])
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "mine"


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_flipped_bit_in_the_newest_checkpoint_is_found_and_refused(
    model: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(model, tmp_path, steps=4))
    damaged = tmp_path / "checkpoints" / "checkpoint-4" / file
    data = bytearray(damaged.read_bytes())
    # In its middle a manifest may hold the checksum of another file.
    data[0 if file == "manifest.json" else len(data) // 2] ^= 0x10
    damaged.write_bytes(data)
    with pytest.raises(
        UserError, match=f"{file} is damaged.*checkpoint-4 away and rerun to continue from checkpoint-2"
    ):
        train(small_config(model, tmp_path))
    damaged.parent.rename(tmp_path / "damaged")
    straight = tmp_path / "straight"
    for where in (tmp_path, straight):
        assert train(small_config(model, where)) == Outcome("done", 6, 0)
    assert results(tmp_path, 6) == results(straight, 6)


def test_a_damaged_checkpoint_ends_the_command_with_code_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", *options(model, tmp_path, "--steps", "2")]
    assert cli.main(argv) == 0
    (tmp_path / "checkpoints" / "checkpoint-2" / "weights.safetensors").write_bytes(b"")
    assert "weights.safetensors is damaged" in refused(capsys, argv)


def test_a_second_process_on_the_same_run_is_refused(model: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def reward(texts: Sequence[str], occupations: Sequence[str]) -> list[float]:
        os.write(writer, b".")
        return own(texts, occupations)

    child = in_child(work(small_config(model, tmp_path, steps=100_000), reward))
    os.close(writer)
    try:
        assert os.read(reader, 1), "the run did not begin"
        with pytest.raises(UserError, match=r"another process is training in .*checkpoints"):
            Run.open(small_config(model, tmp_path, steps=100_000), overwrite=False)
    finally:
        os.kill(child, signal.SIGKILL)
        exit_code(child)
    # The dead hold no lock.
    assert train(small_config(model, tmp_path, steps=len(rows(tmp_path)) + 50)).exit_code == 0


def test_one_process_may_train_twice_in_a_row_in_one_folder(finished: TrainConfig, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        train(small_config(model, tmp_path, seed=4))
    assert train(finished) == Outcome("done", 2, 0)


def test_sentences_that_the_model_has_no_place_for_are_refused_before_anything_is_made_or_removed(
    finished: TrainConfig, model: Path, tmp_path: Path
) -> None:
    def everything() -> list[tuple[str, bytes]]:
        return sorted((str(p), p.read_bytes() if p.is_file() else b"") for p in tmp_path.rglob("*"))

    before = everything()
    for config in (finished, small_config(model, tmp_path / "new")):
        long = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, max_new_tokens=100_000))
        for overwrite in (False, True):
            with pytest.raises(UserError, match=r"positions of the model|other settings"):
                train(long, overwrite=overwrite)
            assert everything() == before


@pytest.mark.parametrize("folder", ["output_dir", "checkpoint_dir", "tensorboard_dir"])
def test_a_file_in_the_way_of_a_folder_is_refused(model: Path, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write"):
            train(small_config(model, tmp_path, **{folder: str(place)}))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write to /proc/nothing .*choose a writable folder"):
        train(small_config(model, tmp_path, output_dir="/proc/nothing"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--stepz", "3"], "--stepz"),
        (["--steps", "many"], "--steps"),
        (["--preset", "gide"], "no preset 'gide'"),
        (["--preset"], "--preset"),
        (["--config"], "--config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--prompt", "studdy"], "no prompt 'studdy'"),
        (["--model", "./nowhere"], "nowhere"),
        (["--model", "bundeld"], "bundeld"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--use-8bit"], "--use-8bit"),
        (["--batch-size", "7"], "7 is not a multiple"),
        (["--learning-rate", "nan"], "learning-rate"),
        (["--base-both", "inf"], "base_both"),
        (["--output-dir", __file__], "cannot write to"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    model: Path, tmp_path: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert says in refused(capsys, ["train", *options(model, tmp_path), *more])
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


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
