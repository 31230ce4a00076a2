"""A whole study of a tiny model: every method's file, what one failure costs, and being killed."""

import dataclasses
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from equipoise.cli import main
from equipoise.errors import UserError
from equipoise.methods import study as studies
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.study import METHODS, StudyConfig, StudyOutcome, study
from equipoise.policy import load
from equipoise.protocol.task import PROTOCOL
from tests.killing import counted, killed_until_done
from tests.tiny import words_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "base", prompt=None)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))


def config(base: Path, folder: Path, **changes: Any) -> StudyConfig:
    settings: dict[str, Any] = {
        "n": 2, "prompt": "raw", "best_prompt": "raw", "budget": 100, "batch_size": 16, "dtype": "float32",
        "device": "cpu", "kl_sentences": 20, "sft_epochs": 1, "sft_sentences": 40,
        "ctrlg": CtrlGConfig(hidden_states=8, distil_sentences=200, em_passes=3),
    }  # fmt: skip
    return StudyConfig(output_dir=folder, model=str(base), **(settings | changes))


def trained(base: Path, folder: Path) -> Path:
    """As training with PPO would leave it."""
    words_folder(folder, seed=5, prompt=None)
    record = {"config": {"prompt": "raw", "system": "", "policy": {"model": str(base)}}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def quiet(_line: str) -> None:
    pass


def contents(folder: Path) -> dict[str, Any]:
    """All that a study leaves, without what time decides."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.csv")):
        found[path.name] = path.read_bytes()
    for path in sorted(folder.rglob("*.costs.json")):
        document = json.loads(path.read_text())
        found[path.name] = {key: value for key, value in document.items() if "seconds" not in key}
    return found


@pytest.mark.slow
def test_every_method_has_its_file_its_account_and_its_place_in_the_record(base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "study"
    outcome = study(config(base, folder, trained=str(trained(base, tmp_path / "ppo"))), said.append)
    assert outcome.status == dict.fromkeys(METHODS, "done") and outcome.exit_code == 0
    record = json.loads((folder / "study.json").read_text())
    assert set(record) == {"written_by", "settings", "methods", "provenance"}
    assert list(record["methods"]) == list(METHODS)
    assert record["settings"]["n"] == 2 and record["settings"]["budget"] == 100
    for method, entry in record["methods"].items():
        lines = (folder / entry["completions"]).read_text().splitlines()
        assert len(lines) == 41 and all(f",{method},0" in line for line in lines[1:])
        account = json.loads((folder / entry["costs"]).read_text())
        assert account["method"] == method and account["rows"] == 40 and account["kl"]["high"] >= 0
        assert ("raw" in entry) == (method == "gen-filter")
    assert (folder / record["methods"]["gen-filter"]["raw"]).exists()
    assert (folder / record["methods"]["sft"]["model"] / "model.safetensors").exists()
    assert {path.stem for path in folder.glob("*.csv")} == {*METHODS, "gen-filter.raw"}  # nothing to be mistaken
    assert len((folder / "sft_model" / "sentences.csv").read_text().splitlines()) == 41  # its own, no other method's
    accounts = {m: json.loads((folder / f"{m}.csv.costs.json").read_text()) for m in METHODS}
    assert accounts["prompt-only"]["kl"]["value"] == 0 == accounts["prompt-best"]["kl"]["value"]  # one prompt here
    assert accounts["ppo"]["kl"]["low"] > 0
    assert accounts["ctrlg"]["accepted"] == 40 and accounts["ctrlg"]["ess"] > 1
    assert len(accounts["ctrlg"]["log_weights"]["nurse"]) == 2
    for method in METHODS:  # one line each
        assert any(line.startswith(f"{method}  done: 40 rows") for line in said)
    # Again: nothing is made anew.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.csv")}
    assert study(config(base, folder, trained=str(tmp_path / "ppo")), quiet).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.csv")} == before


@pytest.mark.slow
@pytest.mark.parametrize("data", ["ctrlg", "gen-filter", "file"])
def test_sft_learns_from_other_sentences_where_it_is_told_to(base: Path, tmp_path: Path, data: str) -> None:
    folder, said = tmp_path / "study", list[str]()
    path = {
        "ctrlg": folder / "sft_data" / "ctrlg.csv",
        "gen-filter": folder / "gen-filter.csv",
        "file": tmp_path / "mine.csv",
    }[data]
    pairs = [(a, c) for a in PROTOCOL.classes[0].terms for c in PROTOCOL.classes[1].terms][:30]
    lines = [f"chef,The chef was {a} and {c} in a nurse ." for a, c in pairs]
    (tmp_path / "mine.csv").write_text("\n".join(["Occupation,Text", *lines]))
    methods = "gen-filter,sft" if data == "gen-filter" else "sft"
    wanted = config(base, folder, methods=methods, sft_data=str(path) if data == "file" else data, budget=1000)
    assert study(wanted, said.append).status["sft"] == "done"
    assert any(line.startswith(f"{path}: ") and " rows (" in line for line in said)
    assert not (folder / "sft_model" / "sentences.csv").exists()


def test_a_method_that_fails_leaves_the_others_and_can_be_made_up_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sample = tmp_path / "study", studies.sample
    wanted = config(base, folder, methods="prompt-only, ppo,gen-filter", kl_sentences=0)

    def broken(config: Any, *args: Any) -> Any:
        if config.method == "gen-filter":
            raise RuntimeError("a defect")
        return sample(config, *args)

    monkeypatch.setattr(studies, "sample", broken)
    outcome = study(wanted, quiet)
    assert outcome.status["prompt-only"] == "done"
    assert outcome.status["gen-filter"] == "failed: RuntimeError: a defect" and outcome.exit_code == 1
    assert outcome.status["ppo"].startswith("failed: there is no model in ./rlhf_llama3_7b_output yet")
    assert "a defect" in capsys.readouterr().err  # with its traceback
    record = json.loads((folder / "study.json").read_text())["methods"]
    assert record["ppo"]["status"].startswith("failed") and "completions" not in record["ppo"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    outcome = study(config(base, folder, methods="gen-filter", kl_sentences=0), quiet)
    assert (outcome.status, outcome.exit_code) == ({"gen-filter": "done"}, 0)
    record = json.loads((folder / "study.json").read_text())["methods"]
    assert record["prompt-only"]["status"] == record["gen-filter"]["status"] == "done"


def test_the_trained_model_tells_base_model_and_prompt(base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    trained(base, tmp_path / "rlhf_llama3_7b_output")  # where training leaves it: found by itself
    study(config(base, tmp_path / "study", prompt=None, methods="ppo", kl_sentences=0), said.append)
    assert "prompt raw" in said[0] and said[1] == "ppo is the model in ./rlhf_llama3_7b_output"
    settings = json.loads((tmp_path / "study" / "study.json").read_text())["settings"]
    assert (settings["model"], settings["prompt"]) == (str(base), "raw")


def test_other_settings_are_refused_with_the_differences_and_other_methods_are_not(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    study(config(base, folder, methods="prompt-only", kl_sentences=0), quiet)
    with pytest.raises(UserError, match=r"other settings \(seed: 0 → 1\).*--overwrite"):
        study(config(base, folder, methods="prompt-only", kl_sentences=0, seed=1), quiet)
    study(config(base, folder, methods="prompt-best", kl_sentences=0), quiet)
    anew = study(config(base, folder, methods="prompt-only", kl_sentences=0, seed=1, overwrite=True), quiet)
    assert anew.exit_code == 0
    assert list(json.loads((folder / "study.json").read_text())["methods"]) == ["prompt-only"]


def test_the_record_holds_numbers_where_defaults_were_left(base: Path, tmp_path: Path) -> None:
    def settings(folder: str, **changes: Any) -> dict[str, Any]:
        left: dict[str, Any] = {"budget": None, "sft_sentences": None, "methods": "prompt-only", "kl_sentences": 0}
        study(config(base, tmp_path / folder, **(left | changes)), quiet)
        return dict(json.loads((tmp_path / folder / "study.json").read_text())["settings"])

    found = settings("study")
    assert (found["top_p"], found["ctrlg_top_p"]) == (0.95, 1.0)
    assert (found["budget"], found["sft_sentences"]) == (5 * 20 * 2, 300)
    of_all = settings("other", top_p=0.9)
    assert (of_all["top_p"], of_all["ctrlg_top_p"]) == (0.9, 0.9)
    with pytest.raises(UserError, match=r"other settings \(ctrlg-top-p: 1.0 → 0.95\)"):
        settings("study", top_p=0.95)


def test_a_stopped_study_goes_on(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    wanted = config(base, folder, methods="prompt-only,gen-filter", kl_sentences=0)

    def stop(done: int, total: int) -> None:
        if done == 16:
            os.kill(os.getpid(), signal.SIGINT)

    outcome = study(wanted, quiet, stop)
    assert outcome.status == {"prompt-only": "stopped"} and outcome.exit_code == 130
    assert study(wanted, quiet).status == {"prompt-only": "done", "gen-filter": "done"}


def test_begun_where_auto_was_another_dtype_it_says_so_and_goes_on_with_that_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = tmp_path / "study", tmp_path / "whole"

    def stop(done: int, total: int) -> None:
        if done == 16:
            os.kill(os.getpid(), signal.SIGINT)

    def run(where: Path, dtype: str, *more: Any) -> StudyOutcome:
        return study(config(base, where, methods="prompt-only", kl_sentences=0, dtype=dtype), quiet, *more)

    monkeypatch.setattr(load, "_cpuinfo", lambda: "amx_bf16")
    assert run(folder, "auto", stop).exit_code == 130
    monkeypatch.setattr(load, "_cpuinfo", lambda: "")
    begun = (folder / "prompt-only.csv").read_bytes()
    refused = run(folder, "auto", stop)
    assert "other settings (dtype: bfloat16 → float32): use the same to continue it" in refused.status["prompt-only"]
    assert (folder / "prompt-only.csv").read_bytes() == begun
    assert run(folder, "bfloat16").exit_code == run(whole, "bfloat16").exit_code == 0
    assert contents(folder) == contents(whole)
    with pytest.raises(UserError, match=r"other settings \(dtype: bfloat16 → float32\)"):
        run(whole, "float32")


def test_naming_a_dtype_that_the_files_do_not_have_changes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(dtype: str) -> StudyOutcome:
        wanted = config(base, tmp_path / "study", methods="gen-filter,sft", sft_data="gen-filter", budget=1000)
        return study(dataclasses.replace(wanted, dtype=dtype, kl_sentences=0), quiet)

    done = {"gen-filter": "done", "sft": "done"}
    monkeypatch.setattr(load, "_cpuinfo", lambda: "amx_bf16")
    assert run("auto").status == done
    whole = contents(tmp_path / "study")
    assert "other settings (dtype: bfloat16 → float32)" in run("float32").status["gen-filter"]
    assert run("auto").status == done
    monkeypatch.setattr(load, "_cpuinfo", lambda: "")
    assert "other settings (dtype: bfloat16 → float32)" in run("auto").status["gen-filter"]
    assert run("bfloat16").status == done
    assert contents(tmp_path / "study") == whole


@pytest.mark.slow
def test_killed_between_any_two_calls_it_ends_with_the_very_same_files(base: Path, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "study"
    trained(base, tmp_path / "rlhf_llama3_7b_output")
    assert study(config(base, whole), quiet).exit_code == 0
    calls = counted(lambda: study(config(base, tmp_path / "counted"), quiet).exit_code)
    assert killed_until_done(lambda: study(config(base, folder), quiet).exit_code, calls, random.Random(3), most=4) >= 2
    assert study(config(base, folder), quiet).exit_code == 0
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--methods", "prompt-only,magic"], "no method 'magic'"),
        (["--n", "0"], "--n 0"),
        (["--budget", "0"], "--budget 0"),
        (["--trained", "nowhere"], "'nowhere'"),
        (["--model", "bundled", "--prompt", "nope"], "'nope'"),
        (["--model", "bundled", "--best-prompt", "nope"], "'nope'"),
        (["--model", "./nowhere"], "'./nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert main(["study", *options]) == 2
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.count("\n") == 1 and os.listdir(tmp_path) == []
