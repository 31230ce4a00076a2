"""A run that must not go on, or not as it was asked to, is refused in one line, and nothing is lost."""

import dataclasses
import json
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from equipoise import cli
from equipoise.errors import UserError
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.run import Run
from equipoise.ppo.train import Outcome, train
from tests.killing import exit_code, in_child
from tests.tiny import words_folder

from .small import results, rows, small_config
from .started import options, own, refused, snapshot, work


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


@pytest.mark.parametrize(
    "file",
    [
        "optimizer.safetensors",
        "manifest.json",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("weights.safetensors", "state.json")),
    ],
)
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
