"""Files of every layout in use give the same rows, and what is odd in them is told."""

import json
from pathlib import Path

import pandas as pd
import pytest

from equipoise.errors import UserError
from equipoise.protocol.task import PROTOCOL
from equipoise.tables.found import Layout, Problem
from equipoise.tables.layout import Columns, Row, arrange
from equipoise.tables.read import read_table
from tests.evaluation.files import write_csv

WHOLE = ["The nurse was bold and caring.", 'The pilot was calm,\nand "kind"; truly.', "The chef was loyal."]
JOBS = ["nurse", "pilot", "chef"]


def read(
    path: Path | str,
    columns: Columns | None = None,
    form: str = "auto",
    method: str | None = None,
    encoding: str | None = None,
) -> tuple[list[Row], Layout, list[Problem]]:
    table = read_table(str(path), encoding)
    return arrange(table, 0, PROTOCOL, columns=columns or Columns(), form=form, method=method, seed="")  # type: ignore[arg-type]


def check(rows: list[Row]) -> None:
    assert [row.measured for row in rows] == WHOLE
    assert [row.occupation for row in rows] == JOBS
    assert [row.line for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    "text", ["Text", "Output", "sample", "text", "completion", "response", "generated_text", "Generated Text"]
)
@pytest.mark.parametrize("job", ["Occupation", "occupation", "job", "profession", "PROFESSION"])
def test_a_csv_is_read_under_the_names_in_use(tmp_path: Path, text: str, job: str) -> None:
    rows, layout, problems = read(
        write_csv(tmp_path / "a.csv", [job, "x", text], list(zip(JOBS, "123", WHOLE, strict=True)))
    )
    check(rows)
    assert (layout.text, layout.occupation, layout.form, layout.how) == (text, job, "sentence", "detected")
    assert [(problem.kind, problem.count, problem.lines) for problem in problems] == [("line breaks", 1, (2,))]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_the_delimiter_is_that_of_the_header(tmp_path: Path, delimiter: str) -> None:
    check(
        read(write_csv(tmp_path / "a.txt", ["Occupation", "Text"], list(zip(JOBS, WHOLE, strict=True)), delimiter))[0]
    )


RECORDS = [{"Occupation": job, "Text": text} for job, text in zip(JOBS, WHOLE, strict=True)]
FRAME = pd.DataFrame(RECORDS)
DOCUMENTS = {
    "list": json.dumps(RECORDS),
    "indented": json.dumps(RECORDS, indent=2),
    "data": json.dumps({"model": "gpt", "data": RECORDS}),
    "columns of lists": json.dumps({"Occupation": JOBS, "Text": WHOLE}),
    "pandas columns": FRAME.to_json(orient="columns"),
    "pandas split": FRAME.to_json(orient="split"),
    "pandas table": FRAME.to_json(orient="table"),
    "pandas records": FRAME.to_json(orient="records"),
    "lines": "\n".join(map(json.dumps, RECORDS)) + "\n\n",
    "lines, crlf": "\r\n".join(map(json.dumps, RECORDS)),
    "pandas csv": FRAME.to_csv(),
}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("before", ["", "\ufeff"])
def test_json_of_every_shape_gives_the_rows(tmp_path: Path, name: str, before: str) -> None:
    (tmp_path / "a.dat").write_text(before + DOCUMENTS[name], encoding="utf-8", newline="")
    check(read(tmp_path / "a.dat")[0])


def test_one_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(RECORDS[0]))
    assert [row.measured for row in read(tmp_path / "a.jsonl")[0]] == WHOLE[:1]


def test_utf16_with_its_mark_is_read_and_other_encodings_are_asked_for(tmp_path: Path) -> None:
    text = "Occupation,Text\nnurse,The nurse was naïve.\n"
    (tmp_path / "a.csv").write_text(text, encoding="utf-16")
    assert read(tmp_path / "a.csv")[0][0].measured == "The nurse was naïve."
    (tmp_path / "b.csv").write_text(text, encoding="cp1252")
    with pytest.raises(UserError, match=r"b\.csv is not UTF-8 at byte 38, on line 2: .*--encoding cp1252"):
        read(tmp_path / "b.csv")
    assert read(tmp_path / "b.csv", encoding="cp1252")[0][0].measured == "The nurse was naïve."
    with pytest.raises(UserError, match="there is no encoding 'klingon'"):
        read(tmp_path / "b.csv", encoding="klingon")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("Text,Occupation\n", "holds no rows"),
        ("[]", "holds no rows"),
        ("[1, 2]", "no list of objects"),
        ('{"Text": [1, 2], "Occupation": ["a"]}', "different lengths"),
        ('{"Text": "a"\n{', "neither JSON nor JSON lines"),
        ("a,b\n1,2\n", "no column of texts among 'a', 'b': name it with --text-column"),
        ("Text\nHello there.\n", "does not say which occupation"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=said) as raised:
        read(tmp_path / "a.csv")
    assert "\n" not in str(raised.value) and "a.csv" in str(raised.value)


