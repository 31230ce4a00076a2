"""Every method on tasks that are not the default one: German with three classes, and one class alone."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from equipoise.cli import main
from equipoise.errors import UserError
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.gen_filter import raw_path
from equipoise.methods.generate import GenerateConfig, generate
from equipoise.methods.prompted import Prompted
from equipoise.methods.sample import SampleConfig, sample
from equipoise.methods.sft import SftConfig, sft
from equipoise.methods.study import METHODS, StudyConfig, study
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.source import recorded_task, resolve
from equipoise.protocol.task import PROTOCOL, Task, read_task, task_from_document
from tests.tasks import forcing, foreign_task, one_class_task, words_of
from tests.tiny import words_folder

TASKS = {"foreign": foreign_task(), "one": one_class_task()}
SMALL: dict[str, Any] = {"max_new_tokens": 12, "batch_size": 100, "dtype": "float32", "device": "cpu"}
CTRLG = CtrlGConfig(hidden_states=8, distil_sentences=200, em_passes=3)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=list(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]


def base(task: Task, folder: Path, **changes: Any) -> Path:
    """An untrained model that can write the task's sentences."""
    return words_folder(folder, prompt=None, words=words_of(task), spread=0.1, **changes)


def trained(task: Task, folder: Path, model: Path) -> Path:
    """As training with PPO would leave one."""
    words_folder(folder, seed=5, prompt=None, words=words_of(task), spread=0.1)
    record = {"config": {"prompt": "raw", "system": "", "policy": {"model": str(model)}}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "task.yaml").write_text(task.to_yaml(), encoding="utf-8")
    return folder


def written(task: Task, folder: Path) -> Path:
    """A file of the task."""
    path = folder / "task-file.yaml"
    path.write_text(task.to_yaml(), encoding="utf-8")
    return path


def prompted(model: Path, prompt: str | None = None, task: Task | None = None) -> Prompted:
    return Prompted(PolicyConfig(str(model), device="cpu"), prompt=prompt, sampling=SamplingConfig(), seed=0, task=task)


def quiet(_line: str) -> None:
    pass


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def settings_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.with_name(path.name + ".json").read_text())["settings"])


def costs_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.with_name(path.name + ".costs.json").read_text()))


def check_rows(task: Task, path: Path, n: int) -> None:
    """The task's occupations, n of each, each sentence with its prefix; and the task on record."""
    rows = read(path)
    assert [(r["Occupation"], r["RunID"]) for r in rows] == [(o, str(i)) for o in task.names for i in range(1, n + 1)]
    assert all(row["Text"].startswith(task.prefix(row["Occupation"])) for row in rows)
    assert task_from_document(settings_of(path)["task"], "record") == task


@pytest.mark.parametrize("method", ["prompt-only", "prompt-best", "ctrlg"])
def test_a_method_writes_the_tasks_sentences_and_counts_by_its_classes(task: Task, tmp_path: Path, method: Any) -> None:
    model, path = base(task, tmp_path / "base", chat=True), tmp_path / "out.csv"
    prompt = "raw" if method != "prompt-best" else None
    config = SampleConfig(
        str(model), path, task, 3, method=method, prompt=prompt, kl_sentences=6, base_prompt="raw", ctrlg=CTRLG, **SMALL
    )
    outcome = sample(config, quiet)
    assert outcome.task == task
    check_rows(task, path, 3)
    costs = costs_of(path)
    assert costs["accepted"] == sum(task.match(text).complete for text in outcome.texts.values())
    assert costs["rows"] == costs["generations"] == 3 * len(task.names)
    record = settings_of(path)
    if method == "prompt-only":
        assert costs["kl"]["value"] == 0 and costs["p0"]["n"] == 3 * len(task.names)
        assert f"of each of {len(task.names)} occupations" in costs["p0"]["how"]
    elif method == "prompt-best":
        assert record["prompt"] == "require" and task.classes[0].terms[0] in record["instruction"]
        assert costs["kl"]["low"] < costs["kl"]["high"] and costs["kl_sentences"] == 6
    else:
        assert all(map(task.strict, outcome.texts.values()))
        assert list(costs["log_weights"]) == list(task.names)
        assert (record["min_words"], record["max_words"]) == (task.min_words, task.max_words)


