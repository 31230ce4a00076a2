"""Supervised fine-tuning end to end: what it learns from, what it leaves, and what it refuses."""

import csv
import gzip
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from equipoise.cli import main
from equipoise.errors import UserError
from equipoise.learning.supervised import Example, Examples
from equipoise.methods.fine_tune import Data, Split, check_enough
from equipoise.methods.sample import SampleConfig, sample
from equipoise.methods.sft import SftConfig, sft
from equipoise.policy import load
from equipoise.policy.config import PolicyConfig
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.locks import FolderLock
from tests.tiny import words_folder

OCCUPATIONS = PROTOCOL.names
AGENTIC, COMMUNAL = (each.terms for each in PROTOCOL.classes)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "base", prompt=None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every pair once, each occupation five times, and two rows that do not comply."""
    path = tmp_path_factory.mktemp("data") / "data.csv"
    pairs = [(a, c) for a in AGENTIC for c in COMMUNAL]
    lines = ["Occupation,Text", "nurse,The nurse was bold .", "nurse,The nurse was there ."]
    for i, (a, c) in enumerate(pairs):
        o = OCCUPATIONS[i % 20]
        lines.append(f"{o},The {o} was {a} and {c} in a {OCCUPATIONS[i % 7]} .")
    path.write_text("\n".join(lines) + "\n")
    return path


def config(base: Path, data: Path | str, folder: Path, **changes: Any) -> SftConfig:
    policy = PolicyConfig(str(base), dtype="float32", device="cpu", lora_rank=8)
    settings = {"prompt": "raw", "epochs": 20, "learning_rate": 0.03, "check": 0} | changes
    return SftConfig(data=str(data), output_dir=str(folder), policy=policy, **settings)


def quiet(_line: str) -> None:
    pass


def test_the_model_it_leaves_writes_what_it_was_shown_and_knows_its_prompt(
    base: Path, data: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    folder = sft(config(base, data, tmp_path / "sft", check=1), said.append)
    assert f"{data}: 100 of 102 rows (100 different sentences); 2 do not comply" in said
    record = json.loads((folder / "run.json").read_text())
    losses = record["training"]["nats_per_token"]
    assert record["training"]["learnt"] + record["training"]["held_out"] == 100
    assert losses[-1]["training"] < losses[0]["training"] - 0.5 and losses[-1]["held_out"] < losses[0]["held_out"]
    assert any("99.87" in line for line in said) and "this model" in said[-1] and "n 20" in said[-1]

    def share(model: Path, method: str, **more: Any) -> float:
        output = tmp_path / f"{method}.csv"
        settings: dict[str, Any] = {"method": method, "n": 5, "device": "cpu", "dtype": "float32"} | more
        wanted = SampleConfig(model=str(model), output=output, **settings)
        texts = sample(wanted, quiet).texts
        return sum(map(PROTOCOL.strict, texts.values())) / len(texts)

    assert share(folder, "sft") > share(base, "prompt-only", prompt="raw") + 0.3
    # The base model and the prompt are on record, so the distance to it is known.
    account = json.loads((tmp_path / "sft.csv.costs.json").read_text())
    assert account["kl"]["low"] > 0 and "base under the prompt raw" in account["kl"]["how"]
    plain = json.loads((tmp_path / "prompt-only.csv.costs.json").read_text())
    assert plain["kl"]["value"] == 0 and plain["p0"]["n"] == 100


def test_the_same_data_and_seed_give_the_same_model_and_other_seeds_another(
    base: Path, data: Path, tmp_path: Path
) -> None:
    weights = [
        load_file(sft(config(base, data, tmp_path / name, epochs=2, seed=seed), quiet) / "model.safetensors")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])
    assert any(bool((weights[0][name] != weights[2][name]).any()) for name in weights[0])


def test_a_finished_model_is_kept_and_another_is_made_only_when_asked(base: Path, data: Path, tmp_path: Path) -> None:
    folder, said = tmp_path / "sft", list[str]()
    wanted = config(base, data, folder, epochs=1)
    sft(wanted, quiet)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    sft(wanted, said.append)
    assert "holds this very model already" in said[-1]
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"other settings \(epochs: 1 → 2\).*--overwrite"):
        sft(config(base, data, folder, epochs=2), quiet)
    record = json.loads((folder / "run.json").read_text())
    edited = record | {"config": record["config"] | {"prompts": "0" * 64}}
    (folder / "run.json").write_text(json.dumps(edited))
    with pytest.raises(UserError, match=r"other settings \(prompts: 0{64} → [0-9a-f]{64}\)"):
        sft(wanted, quiet)
    (folder / "run.json").write_text(json.dumps(record))
    other = tmp_path / "other.csv"
    other.write_bytes(data.read_bytes() + b"nurse,The nurse was bold .\n")
    with pytest.raises(UserError, match="data-sha256"):
        sft(config(base, other, folder, epochs=1), quiet)
    sft(config(base, data, folder, epochs=2, overwrite=True), quiet)
    assert (folder / "model.safetensors").stat().st_mtime_ns != before
    # What is not there whole is made again.
    (folder / "model.safetensors").unlink()
    sft(config(base, data, folder, epochs=2), quiet)
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize("old", [False, True])
def test_a_model_of_auto_is_that_of_the_dtype_that_auto_was(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    def wanted(dtype: str) -> SftConfig:
        found = config(base, data, tmp_path / "sft", epochs=1)
        return replace(found, policy=replace(found.policy, dtype=dtype))

    monkeypatch.setattr(load, "_cpuinfo", lambda: "avx512_bf16 amx_bf16")
    folder, said = sft(wanted("auto"), quiet), list[str]()
    record = json.loads((folder / "run.json").read_text())
    assert record["computed"] == {"device": "cpu", "dtype": "bfloat16"}
    if old:  # it does not say, and `auto` was bfloat16 with AVX-512's instructions alone
        del record["computed"]
        (folder / "run.json").write_text(json.dumps(record))
    monkeypatch.setattr(load, "_cpuinfo", lambda: "GenuineIntel avx512_bf16")
    for dtype in ("auto", "bfloat16"):
        sft(wanted(dtype), said.append)
        assert "holds this very model already" in said[-1]
    with pytest.raises(UserError, match=r"other settings \(dtype: auto → float32\)"):
        sft(wanted("float32"), quiet)


@pytest.fixture(scope="module")
def forced(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder that learnt 40 forced sentences, and what was said meanwhile."""
    said: list[str] = []
    folder = tmp_path_factory.mktemp("forced") / "sft"
    return sft(config(base, "forced", folder, sentences=40, epochs=2, held_out=0.0), said.append), said


