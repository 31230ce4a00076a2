"""What a refusal says to do works when it is done."""

import json
import re
from pathlib import Path

import pytest

from equipoise.errors import UserError
from equipoise.learning.supervised import read_rows
from equipoise.protocol.task import PROTOCOL
from tests.tables.made import PAIRS, RECORDS, given, pairs, read, table, told

TEXTS = [text for _, text in PAIRS]


def refused(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        read(path)
    assert "\n" not in str(raised.value) and path.name in str(raised.value)
    return str(raised.value)


def test_lines_before_a_header_are_to_be_deleted(tmp_path: Path) -> None:
    for before in (["# made by a tool"], ["My results,", ""], ["A title", "of the 3rd of May", ""]):
        said = refused(given(tmp_path / "a.csv", "\n".join([*before, *table()])))
        assert f"header stands on line {len(before) + 1}: delete what is before it" in said
        assert "--text-column" not in said
    assert pairs(read(given(tmp_path / "a.csv", "\n".join(table())))) == PAIRS
    said = refused(given(tmp_path / "b.txt", "\n".join(["Here are sentences:", *TEXTS])))
    assert "line 1 is no header" in said and "delete it" in said and "--text-column" not in said
    assert pairs(read(given(tmp_path / "b.txt", "\n".join(TEXTS)))) == PAIRS
    found = read(given(tmp_path / "b.txt", "\n".join(["Text", "She was kind.", *TEXTS])))
    assert len(found[0]) == 13 and told(found) == {"no occupation": 1}


@pytest.mark.parametrize("line", ["A {0} is bold and kind.", "Every {0} rests.", "{1}. The {0} was bold."])
def test_sentences_that_begin_otherwise_need_their_occupations(tmp_path: Path, line: str) -> None:
    lines = [line.format(job, i) for i, (job, _) in enumerate(PAIRS, 1)]
    path = given(tmp_path / "a.txt", "\n".join(lines))
    said = refused(path)
    assert "put one there, such as Occupation,Text, and before each sentence its occupation" in said
    assert "--text-column" not in said
    path = given(
        path, "\n".join(["Occupation,Text", *(f"{o},{text}" for (o, _), text in zip(PAIRS, lines, strict=True))])
    )
    assert [row.text for row in read(path, form="sentence")[0]] == lines
    if line.startswith("{"):
        assert "--form sentence" in refused(path)  # never "The nurse was 1. The nurse was bold."
    else:
        assert [row.text for row in read(path)[0]] == lines


def test_a_delimiter_of_another_kind_is_named(tmp_path: Path) -> None:
    rows = [line.replace(",", ":", 1) for line in table()]
    assert "write 'sep=:' on a line before the first" in refused(given(tmp_path / "a.csv", "\n".join(rows)))
    assert pairs(read(given(tmp_path / "a.csv", "\n".join(["sep=:", *rows])))) == PAIRS
    for header, other in ((",", ";"), (";", ","), (",", "\t"), (",", "|")):
        lines = [table(header)[0], *table(header)[1:3], *table(other)[3:]]
        said = refused(given(tmp_path / "b.csv", "\n".join(lines)))
        assert f"line 4 has {other!r} between its fields, and the header has {header!r}" in said
    lines = ["Text,Occupation", *(f"{t},{o}" for o, t in PAIRS[:3]), *(f"{t};{o}" for o, t in PAIRS[3:])]
    assert "line 5 has ';' between its fields" in refused(given(tmp_path / "c.csv", "\n".join(lines)))


@pytest.mark.parametrize(
    "content", ["<a/>", "<?xml version='1.0'?><a>x</a>", "<!DOCTYPE html><p>x", "<table><tr><td>x</td></tr></table>\n"]
)
def test_markup_is_called_by_its_name(tmp_path: Path, content: str) -> None:
    assert "is XML or HTML, which is not read here: write its table as CSV" in refused(
        given(tmp_path / "a.xml", content)
    )


def test_columns_of_which_each_row_fills_one_are_joined_with_a_count(tmp_path: Path) -> None:
    others = [{"occupation": o, "text": t} for o, t in PAIRS]
    nested = [{"occupation": o, "output": {"text": t}} for o, t in PAIRS]
    for more in (others, nested):
        found = read(given(tmp_path / "a.jsonl", "\n".join(map(json.dumps, [*RECORDS[:5], *more[5:]]))))
        assert pairs(found) == PAIRS and told(found) == {"joined columns": 7}
        assert len(found[2]) == 2 and "5 rows in 'Text' and 7 rows in" in found[2][1].message
    failed = given(tmp_path / "b.json", [*RECORDS, {"Occupation": "nurse", "error": {"text": "Too many requests."}}])
    assert "texts in 'Text', and on 1 rows without one in 'error.text'" in refused(failed)
    both = given(tmp_path / "c.json", [*RECORDS, {"Text": "The nurse was x.", "text": "The nurse was y."}])
    assert "2 columns called 'Text'" in refused(both)
    assert told(read(given(tmp_path / "d.json", [*RECORDS[:5], *others[5:]]), text="Text"))["empty text"] == 7


def test_texts_within_something_else_are_refused_and_single_ones_counted(tmp_path: Path) -> None:
    for wrap in (
        json.dumps,
        lambda t: str([t]),
        lambda t: f"<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n{t}",
    ):
        wrapped = [wrap({"text": t} if wrap is json.dumps else t) for t in TEXTS]  # type: ignore[arg-type]
        path = given(tmp_path / "a.json", [{"job": o, "text": t} for (o, _), t in zip(PAIRS, wrapped, strict=True)])
        assert "12 texts stand within JSON, a list or the markup of a chat (row 1: " in refused(path)
        assert [row.text for row in read(path, form="sentence")[0]] == wrapped
        found = read(given(tmp_path / "b.json", [*RECORDS, {"Occupation": "nurse", "Text": wrapped[0]}]))
        assert found[0][-1].text == wrapped[0] and told(found)["wrapped texts"] == 1
    found = read(given(tmp_path / "c.json", [{"job": o, "text": f"{t}<|im_end|>"} for o, t in PAIRS]))
    assert told(found) == {"markup": 12}
    found = read(given(tmp_path / "d.json", [{"job": "nurse", "outputs": ["The nurse was bold.", None]}] * 2))
    assert [row.measured for row in found[0]] == ["The nurse was bold.", ""] * 2
    assert told(found) == {"several texts": 2, "empty text": 2}


def test_methods_that_are_merged_or_are_none_are_said(tmp_path: Path) -> None:
    found = read(given(tmp_path / "a.json", [{"Method": m, **row} for m in ("PPO", "PPO ") for row in RECORDS]))
    assert {row.method for row in found[0]} == {"PPO"} and told(found) == {"spaces around methods": 12}
    each = given(tmp_path / "b.json", [{"Model": f"m{i}", **RECORDS[0]} for i in range(25)])
    assert re.search(r"'Model' holds another value on each of 25 rows.*NAME=", refused(each))
    assert {row.method for row in read(each, method="mine")[0]} == {"mine"}
    labels = read(given(tmp_path / "c.json", [{"Label": f"m{i}", **RECORDS[0]} for i in range(25)]))
    assert "holds 25 different values ('m0'" in labels[2][0].message


def test_where_there_are_no_options_none_is_named(tmp_path: Path) -> None:
    two = [{"text": f"Say what the {o} does.", "output": t, "job": o} for o, t in PAIRS]
    odd: list[bytes | list[dict[str, str]]] = [
        "Text\nThe nurse was naïve.\n".encode("cp1252"),
        two,
        [{"satz": t} for t in TEXTS],
        [{"job": "lawyer", "text": t} for t in TEXTS],
        [{"job": "nurse", "text": f'{{"text": "{t}"}}'} for t in TEXTS],
        [{"job": "nurse", "text": "Dedicated to all."}] * 9,
        [{"text": "x", "Text": "y"}],
    ]
    for content in odd:
        with pytest.raises(UserError) as raised:
            read_rows(given(tmp_path / "a.dat", content), PROTOCOL)
        assert "--" not in str(raised.value) and "NAME=" not in str(raised.value)
        for kept in ("leaving the others out",) if content is two else ():
            assert kept in str(raised.value)
    left = [{"output": row["output"], "job": row["job"]} for row in two]
    assert len(read_rows(given(tmp_path / "b.json", left), PROTOCOL).rows) == 12
    wide = read_rows(given(tmp_path / "c.csv", "\n".join(table()).encode("utf-16-le")), PROTOCOL)
    assert not any("--" in notice for notice in wide.notices)
