"""What a report shows of gendered words, associations and mixed logits."""

import dataclasses
from pathlib import Path

import pytest

from equipoise.evaluation import fairness_tables
from equipoise.evaluation.config import EvaluateConfig
from equipoise.evaluation.evaluate import evaluate
from equipoise.evaluation.findings import findings
from equipoise.evaluation.page import Content, render
from equipoise.evaluation.results import Estimate, Evaluation, MixedLogit
from equipoise.protocol.task import PROTOCOL
from equipoise.protocol.task import Task as AnyTask
from tests.evaluation.files import write_csv
from tests.evaluation.hostile import example
from tests.tasks import foreign_task

ROWS = [
    ("nurse", "The nurse was caring, and she was very kind to all of her patients."),
    ("nurse", "The nurse was caring and bold, and never confident in her work at all."),
    ("pilot", "The pilot was bold, and he was very proud of his long career."),
    ("pilot", "The pilot was bold."),
]


def evaluated(folder: Path, texts: list[tuple[str, str]], task: AnyTask = PROTOCOL) -> Evaluation:
    columns = ("Occupation", "Text")
    before = write_csv(folder / "before.csv", columns, texts)
    after = write_csv(folder / "after.csv", columns, texts[::-1])
    config = EvaluateConfig(
        (f"Prompt-Only={before}", f"PPO={after}"), folder / "out", fluency=False, task=task, bootstrap_draws=200
    )
    return evaluate(config, say=lambda line: None)[0]


def test_the_tables_show_words_and_associations_by_occupation_and_method(tmp_path: Path) -> None:
    evaluation = evaluated(tmp_path, ROWS)
    gendered = fairness_tables.gendered(evaluation)
    assert gendered is not None
    assert gendered.heads == ("occupation", "Prompt-Only", "PPO")
    assert "female pronouns · male pronouns · female nouns · male nouns" in gendered.caption
    assert {row[0].text: row[1].text for row in gendered.rows} == {
        "nurse": "100 · 0 · 0 · 0",
        "pilot": "0 · 50.0 · 0 · 0",
    }
    (association,) = fairness_tables.associations(evaluation)
    assert [row[0].text for row in association.rows] == ["pilot", "nurse"]  # the most agentic first
    # Agentic mentions: 2 and 2 of 6, communal 2 and 0: (2 + 2/3) / (0 + 1/3), (2 + 2/3) / (2 + 1/3).
    assert [row[1].text for row in association.rows] == ["+2.08", "+0.13"]
    kept = {name: m.metrics["association/kept"] for name, m in evaluation.methods.items()}
    assert kept["Prompt-Only"].note == "the untrained model itself"  # by its name
    assert kept["PPO"].value == pytest.approx(1, abs=0.05)  # the same sentences
    table = fairness_tables.overview(evaluation)
    assert table is not None
    assert {row[0].text: row[1].text for row in table.rows}["with a negated term, % ↓"] == "25.0"
    short = fairness_tables.in_short(evaluation)
    assert short is not None
    assert not [head for head in short.heads if "first over" in head]
    assert len(short.heads) == len(short.rows[0])


def test_of_another_language_the_report_says_that_nothing_was_looked_for(tmp_path: Path) -> None:
    texts = [("Ärztin", "Die Ärztin gilt als fähig, herzlich und ehrlich."), ("Ärztin", "Die Ärztin gilt als klug.")]
    evaluation = evaluated(tmp_path, texts, foreign_task())
    assert fairness_tables.gendered(evaluation) is None
    table = fairness_tables.overview(evaluation)
    assert table is not None
    assert any("No gendered words were looked for" in note for note in table.notes)
    assert not any("Negated" in note for note in table.notes)
    assert len(fairness_tables.associations(evaluation)) == 3


def test_many_occupations_are_cut_and_it_is_said(tmp_path: Path) -> None:
    texts = [(f"job {i}", f"The job {i} was {'bold' if i % 3 else 'caring'}.") for i in range(40)]
    table = fairness_tables.gendered(evaluated(tmp_path, texts))
    assert table is not None
    assert len(table.rows) == fairness_tables.MOST
    assert "Of 40 occupations the 15 greatest and the 15 least are shown" in table.caption


def test_a_finding_says_what_is_left_of_the_association() -> None:
    evaluation = example()
    asked = "Are occupations associated less?"
    assert asked not in {finding.question for finding in findings(evaluation)}  # the example's base has none
    methods = {}
    for name, kept in {"Prompt-Only": None, "Generate-and-Filter": 0.5, "PPO": 0.034}.items():
        given = {"association/kept": Estimate(kept, note=""), "association/spread": Estimate(1.68)}
        given["association/chance"] = Estimate(0.725)
        order = (0.83, 0.61, 0.93) if name == "PPO" else (0.1, -0.3, 0.5)
        given["first/correlation_agentic"] = Estimate(*order, 20, "fisher")
        own = evaluation.methods[name]
        methods[name] = dataclasses.replace(own, metrics=own.metrics | given)
    told = {f.question: f.answer for f in findings(dataclasses.replace(evaluation, methods=methods))}[asked]
    assert told == (
        "With Prompt-Only, taken for the untrained model because of its name, occupations are 1.68 nats apart in "
        "log-odds, agentic against communal (0.72 by chance). Of that, chance taken off each, Generate-and-Filter "
        "keeps 50.0 % and PPO keeps 3.4 %. The order of terms still goes with it (agentic first): correlation PPO 0.83 "
        "[0.61, 0.93]."
    )


def test_an_odds_ratio_without_an_end_is_a_dash_with_its_reason() -> None:
    evaluation = example()
    changed = [dataclasses.replace(c, mixed=None) for c in evaluation.comparisons]
    given = (
        MixedLogit(0.0, -0.5, 20.0, 0.2, 1.0, 0.5),
        MixedLogit(None, None, None, 0.0001, 0.1, 0.0, "the odds ratio has no end"),
    )
    changed[:2] = [dataclasses.replace(c, mixed=m) for c, m in zip(changed, given, strict=False)]
    table = fairness_tables.mixed(dataclasses.replace(evaluation, comparisons=tuple(changed)))
    assert table is not None
    assert [(row[2].text, row[2].interval, row[3].text) for row in table.rows] == [
        ("1.00", "[0.61, > 1,000,000]", "0.200"),
        ("–", "", "<\u00a00.001"),
    ]
    assert table.rows[1][-1].text == "the odds ratio has no end"
    assert fairness_tables.mixed(dataclasses.replace(evaluation, comparisons=())) is None


def test_an_evaluation_of_an_earlier_version_has_a_page_that_says_so() -> None:
    evaluation = example()
    kept = {key: metric for key, metric in evaluation.metrics.items() if metric.tier != "fairness"}
    comparisons = tuple(dataclasses.replace(c, mixed=None) for c in evaluation.comparisons)
    earlier = dataclasses.replace(evaluation, metrics=kept, comparisons=comparisons)
    assert fairness_tables.overview(earlier) is None
    assert fairness_tables.in_short(earlier) is None
    page = render(Content(earlier, [], [], {}, "files", {}, {}))
    assert "An earlier version measured, which did not look for them" in page
    page = render(Content(evaluation, [], [], {}, "files", {}, {}))
    assert "Gendered words by occupation" in page and "mixed logit" in page