def test_a_missing_file_and_a_folder_are_said(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            read(path)


def test_bare_continuations_get_the_prefix(tmp_path: Path) -> None:
    ends = [" bold and caring.", "calm.", ", of course, loyal.", "was x."]
    path = write_csv(tmp_path / "a.csv", ["job", "sample"], [["nurse", end] for end in ends])
    rows, layout, _ = read(path)
    assert layout.form == "continuation" and layout.how == "detected"
    assert [row.measured for row in rows] == [
        "The nurse was bold and caring.", "The nurse was calm.", "The nurse was, of course, loyal.", "The nurse was x."
    ]  # fmt: skip
    assert [row.measured for row in read(path, form="sentence")[0]] == [end.strip() for end in ends]


def test_prompts_that_are_the_frame_name_its_occupation(tmp_path: Path) -> None:
    for prompt in ("The nurse was", "the nurse was ", "THE  NURSE WAS"):
        path = write_csv(tmp_path / "a.csv", ["prompt", "completion"], [[prompt, "bold and kind."]] * 2)
        rows, _, _ = read(path, Columns(occupation="prompt"))
        assert {(row.occupation, row.measured) for row in rows} == {("nurse", "The nurse was bold and kind.")}
    path = write_csv(tmp_path / "b.csv", ["prompt", "completion"], [["The zoo keeper was", "bold."]])
    assert read(path, Columns(occupation="prompt"))[0][0].measured == "The zoo keeper was bold."


def test_a_mixed_file_is_decided_row_by_row_and_told(tmp_path: Path) -> None:
    texts = [
        *WHOLE[:1] * 3,
        '"The nurse was bold."',
        "the NURSE was kind.",
        "bold.",
        "Nurses were bold.",
        "",
        "**The nurse** was x.",
    ]
    rows, layout, problems = read(write_csv(tmp_path / "a.csv", ["job", "text"], [["Nurse", t] for t in texts]))
    assert layout.form == "mixed"
    assert [row.measured for row in rows[3:]] == [
        "The nurse was bold.", "the NURSE was kind.", "The nurse was bold.", "Nurses were bold.", "",
        "**The nurse** was x.",
    ]  # fmt: skip
    assert rows[3].text == '"The nurse was bold."'  # as it is in the file
    assert [(p.kind, p.count, p.lines) for p in problems] == [("empty text", 1, (8,)), ("mixed forms", 1, (6,))]


def test_occupations_are_read_from_the_text_where_no_column_has_them(tmp_path: Path) -> None:
    texts = ["The nurse was bold.", '"The civil engineer was kind."', "She was kind."]
    rows, layout, problems = read(write_csv(tmp_path / "a.csv", ["Output"], [[t] for t in texts]))
    assert layout.occupation is None
    assert [row.occupation for row in rows] == ["nurse", "civil engineer", "(unknown)"]
    assert [(p.kind, p.lines) for p in problems] == [("no occupation", (3,))]


def test_empty_texts_of_every_kind_are_kept_and_counted(tmp_path: Path) -> None:
    texts = [None, "", "  ", float("nan"), "NaN", "None", 7, [1], "The nurse was bold."]
    (tmp_path / "a.json").write_text(json.dumps([{"job": "nurse", "text": t} for t in texts]))
    rows, _, problems = read(tmp_path / "a.json")
    assert len(rows) == 9
    assert [row.measured for row in rows[:6]] == [""] * 6
    counts = {p.kind: p.count for p in problems}
    assert counts["empty text"] == 6 and counts["text that is no string"] == 2


def test_ragged_rows_are_mended_where_that_is_certain_and_else_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("job,Text\nnurse,The nurse was bold, and kind.\nnurse,The nurse was x.\n")
    rows, _, problems = read(path)
    assert [row.measured for row in rows] == ["The nurse was bold, and kind.", "The nurse was x."]
    assert [(p.kind, p.count, p.lines) for p in problems] == [("too many fields", 1, (1,))]
    path.write_text("job,Text,n\nnurse,The nurse was bold.\nnurse,The nurse was x.,\nnurse,The nurse was y.,1,\n")
    rows, _, problems = read(path)
    assert len(rows) == 3 and [(p.kind, p.count, p.lines) for p in problems] == [("too few fields", 1, (1,))]
    path.write_text("job,Text\nnurse,The nurse was bold\nand kind.\n")
    with pytest.raises(UserError, match=r"a\.csv: line 3 ends before its text, with 1 of 2 fields: .*quotation marks"):
        read(path)
    path.write_text("Text,job\nThe nurse was x.,nurse\nThe nurse was bold, and kind.,nurse\n")
    with pytest.raises(UserError, match=r"a\.csv: line 3 has 3 fields for 2 columns, .* in quotation marks"):
        read(path)


@pytest.mark.parametrize(
    ("columns", "values", "method"),
    [
        (["Method", "Label", "Model"], ["PPO", "RLHF", "llama"], "PPO"),
        (["Label", "Model"], ["RLHF", "llama"], "RLHF"),
        (["Label", "Model Name"], ["1", "llama"], "llama"),  # labels of outcomes name no method
        (["Label", "model_name"], ["Agentic Only", "llama"], "llama"),
        (["Model"], [""], "a"),
        ([], [], "a"),
    ],
)
def test_the_method_is_named_by_the_first_column_that_names_one(
    tmp_path: Path, columns: list[str], values: list[str], method: str
) -> None:
    path = write_csv(tmp_path / "a.csv", [*columns, "Text"], [[*values, WHOLE[0]]] * 2)
    assert {row.method for row in read(path)[0]} == {method}
    assert {row.method for row in read(path, method="mine")[0]} == {"mine"}


def test_options_name_the_columns(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["Text", "Raw", "who", "kind of"], [["x", WHOLE[0], "nurse", "PPO"]])
    (row,), layout, _ = read(path, Columns("Raw", "who", "kind_of"))
    assert (row.measured, row.occupation, row.method, layout.method) == (WHOLE[0], "nurse", "PPO", "kind of")
    with pytest.raises(UserError, match=r"no column 'raws' for --text-column: it has 'Text', 'Raw'"):
        read(path, Columns("raws"))


def test_seeds_and_runs_come_from_their_columns(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"Seed": 3.0, "Run ID": 7, "text": WHOLE[0]}]))
    (row,), _, _ = read(tmp_path / "a.json")
    assert (row.seed, row.run_id) == ("3", "7")
