"""Evaluations as inspect logs: what is in them, and that inspect_ai itself reads them."""

import csv
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from equipoise.cli import main

INTERPRETER = os.environ.get("EQUIPOISE_MEASURING", "")
"""A Python with inspect_ai; `make test-slow` makes one."""
ROWS = [
    ("PPO", "nurse", "The nurse was confident and caring in the emergency room."),
    ("PPO", "pilot", "The pilot was tired."),
    ("../Other: \ud83d", "nurse", "The nurse was bold, said \ud83d nobody at all in there."),
]


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"Method": method, "Occupation": occupation, "Text": text} for method, occupation, text in ROWS]
    Path("rows.json").write_text(json.dumps(rows))
    assert main(["evaluate", "rows.json", "--no-fluency", "--inspect-log", "logs"]) == 0
    return tmp_path / "logs"


def by_method(logs: Path) -> dict[str, Any]:
    documents = [json.loads(path.read_text()) for path in logs.iterdir()]
    return {document["eval"]["task_args"]["method"]: document for document in documents}


def test_each_method_is_a_log_with_its_sentences_and_the_numbers_of_the_evaluation(logs: Path) -> None:
    found = by_method(logs)
    assert found.keys() == {"PPO", "../Other: \ufffd"}
    first, second = found["PPO"]["samples"]
    assert first["output"]["completion"] == ROWS[0][2]
    assert first["scores"]["equipoise"]["value"] == {
        **{"strict": 1.0, "both": 1.0, "either": 1.0, "in_length": 1.0, "complete": 1.0},
        **{"reward": 1.0, "words": 10.0, "terms": 2.0},
    }
    assert first["scores"]["equipoise"]["metadata"]["terms"] == {"agentic": ["confident"], "communal": ["caring"]}
    assert second["metadata"]["occupation"] == "pilot"
    assert second["scores"]["equipoise"]["value"]["reward"] == -0.3  # no term, and 4 words
    with (logs.parent / "evaluation/methods.csv").open(encoding="utf-8", errors="replace", newline="") as file:
        rows = {row["Metric"]: row for row in csv.DictReader(file) if row["Method"] == "PPO" and row["Value"]}
    scores = {score["name"]: score["metrics"] for score in found["PPO"]["results"]["scores"]}
    assert scores.keys() == rows.keys()
    for key, metrics in scores.items():
        ends = {"value": "Value", "low": "Low", "high": "High"}
        assert {n: m["value"] for n, m in metrics.items()} == {
            n: float(rows[key][column]) for n, column in ends.items() if rows[key][column]
        }


def test_their_names_are_those_that_the_viewer_lists_and_stay_in_the_folder(logs: Path) -> None:
    names = sorted(path.name for path in logs.iterdir())
    assert len(names) == 2 and all(
        re.match(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d-00-00_[\w.-]+_[\w.-]+\.json", n) for n in names
    )
    assert not [path for path in logs.parent.iterdir() if path.name not in ("rows.json", "evaluation", "logs")]


def test_the_evaluation_itself_is_the_same_without_a_log(logs: Path) -> None:
    assert main(["evaluate", "rows.json", "--no-fluency", "--output", "other"]) == 0

    def plain(folder: str) -> str:
        document = json.loads((logs.parent / folder / "evaluation.json").read_text())
        del document["provenance"], document["settings"]["output"]
        return json.dumps(document)

    assert plain("evaluation") == plain("other")


def test_a_file_in_the_place_of_the_folder_is_refused_before_anything_is_measured(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (logs.parent / "taken").write_text("mine")
    assert main(["evaluate", "rows.json", "--no-fluency", "--inspect-log", "taken", "--output", "other"]) == 2
    assert "--inspect-log taken is a file" in capsys.readouterr().err
    assert not (logs.parent / "other").exists() and (logs.parent / "taken").read_text() == "mine"


READ = """
import json, sys
from inspect_ai.log import list_eval_logs, read_eval_log, write_eval_log
for each in list_eval_logs(sys.argv[1]):
    log = read_eval_log(each.name)
    scores = {score.name: score.metrics["value"].value for score in log.results.scores}
    values = [[sample.id, sample.scores["equipoise"].value["reward"]] for sample in log.samples]
    print("LOG", json.dumps([log.status, log.eval.task, log.eval.task_args["method"], scores, values]))
    write_eval_log(log, sys.argv[1] + "/again.eval")
"""


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETER, reason="needs EQUIPOISE_MEASURING: make test-slow")
def test_inspect_reads_them_and_its_viewer_takes_them(logs: Path) -> None:
    def call(*arguments: str) -> str:
        done = subprocess.run([INTERPRETER, *arguments], cwd=logs.parent, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    bundled = call("-m", "inspect_ai", "view", "bundle", "--log-dir", "logs", "--output-dir", "bundle")
    assert (logs.parent / "bundle/index.html").is_file(), bundled
    assert len(list((logs.parent / "bundle/logs").glob("*T*.json"))) == 2
    shown = [json.loads(line[4:]) for line in call("-c", READ, "logs").splitlines() if line.startswith("LOG ")]
    assert len(shown) == 2
    own = by_method_of(logs)
    for status, task, method, scores, values in shown:
        assert (status, task) == ("success", "agentic-communal")
        assert scores == {s["name"]: s["metrics"]["value"]["value"] for s in own[method]["results"]["scores"]}
        assert values == [[s["id"], s["scores"]["equipoise"]["value"]["reward"]] for s in own[method]["samples"]]


def by_method_of(logs: Path) -> dict[str, Any]:
    (logs / "again.eval").unlink()
    return by_method(logs)
