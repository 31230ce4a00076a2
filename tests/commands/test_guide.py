"""`train_rlhf.py` as the guide's reader uses it: run as it is, with a constant edited, with `use_8bit` edited."""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from equipoise import cli
from equipoise.commands.guide import NUMBERS, GuideRun
from equipoise.commands.train import configure
from equipoise.errors import UserError
from equipoise.methods import target
from equipoise.policy import load, reference
from equipoise.policy.config import LLAMA_8B, PolicyConfig
from equipoise.ppo.config import TrainConfig
from equipoise.runs.command import typed
from tests.ppo.started import ROOT, options
from tests.tiny import tiny_folder

SCRIPT = (ROOT / "train_rlhf.py").read_text()
CALL = "model, ref_model, tokenizer = setup_model_and_tokenizer(use_8bit=False)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def run_edited(tmp_path: Path, argv: list[str], *edits: tuple[str, str]) -> int:
    """The exit code of a copy of the script with each (before, after) edited, called with `argv`."""
    text = SCRIPT
    for before, after in edits:
        assert text.count(before) == 1
        text = text.replace(before, after)
    script = tmp_path / "train_rlhf.py"
    script.write_text(text)
    return cli.run_command(runpy.run_path(str(script))["main"], argv)


def without(argv: list[str], *names: str) -> list[str]:
    """Options, each with one value, less those named."""
    pairs = zip(argv[::2], argv[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in names for word in pair]


def test_the_script_fits_a_screen_and_opens_with_the_guides_numbers_and_its_line() -> None:
    assert len(SCRIPT.splitlines()) <= 50 and SCRIPT.count(CALL) == 1
    written = dict(re.findall(r"^([A-Z_]+) = (\S+)$", SCRIPT, re.MULTILINE))
    assert {name: float(value) for name, value in written.items()} == {
        **{"BATCH_SIZE": 64, "MINI_BATCH_SIZE": 16, "PPO_EPOCHS": 4},
        **{"LEARNING_RATE": 1e-5, "TARGET_KL": 0.03, "TRAINING_STEPS": 2000},
    }
    assert set(written) == set(NUMBERS)


def test_unedited_it_trains_what_the_command_trains_to_the_byte(model: Path, tmp_path: Path) -> None:
    script, command = tmp_path / "script", tmp_path / "command"
    assert run_edited(tmp_path, options(model, script, "--steps", "2")) == 0
    assert cli.main(["train", *options(model, command, "--steps", "2")]) == 0
    for name in ("training_metrics.csv", "model.safetensors"):
        assert (script / "out" / name).read_bytes() == (command / "out" / name).read_bytes()
    assert "edited" not in json.loads((script / "out" / "run.json").read_text())


def test_a_target_is_written_before_the_script_trains_as_before_the_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(config: TrainConfig) -> TrainConfig:
        raise UserError(f"asked for {config.warm_start.warm_start_target}")

    monkeypatch.setattr(target, "prepared", written)
    argv = [*options(model, tmp_path), "--warm-start-target", "near"]
    assert run_edited(tmp_path, argv) == 2 and cli.main(["train", *argv]) == 2
    assert capsys.readouterr().err == 2 * "equipoise: asked for near\n"


def test_an_edited_constant_is_what_the_run_uses_and_it_goes_on_or_is_complete(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = without(options(model, tmp_path), "--batch-size")
    edits = (("\nBATCH_SIZE = 64", "\nBATCH_SIZE = 12"), ("TRAINING_STEPS = 2000", "TRAINING_STEPS = 2"))
    assert run_edited(tmp_path, argv, *edits) == 0
    out = capsys.readouterr().out
    assert "--batch-size 12, from BATCH_SIZE in train_rlhf.py" in out
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["config"]["ppo"]["batch_size"] == 12 and record["config"]["steps"] == 2
    assert record["edited"] == {"BATCH_SIZE": 12, "TRAINING_STEPS": 2} and record["command"] == typed()
    assert run_edited(tmp_path, argv, *edits) == 0
    assert "this run is complete (2 steps)" in capsys.readouterr().out
    assert run_edited(tmp_path, [*argv, "--steps", "3"], *edits) == 0
    assert "--steps from the command line, not TRAINING_STEPS = 2" in capsys.readouterr().out
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


def test_use_8bit_in_the_line_is_the_option(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_edited(tmp_path, options(model, tmp_path), (CALL, CALL.replace("False", "True"))) == 2
    printed = capsys.readouterr()
    assert "--use-8bit, from setup_model_and_tokenizer(use_8bit=True)" in printed.out
    said = "--use-8bit needs a CUDA GPU: leave it out on a CPU (in train_rlhf.py: use_8bit=False)"
    assert printed.err == f"equipoise: {said}\n"
    assert not (tmp_path / "out").exists()


def test_no_use_8bit_on_the_line_wins_over_the_script(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*options(model, tmp_path, "--steps", "1"), "--No_use_8bit"]
    assert run_edited(tmp_path, argv, (CALL, CALL.replace("False", "True"))) == 0
    assert "--no-use-8bit from the command line, not use_8bit=True of train_rlhf.py" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert not record["config"]["policy"]["use_8bit"] and "edited" not in record


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("\nBATCH_SIZE = 64", "\nBATCH_SIZE = 50", "(from BATCH_SIZE in train_rlhf.py)"),
        ("LEARNING_RATE = 1e-5", "LEARNING_RATE = 'high'", "--learning-rate 'high' is no number;"),
        ("LEARNING_RATE = 1e-5", "LEARNING_RATE = 'high'", "(from LEARNING_RATE in train_rlhf.py)"),
        ("TRAINING_STEPS = 2000", "TRAINING_STEPS = 1.5", "(from TRAINING_STEPS in train_rlhf.py)"),
        ('"TARGET_KL": TARGET_KL', '"TARGET_KL": TARGET_KL, "KL_COEFF": 0.1', "perhaps you meant --kl-coef"),
    ],
)
def test_a_constant_that_cannot_be_is_named(
    before: str, after: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_edited(tmp_path, ["--preset", "guide"], (before, after)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_constant_of_ones_own_in_the_list_is_the_option_of_that_name() -> None:
    assert GuideRun(NUMBERS | {"KL_COEF": 0.5}).edited == {"KL_COEF": 0.5}
    config, lines, _ = configure(["--preset", "guide"], {"KL_COEF": 0.5}, "train_rlhf.py")
    assert config.ppo.kl_coef == 0.5 and "option    --kl-coef 0.5, from KL_COEF in train_rlhf.py" in lines


def test_called_from_elsewhere_it_loads_the_guides_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PolicyConfig] = []

    def loaded(config: PolicyConfig, prompt: Any) -> Any:
        asked.append(config)
        return SimpleNamespace(model="model", tokenizer="tokenizer")

    monkeypatch.setattr(load, "load_policy", loaded)
    monkeypatch.setattr(reference, "reference_of", lambda policy: f"reference of {policy.model}")
    setup = runpy.run_path(str(ROOT / "train_rlhf.py"))["setup_model_and_tokenizer"]
    assert setup(use_8bit=True) == ("model", "reference of model", "tokenizer")
    assert asked[0].model == LLAMA_8B and asked[0].use_8bit


def test_a_model_that_is_not_the_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="what setup_model_and_tokenizer returned"):
        GuideRun(NUMBERS).train("another", None, None)
