"""The file contract: what is written is read back the same, and what is damaged is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.evaluation.results import row_columns
from equipoise.evaluation.stored import from_json, read, read_rows, to_csv, to_json

EXAMPLE = Path(__file__).parent / "example"
HOSTILE = [
    "<script>alert(1)</script>", '=HYPERLINK("http://x","y")', "+1", "-1", "@a", "\ta", "a\x00b", "🙂 é", "\u202ea",
    "שלום", "x" * 10_000, "\ud800 alone \udfff", '1\n2\r\n3\r4 "5", 6', "", " ", "\ufeff", '"', ",", "\\",
]  # fmt: skip


def test_an_evaluation_is_read_back_as_it_was_written() -> None:
    evaluation = read(EXAMPLE)
    assert from_json(to_json(evaluation)) == evaluation
    assert json.loads(to_json(evaluation)) == {"written_by": "equipoise"} | json.loads(
        (EXAMPLE / "evaluation.json").read_text()
    )


def test_the_example_agrees_with_its_rows() -> None:
    evaluation = read(EXAMPLE)
    rows = list(read_rows(EXAMPLE / "rows.csv"))
    columns = row_columns(["agentic", "communal"])
    assert tuple(rows[0])[: len(columns)] == columns
    for name, method in evaluation.methods.items():
        own = [row for row in rows if row["Method"] == name]
        assert len(own) == method.n
        assert sum(row["Strict"] == "1" for row in own) / len(own) == method.metrics["strict"].value
        assert sum(map(sum, method.pairs)) == sum(row["Outcome"] == "both" for row in own)


def test_a_number_that_is_not_finite_cannot_be_written() -> None:
    evaluation = read(EXAMPLE)
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(dataclasses.replace(evaluation, settings={"x": float("nan")}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d | {"version": 99}, "version 99, expected 1"),
        (lambda d: d | {"surprise": 1}, "damaged"),
        (lambda d: {k: v for k, v in d.items() if k != "methods"}, "damaged"),
        (lambda d: d | {"equal_n": "many"}, "damaged"),
        (lambda d: d | {"files": 3}, "damaged"),
        (lambda d: [d], "is no evaluation"),
    ],
)
def test_another_document_is_refused(change, said: str) -> None:
    document = json.loads((EXAMPLE / "evaluation.json").read_text())
    with pytest.raises(UserError, match=said):
        from_json(json.dumps(change(document)))


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read "):
        read(tmp_path)


def test_hostile_texts_survive_the_csv_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(to_csv(["Text", "n"], [[text, i] for i, text in enumerate(HOSTILE)]))
    back = list(read_rows(tmp_path / "a.csv"))
    assert [row["Text"] for row in back] == HOSTILE
    assert [row["n"] for row in back] == [str(i) for i in range(len(HOSTILE))]


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.text(alphabet=st.characters(), max_size=20), min_size=1, max_size=5))
def test_any_texts_survive_the_csv_unchanged(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    (path).write_bytes(to_csv(["k", "Text"], [["k", text] for text in texts]))
    assert [row["Text"] for row in read_rows(path)] == texts


def test_floats_and_flags_are_written_so_that_they_read_back(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(to_csv(["a", "b", "c", "d"], [[0.1 + 0.2, True, None, float("nan")]]))
    (row,) = read_rows(tmp_path / "a.csv")
    assert (float(row["a"]), row["b"], row["c"], row["d"]) == (0.1 + 0.2, "1", "", "")