@pytest.mark.parametrize("event", ["both", "strict"])
def test_gen_filter_keeps_what_holds_every_class(task: Task, tmp_path: Path, event: Any) -> None:
    model, path = base(task, tmp_path / "base"), tmp_path / "out.csv"
    config = SampleConfig(
        str(model), path, task, 2, method="gen-filter", prompt="raw", filter=event, budget=4000, **SMALL
    )
    outcome = sample(config, quiet)
    check_rows(task, path, 2)
    raw = read(raw_path(path))
    passing = [task.complies(row["Text"], event) for row in raw]
    for occupation in task.names:
        own = [r["Text"] for r, passes in zip(raw, passing, strict=True) if passes and r["Occupation"] == occupation]
        assert [r["Text"] for r in read(path) if r["Occupation"] == occupation] == own[:2]
    costs = costs_of(path)
    assert costs["accepted"] == sum(passing) < len(raw) and list(costs["yields"]) == list(task.names)
    assert costs["kl"]["value"] > 0 and len(outcome.texts) == 2 * len(task.names)
    if len(task.classes) > 1:  # some of the classes are not enough
        assert any(task.match(row["Text"]).some and not task.match(row["Text"]).complete for row in raw)


def test_a_file_of_another_task_is_not_gone_on_with_and_the_difference_is_told(tmp_path: Path) -> None:
    task = foreign_task()
    model = base(task, tmp_path / "base")
    for method in ("prompt-only", "gen-filter"):
        path = tmp_path / f"{method}.csv"
        config = SampleConfig(str(model), path, task, 1, method=method, prompt="raw", kl_sentences=0, **SMALL)  # type: ignore[arg-type]
        sample(config, quiet)
        before = path.read_bytes()
        other = foreign_task(words=[5, 13])
        with pytest.raises(UserError, match=r"other settings \(words: \[5, 12\] → \[5, 13\]\).*--overwrite"):
            sample(SampleConfig(str(model), path, other, 1, method=method, prompt="raw", **SMALL), quiet)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"name: fähig-warm-ehrlich → agentic-communal"):
            sample(SampleConfig(str(model), path, PROTOCOL, 1, method=method, prompt="raw", **SMALL), quiet)  # type: ignore[arg-type]
        assert path.read_bytes() == before
        # The same task from a file of its own goes on.
        again = read_task(written(task, tmp_path))
        sample(SampleConfig(str(model), path, again, 2, method=method, prompt="raw", kl_sentences=0, **SMALL), quiet)  # type: ignore[arg-type]
        assert settings_of(path)["task"] == task.document()


