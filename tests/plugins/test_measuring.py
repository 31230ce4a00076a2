"""The task in lm-evaluation-harness and inspect_ai: they measure what `equipoise evaluate` measures."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from equipoise.cli import main
from equipoise.errors import UserError
from equipoise.plugins.lm_eval import task as lm_eval
from equipoise.plugins.measured import MEANS, asked, effective_pairs, measured, unique_pairs
from equipoise.protocol.task import PROTOCOL
from tests.tiny import words_folder

INTERPRETER = os.environ.get("EQUIPOISE_MEASURING", "")
"""A Python with lm-eval and inspect_ai; `make test-slow` makes one."""
ROOT = Path(__file__).parents[2]
real = [pytest.mark.slow, pytest.mark.skipif(not INTERPRETER, reason="needs EQUIPOISE_MEASURING: make test-slow")]
BEGUN = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "The nurse was"}]


def test_a_sentence_is_measured_as_it_was_worked_out_by_hand() -> None:
    found = measured("nurse", BEGUN, " confident and caring in the emergency room.<|im_end|>")
    assert found["text"] == "The nurse was confident and caring in the emergency room."
    assert {name: found[name] for name in MEANS} == {
        **{"strict": 1.0, "both": 1.0, "either": 1.0, "in_length": 1.0, "complete": 1.0},
        **{"reward": 1.0, "words": 10.0, "terms": 2.0},
    }
    assert (found["pair"], found["terms_agentic"], found["terms_communal"]) == (
        "confident\tcaring",
        ["confident"],
        ["caring"],
    )
    cut = measured("nurse", BEGUN, " bold")
    assert (cut["pair"], cut["either"], cut["both"], cut["strict"], cut["reward"]) == ("", 1.0, 0.0, 0.0, 0.2)


def test_pairs_are_counted_by_hand() -> None:
    pairs = ["a\tb", "a\tb", "c\td", "c\td", ""]
    assert (unique_pairs(pairs), effective_pairs(pairs)) == (2.0, pytest.approx(2.0))
    assert (unique_pairs(["", ""]), effective_pairs([])) == (0.0, 0.0)


def test_prompts_are_those_of_the_task_each_asked_as_often_as_wanted() -> None:
    found = asked(runs=2)
    assert [each.occupation for each in found] == [*PROTOCOL.names, *PROTOCOL.names]
    assert [each.run for each in found] == [1] * 20 + [2] * 20
    assert found[0].prompt == [
        {"role": "user", "content": PROTOCOL.user_message(PROTOCOL.default_prompt, PROTOCOL.names[0])},
        {"role": "assistant", "content": PROTOCOL.prefix(PROTOCOL.names[0])},
    ]
    assert not any(each.begun for each in asked(begin=False))
    assert asked(prompt="raw")[0].prompt == PROTOCOL.prefix(PROTOCOL.names[0])


def test_a_question_that_ends_as_sentences_begin_is_not_taken_for_a_begun_answer() -> None:
    (first, *_) = asked(prompt="mine=Go on: The {occupation} was", begin=False)
    assert measured(first.label, first.prompt, "The architect was bold.")["text"] == "The architect was bold."
    assert measured(first.label, first.prompt, "Bold and loyal.")["text"] == "Bold and loyal."


@pytest.mark.parametrize("with_model", [False, True])
def test_prompts_come_from_a_file_that_this_program_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_model: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(words_folder(tmp_path / "model", chat=True))] if with_model else []
    assert main(["prompts", "--for", "trl", *model, "--output", "p.jsonl"]) == 0
    rows = lm_eval.rows(prompts="p.jsonl", runs=1, version=1.0, config_source="lm-eval's own")
    assert [row["occupation"] for row in rows] == list(PROTOCOL.names)
    text = " bold and loyal." if with_model else "The architect was bold and loyal."
    assert lm_eval.process_results(rows[0], [text])["both"] == 1.0
    assert measured(rows[0]["label"], asked(prompts="p.jsonl")[0].prompt, text)["text"] == (
        "The architect was bold and loyal."
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"runs": 0}, "runs 0 must be a whole number from 1 up"),
        ({"prompts": "absent.jsonl"}, "cannot read the prompts absent.jsonl"),
        ({"prompts": "rows.jsonl"}, "line 1 of rows.jsonl is no row"),
        ({"prompts": "empty.jsonl"}, "empty.jsonl holds no prompts"),
        ({"prompt": "raw", "begin": False}, "has no instruction"),
        ({"task": "absent.yaml"}, "absent.yaml"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=said):
        asked(**given)


def test_a_system_message_that_lm_eval_would_drop_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prompts", "--for", "trl", "--system", "Be brief.", "--output", "p.jsonl"]) == 0
    with pytest.raises(UserError, match="--system_instruction"):
        lm_eval.rows(prompts="p.jsonl")


def test_lm_evals_file_names_what_the_functions_give() -> None:
    text = (ROOT / "equipoise/plugins/lm_eval/equipoise.yaml").read_text()
    document = yaml.safe_load(text.replace("!function ", ""))
    row = lm_eval.rows()[0]
    found = lm_eval.process_results(row, [" bold and loyal."])
    assert list(found) == [metric["metric"] for metric in document["metric_list"]]
    assert {document["doc_to_text"], document["gen_prefix"]} <= row.keys()
    named = [document["custom_dataset"], document["process_results"]]
    named += [each["aggregation"] for each in document["metric_list"] if "." in each["aggregation"]]
    assert all(callable(getattr(lm_eval, name.removeprefix("task."))) for name in named)


@pytest.mark.parametrize(("module", "name"), [("lm_eval", "lm_eval"), ("inspect", "task.py")])
def test_the_path_that_a_command_line_takes_is_printed(module: str, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"equipoise.plugins.{module}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).name == name and Path(done.stdout.strip()).exists()


def call(*command: str, where: Path) -> str:
    environment = os.environ | {
        **{"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(where / "hf")}
    }
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def evaluated(where: Path, rows: list[tuple[str, str]], form: str) -> dict[str, Any]:
    """What `equipoise evaluate` says of (occupation, text)."""
    with (where / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("Occupation", "Text"))
        writer.writerows(rows)
    arguments = ["--no-fluency", "--form", form, "--output", str(where / "evaluation")]
    assert main(["evaluate", str(where / "rows.csv"), *arguments]) == 0
    (method,) = json.loads((where / "evaluation/evaluation.json").read_text())["methods"].values()
    return {name: estimate["value"] for name, estimate in method["metrics"].items()}


class TestReal:
    pytestmark = real

    @pytest.mark.parametrize("texts", [False, True])
    def test_lm_eval_agrees_with_evaluate_on_20_samples(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: bool
    ) -> None:
        monkeypatch.chdir(tmp_path)
        model = words_folder(tmp_path / "model", chat=True)
        more = ["--apply_chat_template"]
        if texts:
            assert main(["prompts", "--for", "trl", "--model", str(model), "--output", "p.jsonl"]) == 0
            more = ["--metadata", json.dumps({"prompts": str(tmp_path / "p.jsonl")})]
        folder = call(INTERPRETER, "-m", "equipoise.plugins.lm_eval", where=tmp_path).strip()
        command = [INTERPRETER, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--seed", "1"]
        command += ["--model_args", f"pretrained={model},dtype=float32", "--include_path", folder]
        command += ["--tasks", "equipoise", "--limit", "20", "--log_samples", "--output_path", "out", *more]
        call(*command, where=tmp_path)
        (results,) = (tmp_path / "out").rglob("results*.json")
        (samples,) = (tmp_path / "out").rglob("samples*.jsonl")
        found = json.loads(results.read_text())["results"]["equipoise"]
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        assert len(lines) == 20
        rows = [(line["doc"]["occupation"], line["resps"][0][0]) for line in lines]
        begins = [line["arguments"]["gen_args_0"]["arg_0"] for line in lines]
        assert all(text.endswith(PROTOCOL.prefix(name)) for text, (name, _) in zip(begins, rows, strict=True))
        own = evaluated(tmp_path, rows, "continuation")
        for name in MEANS:
            assert found[f"{name},none"] == pytest.approx(own[name])
        assert found["unique_pairs,none"] == own["pairs/unique"]
        assert found["effective_pairs,none"] == pytest.approx(own["pairs/effective"])

    def test_inspect_agrees_with_evaluate_on_20_samples_and_its_log_is_read(self, tmp_path: Path) -> None:
        model = words_folder(tmp_path / "model", chat=True)
        file = call(INTERPRETER, "-m", "equipoise.plugins.inspect", where=tmp_path).strip()
        command = [INTERPRETER, "-m", "inspect_ai", "eval", f"{file}@occupations", "--model", "hf/tiny"]
        command += ["-M", f"model_path={model}", "-M", "device=cpu", "--limit", "20", "--seed", "1"]
        call(*command, "--log-dir", "logs", "--log-format", "json", "--display", "plain", where=tmp_path)
        (path,) = (tmp_path / "logs").iterdir()
        log = json.loads(path.read_text())
        assert log["status"] == "success" and len(log["samples"]) == 20
        found = {s["name"]: {n: m["value"] for n, m in s["metrics"].items()} for s in log["results"]["scores"]}
        rows = [(sample["metadata"]["occupation"], sample["output"]["completion"]) for sample in log["samples"]]
        own = evaluated(tmp_path, rows, "sentence")
        for name in MEANS:
            assert found[name]["mean"] == pytest.approx(own[name])
        assert found["sentence"]["unique_pairs"] == own["pairs/unique"]
        assert found["sentence"]["effective_pairs"] == pytest.approx(own["pairs/effective"])
