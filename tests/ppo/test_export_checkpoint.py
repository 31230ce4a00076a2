"""A checkpoint generated from and exported, as the end of its run would have been."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from equipoise import cli
from equipoise.policy import load
from equipoise.policy.source import resolve
from equipoise.policy.weights import load_model
from equipoise.ppo.train import train

from .small import small_config


@pytest.fixture(scope="module", params=[{}, {"tuning": "full"}, {"average_weights": 0.5}], ids=["lora", "full", "mean"])
def run(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("run")
    changes: dict[str, Any] = request.param
    train(small_config(model, where, steps=4, export="last", eval_sentences=0, **changes))
    return where


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("equipoise: ") and err.count("\n") == 1, err
    return err


def test_the_last_checkpoint_exports_to_what_the_run_left(run: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(run / "checkpoints" / "checkpoint-4"), "--output-dir", str(tmp_path / "x")]) == 0
    theirs, ours = run / "out", tmp_path / "x"
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "task.yaml"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    cards = [(folder / "README.md").read_text().splitlines() for folder in (theirs, ours)]
    differing = [(a, b) for a, b in zip(*cards, strict=True) if a != b]
    assert len(differing) == 1 and all(line.startswith("- Method: PPO, 4 steps of 8") for line in differing[0])
    record = json.loads((ours / "run.json").read_text())
    assert record["written_by"] == "equipoise" and record["exported_from"] == "checkpoint-4"


def test_the_base_is_merged_in_what_the_run_computed_in_whatever_auto_is_by_now(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_cpuinfo", lambda: "amx_bf16")
    train(small_config(model, tmp_path, steps=1, export="last", eval_sentences=0, dtype="auto"))
    monkeypatch.setattr(load, "_cpuinfo", lambda: "")
    command = ["export", str(tmp_path / "checkpoints" / "checkpoint-1"), "--device", "cpu", "--output-dir"]
    for name, more, same in (("auto", (), True), ("other", ("--dtype", "float32"), False)):
        assert cli.main([*command, str(tmp_path / name), *more]) == 0
        files = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", tmp_path / name)]
        assert (files[0] == files[1]) is same


def generate(model: Path, where: Path, *more: str) -> list[dict[str, str]]:
    argv = ["generate", "--model", str(model), "--n", "2", "--output", str(where), "--max-new-tokens", "8", *more]
    assert cli.main([*argv, "--device", "cpu", "--dtype", "float32"]) == 0
    with where.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_checkpoint_writes_the_sentences_of_its_export_with_the_runs_prompt_and_task(
    run: Path, tmp_path: Path
) -> None:
    middle = run / "checkpoints" / "checkpoint-2"
    assert cli.main(["export", str(middle), "--output-dir", str(tmp_path / "x")]) == 0
    direct, exported = generate(middle, tmp_path / "a.csv"), generate(tmp_path / "x", tmp_path / "b.csv")
    assert [row["Text"] for row in direct] == [row["Text"] for row in exported]
    assert {row["Model"] for row in direct} == {"checkpoint-2"} and {row["Label"] for row in direct} == {"RLHF"}
    settings = json.loads((tmp_path / "a.csv.json").read_text())["settings"]
    assert settings["prompt"] == "raw" and settings["task"]["name"] == "agentic-communal"
    weights, last = load_file(tmp_path / "x" / "model.safetensors"), load_file(run / "out" / "model.safetensors")
    assert any(not torch.equal(weights[name], last[name]) for name in weights)


def test_in_bfloat16_too_a_checkpoint_is_its_export(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "checkpoint-2"
    assert cli.main(["export", str(checkpoint), "--output-dir", str(tmp_path / "x")]) == 0
    ids = torch.arange(200)[None] % 40 + 3
    logits = [
        load_model(resolve(str(folder)), dtype=torch.bfloat16, device="cpu")(ids).logits
        for folder in (checkpoint, tmp_path / "x")
    ]
    assert torch.equal(*logits)


def test_what_is_no_checkpoint_or_does_not_fit_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / "checkpoints" / "checkpoint-2"
    out = ["--output-dir", str(tmp_path / "x")]
    assert "is no checkpoint" in refused(capsys, "export", str(run / "out"), *out)
    assert "is no checkpoint" in refused(capsys, "export", str(tmp_path / "nowhere"), *out)
    copy = tmp_path / "checkpoint-2"
    for name, data in (("config.json", b"[" * 100_000), ("weights.safetensors", b"x")):
        copy.mkdir(exist_ok=True)
        for path in checkpoint.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / name).write_bytes(data)
        assert "damaged" in refused(capsys, "export", str(copy), *out)
    assert "damaged" in refused(
        capsys, "generate", "--model", str(copy), "--output", str(tmp_path / "a.csv"), "--device", "cpu"
    )
    copy.rename(tmp_path / "mine")
    assert "checkpoint-STEP" in refused(capsys, "export", str(tmp_path / "mine"), *out)
    assert not (tmp_path / "x").exists()


def test_an_export_replaces_nothing_but_an_export(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(run / "checkpoints" / "checkpoint-2"), "--output-dir"]
    assert "holds a run" in refused(capsys, *command, str(run / "out"), "--overwrite")
    assert cli.main([*command, str(tmp_path / "x")]) == 0
    assert "already" in refused(capsys, *command, str(tmp_path / "x"))
    assert cli.main([*command, str(tmp_path / "x"), "--overwrite"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    assert "README.md is there" in refused(capsys, *command, str(tmp_path / "mine"), "--overwrite")
    assert os.listdir(tmp_path / "mine") == ["README.md"]