def test_a_record_without_a_task_is_of_the_default_one(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    generate(GenerateConfig(str(tiny_model), path, n=1, **SMALL), quiet)
    record = path.with_name("out.csv.json")
    document = json.loads(record.read_text())
    assert list(document["settings"])[-1] == "task"
    del document["settings"]["task"]  # as files were before
    record.write_text(json.dumps(document))
    assert generate(GenerateConfig(str(tiny_model), path, n=2, **SMALL), quiet).status == "done"
    other = PROTOCOL.with_bounds(8, 16)
    with pytest.raises(UserError, match=r"words: \[8, 15\] → \[8, 16\]"):
        generate(GenerateConfig(str(tiny_model), path, other, n=2, **SMALL), quiet)
    record.write_text(json.dumps(document | {"settings": document["settings"] | {"task": {"name": "x"}}}))
    with pytest.raises(UserError, match=r"out\.csv\.json"):
        generate(GenerateConfig(str(tiny_model), path, n=2, **SMALL), quiet)


def test_a_trained_model_brings_its_task_and_another_task_is_told(tmp_path: Path) -> None:
    task, other = foreign_task(), foreign_task(words=[5, 13])
    model = trained(task, tmp_path / "ppo", tmp_path / "base")

    own = prompted(model)
    assert own.task == task and own.notices == () and list(own.prompts) == list(task.names)
    assert own.label == "RLHF" and own.prompt.name == "raw"
    assert prompted(model, task=other).task == other
    assert prompted(model, task=other).notices == ("ppo was trained on another task (words: [5, 12] → [5, 13])",)
    untrained = base(task, tmp_path / "base")
    assert prompted(untrained, "raw").task == PROTOCOL


def test_a_prompt_that_the_task_does_not_have_gives_way_to_its_first(tmp_path: Path) -> None:
    task = foreign_task(prompts={"beschreibe": "Beschreibe {occupation} in einem Satz."})
    model = base(task, tmp_path / "m", chat=True)
    (model / "run.json").write_text(json.dumps({"config": {"prompt": "study"}}))
    found = prompted(model, task=task)
    assert found.prompt.name == "beschreibe"
    assert "prompt beschreibe: the task has none that is named 'study', as in training" in found.notices
    (model / "run.json").write_text(json.dumps({"config": {"prompt": "mine=Sag etwas über {occupation}."}}))
    own = prompted(model, task=task)
    assert own.prompt.instruction == "Sag etwas über {occupation}."
    with pytest.raises(UserError, match="no prompt 'study'; choose beschreibe, require, raw"):
        prompted(model, "study", task=task)


def learning(model: Path, data: Path | str, folder: Path, task: Task | None = None, **changes: Any) -> SftConfig:
    policy = PolicyConfig(str(model), dtype="float32", device="cpu", lora_rank=8)
    settings: dict[str, Any] = {"prompt": "raw", "epochs": 2, "learning_rate": 0.03, "check": 1} | changes
    return SftConfig(data=str(data), output_dir=str(folder), task=task, policy=policy, **settings)


def test_sft_without_openings_learns_from_free_samples_and_says_so(task: Task, tmp_path: Path) -> None:
    said: list[str] = []
    model = base(task, tmp_path / "base")
    folder = sft(
        learning(model, "forced", tmp_path / "sft", task, sentences=20, budget=4000, held_out=0.0), said.append
    )
    assert sum("has no openings" in line for line in said) == 1
    rows = read(folder / "sentences.csv")
    assert len(rows) == 20 and {row["Label"] for row in rows} == {"Own-Samples"}
    assert all(task.strict(row["Text"]) for row in rows)
    record = json.loads((folder / "run.json").read_text())
    assert record["training"]["forced"] is False and record["config"]["task"] == task.document()
    assert recorded_task(resolve(str(folder))) == task
    assert not any("99.87" in line for line in said)  # the public study is of the default task
    assert f"% {task.all_classes}, entropy" in said[-1] and f"n {len(task.names)}" in said[-1]
    # Its own task is the default of whatever is done with the model, and another is refused in its place.
    outcome = sample(SampleConfig(str(folder), tmp_path / "s.csv", n=1, method="sft", kl_sentences=4, **SMALL), quiet)
    assert outcome.task == task
    changed = task.with_bounds(None, task.max_words + 1)
    with pytest.raises(UserError, match=r"other settings \(words: "):
        sft(learning(model, "forced", folder, changed, sentences=20, budget=4000, held_out=0.0), quiet)


def test_sft_with_openings_begins_with_a_term_of_each_class_in_any_order(tmp_path: Path) -> None:
    task = forcing(foreign_task())
    model, said = base(task, tmp_path / "base"), list[str]()
    folder = sft(
        learning(model, "forced", tmp_path / "sft", task, sentences=40, budget=4000, held_out=0.0), said.append
    )
    assert any("begin with a term of each class" in line for line in said)
    rows = read(folder / "sentences.csv")
    assert len(rows) == 40 and {row["Label"] for row in rows} == {"Forced-Pairs"}
    begun = [task.continuation(row["Text"], row["Occupation"]) or "" for row in rows]
    words = [word for number in range(3) for word in task.words_of(number)]
    assert all(text.split()[0].rstrip(",") in words for text in begun)
    assert {row["Occupation"] for row in rows} == set(task.names)
    assert "forced" not in json.loads((folder / "run.json").read_text())["training"]


def test_sentences_of_another_task_are_not_learnt(tmp_path: Path) -> None:
    task = foreign_task()
    model, data = base(task, tmp_path / "base"), tmp_path / "data.csv"
    sample(SampleConfig(str(model), data, task, 200, prompt="raw", kl_sentences=0, **SMALL), quiet)
    with pytest.raises(UserError, match=r"data.csv was made for another task \(words: \[5, 12\] → \[5, 13\]\).*--task"):
        sft(learning(model, data, tmp_path / "sft", foreign_task(words=[5, 13])), quiet)
    with pytest.raises(UserError, match="made for another task"):  # the base model says nothing: the default one
        sft(learning(model, data, tmp_path / "sft"), quiet)
    said: list[str] = []
    sft(learning(model, data, tmp_path / "sft", task, filter="both"), said.append)
    assert any(" of 600 rows" in line and "do not comply" in line for line in said)


@pytest.mark.slow
def test_a_whole_study_is_of_one_task(task: Task, tmp_path: Path) -> None:
    model, said, folder = base(task, tmp_path / "base"), list[str](), tmp_path / "study"
    ppo = trained(task, tmp_path / "ppo", model)
    wanted = StudyConfig(
        n=1, output_dir=folder, model=str(model), trained=str(ppo), best_prompt="raw", budget=500, kl_sentences=6,
        sft_epochs=1, sft_sentences=100, ctrlg=CTRLG, **(SMALL | {"max_new_tokens": 16}),
    )  # fmt: skip
    outcome = study(wanted, said.append)
    assert outcome.status == dict.fromkeys(METHODS, "done") and outcome.exit_code == 0
    for method in METHODS:
        path = folder / f"{method}.csv"
        assert settings_of(path)["task"] == task.document()
        if method != "gen-filter":
            check_rows(task, path, 1)
    assert f"1 sentence for each of {len(task.names)} occupations" in said[0]
    assert said[1] == f"task {task.name}, of all methods"
    record = json.loads((folder / "study.json").read_text())
    assert list(record["settings"])[-1] == "task" and record["settings"]["task"] == task.document()
    assert recorded_task(resolve(str(folder / "sft_model"))) == task
    with pytest.raises(UserError, match=r"holds a study with other settings \(.*words: "):
        study(StudyConfig(**{**wanted.__dict__, "task": task.with_bounds(None, task.max_words + 1)}), quiet)


def test_the_command_line_takes_a_task_file(task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = base(task, tmp_path / "base"), written(task, tmp_path)
    options = ["--model", str(model), "--prompt", "raw", "--task", str(path), "--n", "1", "--device", "cpu"]
    assert main(["generate", *options, "--output", "g.csv"]) == 0
    assert main(["sample", *options, "--output", "s.csv"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(f"is complete: {len(task.names)} rows") == 2
    assert f"{task.min_words}-{task.max_words} words %" in shown and task.bounds in shown
    check_rows(task, tmp_path / "g.csv", 1)
    check_rows(task, tmp_path / "s.csv", 1)


@pytest.mark.parametrize(
    ("command", "more"),
    [("generate", []), ("sample", []), ("sft", ["--data", "forced"]), ("study", ["--model", "bundled"])],
)
def test_a_task_that_is_none_or_lacks_the_prompt_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, more: list[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("name: x\nclases: {}\n")
    assert main([command, *more, "--task", "bad.yaml"]) == 2
    shown = capsys.readouterr()
    assert "bad.yaml, line 2" in shown.err and shown.err.count("\n") == 1
    task = foreign_task(prompts={"beschreibe": "Beschreibe {occupation} in einem Satz."})
    path = written(task, tmp_path)
    model = [] if command in ("study", "sft") else ["--model", str(base(task, tmp_path / "base"))]
    capsys.readouterr()
    assert main([command, *more, *model, "--task", str(path), "--prompt", "describe"]) == 2
    shown = capsys.readouterr()
    assert "no prompt 'describe'; choose beschreibe, require, raw" in shown.err and shown.err.count("\n") == 1