def test_forced_sentences_are_the_models_own_and_lie_beside_it(forced: tuple[Path, list[str]]) -> None:
    folder, said = forced
    with (folder / "sentences.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["Text"] for row in rows}) == 40
    assert list(rows[0]) == ["Model", "Occupation", "RunID", "Text", "WordCount", "Label"]
    for row in rows:
        assert PROTOCOL.strict(row["Text"]) and row["Text"].startswith(f"The {row['Occupation']} was ")
        assert int(row["WordCount"]) == len(row["Text"].split()) and row["Model"] == "base"
    for occupation in OCCUPATIONS:
        runs = [row["RunID"] for row in rows if row["Occupation"] == occupation]
        assert runs == [str(i) for i in range(1, len(runs) + 1)]
    matches = [PROTOCOL.match(row["Text"]) for row in rows]
    assert len({m.first for m in matches}) > 15
    training = json.loads((folder / "run.json").read_text())["training"]
    assert training["learnt"] == 40 and training["drawn"] >= 40
    found = [int(line.split()[0]) for line in said if "of 40 sentences found, " in line]
    assert found == sorted(found) and found[-1] == 40


def test_the_sentences_that_it_leaves_teach_the_very_same_again(
    base: Path, forced: tuple[Path, list[str]], tmp_path: Path
) -> None:
    again = sft(config(base, forced[0] / "sentences.csv", tmp_path / "sft", epochs=2, held_out=0.0), quiet)
    one, two = (load_file(folder / "model.safetensors") for folder in (forced[0], again))
    assert all(bool((one[name] == two[name]).all()) for name in one)
    assert not (again / "sentences.csv").exists()


def test_a_model_of_forced_sentences_is_kept_unless_how_they_were_found_is_changed(
    base: Path, forced: tuple[Path, list[str]], data: Path
) -> None:
    folder, said = forced[0], list[str]()
    same: dict[str, Any] = {"sentences": 40, "epochs": 2, "held_out": 0.0}
    sft(config(base, "forced", folder, **same), said.append)
    assert len(said) == 1 and "holds this very model already" in said[0]
    changes: list[dict[str, Any]] = [{"sentences": 41}, {"candidates": 2}, {"budget": 50}, {"seed": 1}]
    for change in changes:
        with pytest.raises(UserError, match=f"other settings .*{next(iter(change))}: "):
            sft(config(base, "forced", folder, **(same | change)), quiet)
    with pytest.raises(UserError, match=r"data: forced"):
        sft(config(base, data, folder, **same), quiet)


def test_a_file_named_forced_is_reached_by_its_folder(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("forced").write_bytes(data.read_bytes())
    said: list[str] = []
    sft(config(base, "./forced", tmp_path / "sft", epochs=1), said.append)
    assert any(line.startswith("./forced: 100 of 102 rows") for line in said)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sentences": 15}, "--sentences 15 must be at least 16"),
        ({"sentences": 100, "budget": 4}, "are needed: raise --budget"),
    ],
)
def test_too_few_forced_sentences_are_refused(base: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        sft(config(base, "forced", tmp_path / "sft", **changes), quiet)
    assert not (tmp_path / "sft").exists()


def test_a_budget_that_ends_early_is_said_and_what_was_found_is_learnt(base: Path, tmp_path: Path) -> None:
    said: list[str] = []
    folder = sft(config(base, "forced", tmp_path / "sft", sentences=2000, budget=500, epochs=1), said.append)
    training = json.loads((folder / "run.json").read_text())["training"]
    learnt = training["learnt"] + training["held_out"]
    assert 16 <= learnt < 2000 and training["drawn"] >= 500
    assert f"the budget ended with {learnt} of 2,000 sentences: learning from those" in said


@pytest.mark.parametrize("name", ["run.json", "config.json"])
def test_a_folder_of_somebody_elses_is_left_alone(base: Path, data: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text('{"config": {"prompt": "raw"}}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match="choose another --output-dir"):
            sft(config(base, data, folder, overwrite=overwrite), quiet)
    assert os.listdir(folder) == [name]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("Occupation,Text\nnurse,The nurse was kind.\n", "has 0 sentences to learn from (0 of 1 row"),
        ("Occupation,Text\n", "holds no rows"),
        ("Model,Text\nm,Nobody was kind.\n", "say it with --occupation-column"),
        (None, "cannot read"),
    ],
)
def test_data_without_a_compliant_row_or_its_columns_is_one_line_and_exit_code_2(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, says: str
) -> None:
    path, folder = tmp_path / "data.csv", tmp_path / "sft"
    if content is not None:
        path.write_text(content)
    options = ["--data", str(path), "--model", str(base), "--prompt", "raw", "--output-dir", str(folder)]
    assert main(["sft", *options]) == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("equipoise:")]
    assert len(lines) == 1 and says in lines[0] and not folder.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "--data FILE"),
        (["--data", "x.csv", "--epochs", "0"], "--epochs 0"),
        (["--data", "x.csv", "--learning-rate", "0"], "--learning-rate 0"),
        (["--data", "x.csv", "--held-out", "1"], "--held-out 1"),
        (["--data", "forced", "--budget", "0"], "--budget 0"),
        (["--data", "forced", "--candidates", "0"], "--candidates 0"),
        (["--data", "x.csv", "--prompt", "nope"], "no prompt 'nope'"),
        (["--data", "x.csv", "--candidates", "2"], "--candidates is for --data forced"),
        (["--data", "x.csv", "--budget", "50"], "--budget is for --data forced"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sft", *options]) == 2
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.count("\n") == 1 and os.listdir(tmp_path) == []


def test_every_layout_that_is_measured_can_be_learnt_from_and_options_name_its_columns(
    base: Path, data: Path, tmp_path: Path
) -> None:
    rows = list(csv.DictReader(io.StringIO(data.read_text(encoding="utf-8"))))
    records = [{"meta": {"wer": row["Occupation"]}, "out": {"satz": row["Text"]}} for row in rows]
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    with pytest.raises(UserError, match=r"no column of texts among 'meta\.wer', 'out\.satz': name it with --text-col"):
        sft(config(base, path, tmp_path / "none"), quiet)
    said: list[str] = []
    named = {"text_column": "out.satz", "occupation_column": "meta.wer"}
    folders = [
        sft(config(base, data, tmp_path / "csv", epochs=1, check=0), quiet),
        sft(config(base, path, tmp_path / "json", epochs=1, check=0, **named), said.append),
    ]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert any(f"{len(rows)} rows, texts in 'out.satz' read as sentence (detected), occ" in line for line in said)


def test_two_trainings_do_not_share_a_folder(base: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sft"
    folder.mkdir()
    with FolderLock(folder, ""), pytest.raises(UserError, match=r"another process is training in .*sft: wait"):
        sft(config(base, data, folder), quiet)


def test_too_few_sentences_name_those_held_out_and_only_remedies_that_help() -> None:
    def refused(learnt: int, held_out: int, failing: int, event: Any) -> str:
        one = Example("nurse", [1], [2], "x")
        data = Data(Examples([one] * (learnt + held_out), learnt + held_out + failing, failing, 0), None)
        with pytest.raises(UserError) as error:
            check_enough(Split([one] * learnt, [one] * held_out), data, "rows.csv", event)
        return str(error.value)

    told = refused(13, 2, 0, "strict")
    assert "13 sentences to learn from beside the 2 held out" in told and "--filter" not in told
    assert told.endswith("16 are needed: give a file with more")
    assert refused(13, 3, 0, "both").endswith("give a file with more or --held-out 0")
    assert refused(13, 0, 5, "strict").endswith("give a file with more or --filter both")
    assert "--filter" not in refused(13, 0, 5, "both")


@pytest.mark.parametrize("command", ["sft", "train", "generate", "evaluate", "sample", "task", "study"])
def test_a_device_that_no_machine_has_is_named_first_of_all(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for device, said in (
        ("mps", "is not supported"),
        ("abacus", "use cpu, cuda"),
        ("cpu:3", "all CPUs are one device"),
    ):
        assert main([command, "--device", device]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and f"device {device!r}" in lines[0] and said in lines[0]
    assert not os.listdir(tmp_path)
