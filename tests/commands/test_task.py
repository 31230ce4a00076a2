"""`equipoise task`: what it finds in a task before hours are spent on it."""

from dataclasses import replace
from pathlib import Path

import pytest

from equipoise import cli
from equipoise.methods.inspect_task import base_rates, infeasible, inspect_task, leaks, nested
from equipoise.protocol.lexicon import TermClass
from equipoise.protocol.prompts import Prompt
from equipoise.protocol.task import PROTOCOL, Occupation, read_task
from tests.tasks import foreign_task, one_class_task


def test_the_default_task_leaks_nothing_nests_nothing_and_can_be_met() -> None:
    found = inspect_task(PROTOCOL)
    assert found.feasible and leaks(PROTOCOL) == [] and nested(PROTOCOL) == [] and infeasible(PROTOCOL, 32) == []
    text = "\n".join(found.lines)
    assert "'The architect was'" in text and "100 pairs are possible" in text and "10 × 10 words" in text


def test_terms_in_a_prompt_or_an_occupation_are_leaks_and_those_named_on_purpose_are_none() -> None:
    own = Prompt("own", "Say something helpful of the {occupation}.")
    jobs = (Occupation("caring aide", "caring aide", "caring aide"), *PROTOCOL.occupations)
    found = leaks(replace(PROTOCOL, prompts=(own, *PROTOCOL.prompts), occupations=jobs))
    assert len(found) == 2
    assert "already holds caring" in found[0] and "the prompt 'own' holds helpful" in found[1]


def test_a_term_within_another_is_said() -> None:
    classes = (TermClass("a", ("self", "self-reliant")), TermClass("b", ("self-made",)))
    lines = nested(replace(PROTOCOL, classes=classes, labels=("a", "b"), not_in_source=(), write=()))
    assert [line.split(":")[0] for line in lines] == ["'self-reliant' holds 'self'", "'self-made' holds 'self'"]
    assert "(a and b)" in lines[1]


def test_base_rates_are_counted_by_hand_and_say_what_they_mean() -> None:
    texts = ["The nurse was bold.", "The nurse was caring.", "The nurse was bold and loyal.", "The nurse was tall."]
    lines = base_rates(PROTOCOL, texts * 4)
    assert "agentic" in lines[0] and "8 of 16: 50.0 %" in lines[0]
    assert "both classes" in lines[2] and "4 of 16: 25.0 %" in lines[2] and "enough for PPO" in lines[-1]
    rare = base_rates(PROTOCOL, ["The nurse was tall."] * 256)
    assert "none of 256: below 1.5 %, so PPO needs a warm start; `--preset varied` has one" in rare[-1]
    assert "give the task openings" in base_rates(foreign_task(), ["Die Ärztin gilt als groß."] * 20)[-1]


def test_one_class_is_spoken_of_in_the_singular() -> None:
    task = one_class_task()
    assert [line for line in base_rates(task, ["x"]) if "classes" in line] == []


def test_a_task_that_cannot_be_met_is_said_before_any_model_and_ends_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("name: t\nwords: [1, 4]\noccupations: [head of state of a country]\nclasses: {a: [bold]}\n")
    assert cli.main(["task", str(file), "--model", "bundled"]) == 2
    printed = capsys.readouterr()
    assert "reads " not in printed.out and ("CANNOT" in printed.out or "t.yaml" in printed.err)


def test_new_writes_the_default_task_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    assert cli.main(["task", "--new", str(file)]) == 0
    assert read_task(file) == PROTOCOL and "#" in file.read_text()
    assert cli.main(["task", "--new", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_model_is_shown_what_it_reads_and_asked_how_often_it_complies(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_model), "--prompt", "raw", "--samples", "40", "--max-new-tokens", "12"]
    assert cli.main(["task", "agentic-communal", *options, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "reads      'The architect was'" in printed and "base rate  both classes" in printed
