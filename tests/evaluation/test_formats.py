"""Tables as Markdown and LaTeX: the numbers as a reader wants them, and nothing in a text that is read as markup."""

import re
from dataclasses import replace

import pytest

from equipoise.evaluation import tables
from equipoise.evaluation.formats import latex, markdown, markdown_text
from equipoise.evaluation.results import Estimate, Reference
from equipoise.evaluation.tables import Cell, Table, fixed, formatted, published
from tests.evaluation.hostile import TEXTS, example


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0035, "share", "0.35"),
        (0.9992, "share", "99.92"),
        (0.875, "share", "87.5"),
        (0.0, "share", "0"),
        (1.0, "share", "100"),
        (13.0, "count", "13"),
        (13.27, "count", "13.3"),
        (2.9297, "nats/token", "2.93"),
        (67.77, "ppl", "67.8"),
        (-0.02, "nats", "−0.02"),
    ],
)
def test_numbers_are_shown_with_the_digits_that_their_unit_deserves(value: float, unit: str, shown: str) -> None:
    assert formatted(value, unit) == shown


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.1281, "share", "12.81"),
        (0.9987, "share", "99.87"),
        (1.0, "share", "100"),
        (0.0, "share", "0"),
        (20.31, "ppl", "20.31"),
        (65.0, "ratio", "65"),
        (0.945, "bits", "0.945"),
        (10240.0, "count", "10,240"),
        (-0.5, "nats", "−0.5"),
    ],
)
def test_published_numbers_keep_the_digits_that_they_have(value: float, unit: str, shown: str) -> None:
    assert published(value, unit) == shown
    (row,) = tables.study_table(
        replace(example(), reference=(Reference("s", "m", "study/either", value, None, None, True, ""),))
    ).published
    if unit == "share":
        assert shown in [cell.text for cell in row]


def test_nothing_is_minus_zero() -> None:
    assert fixed(-0.001, 1) == "0.0"
    assert fixed(-0.001, 1, sign=True) == "0.0"
    assert fixed(0.26, 1, sign=True) == "+0.3"
    assert fixed(-1234.5, 1) == "−1,234.5"


def test_the_headline_table_has_a_row_a_method_and_says_why_published_rows_cannot_be_compared() -> None:
    table = tables.headline(example())
    assert [row[0].text for row in table.rows] == ["Prompt-Only", "Generate-and-Filter", "PPO"]
    strict = table.heads.index("strict success, % ↑")
    assert [(row[strict].text, row[strict].interval) for row in table.rows][2] == ("90.0", "[74.9, 98.0]")
    ((name, *_),) = table.published
    assert name.text == "Ctrl-G (AND), gpt2-large"
    assert table.sources == ("arXiv 2510.22084",)
    assert table.reasons == ("not comparable: its matcher is a substring search",)


def test_methods_without_an_interval_for_the_same_reason_share_a_note() -> None:
    evaluation, key = example(), "pairs/effective"
    reasons = {"Prompt-Only": "too few", "Generate-and-Filter": "too few", "PPO": "one pair"}
    methods = {
        name: replace(m, metrics=m.metrics | {key: Estimate(2.0, note=reasons[name])})
        for name, m in evaluation.methods.items()
    }
    for table in (tables.headline, tables.in_short):
        notes = table(replace(evaluation, methods=methods)).notes
        assert notes[-2:] == (
            "effective pairs of Prompt-Only and Generate-and-Filter: too few",
            "effective pairs of PPO: one pair",
        )


def test_published_rows_with_the_same_reason_share_a_note_and_fill_the_width_of_the_table() -> None:
    rows = ((Cell("A"), Cell("1")), (Cell("B"), Cell("2")))
    table = Table("", ("method", "x", "y"), (), rows, ("paper", "paper"), ("not comparable: why",) * 2)
    assert markdown(table).splitlines()[4:] == [
        "| A † | 1 |  |",
        "| B † | 2 |  |",
        "",
        "- † A; B (paper): not comparable: why",
    ]


def test_a_number_that_is_missing_is_a_dash_with_its_reason() -> None:
    cell = tables.estimate_cell(Estimate(None, note="no rows"), "share")
    assert cell == Cell("–", note="no rows")


def test_a_word_of_a_heading_in_latex_is_not_broken_unless_it_is_very_long() -> None:
    table = Table("c", ("method", "effective combinations ↑", "x" * 30), ((Cell("a"), Cell("1"), Cell("2")),))
    text = latex(table, "tab:x", wide=False)
    assert r"\shortstack{effective\\combinations $\uparrow$}" in text.replace("\u00a0", " ").replace("~", " ")
    assert r"\shortstack{xxxxxxxxxxxxxxxxxxxx\\xxxxxxxxxx}" in text


def test_markdown_of_a_small_table() -> None:
    table = Table("A caption", ("method", "x"), ((Cell("a|b"), Cell("1.0", "[0.5, 1.5]")),), notes=("x: a_note",))
    assert markdown(table) == (
        "A caption\n\n| method | x |\n| --- | ---: |\n| a\\|b | 1.0 \\[0.5, 1.5\\] |\n\n- x: a\\_note\n"
    )


@pytest.mark.parametrize("text", TEXTS)
def test_hostile_texts_stay_one_cell_of_markdown(text: str) -> None:
    shown = markdown_text(text)
    assert "\n" not in shown and not re.search(r"(?<!\\)[|`*_\[$]|[<>\x00\ud800-\udfff]", shown)
