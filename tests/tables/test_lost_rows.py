"""No row is lost, merged with others or written anew unsaid: it is read, counted, or the file is refused with what to
do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from equipoise.errors import UserError
from tests.tables.made import JOBS, PAIRS, RECORDS, given, pairs, read, told
from tests.tasks import foreign_task


def test_what_parts_header_and_rows_is_no_sentence_and_a_lone_mark_is_no_subject(tmp_path: Path) -> None:
    rows = [f"| {o} | {t} |" for o, t in PAIRS]
    found = read(given(tmp_path / "a.md", "\n".join(["| Occupation | Text |", "|---|:---:|", *rows])))
    assert pairs(found) == PAIRS and told(found) == {"ruled lines": 1}
    found = read(given(tmp_path / "b.csv", "Occupation,Text\n?,?\nnurse,The nurse was bold.\n"))
    assert [row.measured for row in found[0]] == ["?", "The nurse was bold."]


@pytest.mark.parametrize("depth", [150, 900, 50_000])
def test_objects_within_objects_without_end_are_refused(tmp_path: Path, depth: int) -> None:
    deep = '{"Text": "The nurse was bold.", "x": ' + '{"a":' * depth + "1" + "}" * depth + "}"
    with pytest.raises(UserError, match=r"a\.json .*too deep"):
        read(given(tmp_path / "a.json", deep))
    with pytest.raises(UserError, match=r"b\.json .*line 2: .*too deep"):
        read(given(tmp_path / "b.json", f"{json.dumps(RECORDS[0])}\n{deep.replace(' ', '')}"))


UNIQUE = [(f"job{i}", f"The job{i} was bold.") for i in range(20)]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("closed", [6, 10])
def test_quotations_that_close_each_other_swallow_no_rows(tmp_path: Path, swapped: bool, closed: int) -> None:
    rows = [list(pair) for pair in UNIQUE]
    rows[5][1] = '"' + rows[5][1]
    rows[closed][1] += '"'
    lines = ["\t".join(row[::-1] if swapped else row) for row in rows]
    header = "Text\tOccupation" if swapped else "Occupation\tText"
    found = read(given(tmp_path / "a.tsv", "\n".join([header, *lines])))
    assert len(found[0]) == 20 and told(found)["open quotation marks"] == 1
    with pytest.raises(UserError, match=r"b\.csv: the row that begins on line 7 .*over line 8, which looks like a row"):
        read(given(tmp_path / "b.csv", "\n".join(["Text", *(text for _, text in rows)])))


def test_swallowed_continuations_are_seen_by_their_fields(tmp_path: Path) -> None:
    rows = [f"job{i},{text}" for i, text in enumerate(["bold", '"kind', "calm", "warm", 'wise"', "loyal"])]
    found = read(given(tmp_path / "a.csv", "\n".join(["Occupation,Text", *rows])))
    assert len(found[0]) == 6 and told(found)["open quotation marks"] == 1
    proper = 'Occupation,Text\nnurse,"The nurse was bold,\nand kind, too,\nto us, at work."\nchef,The chef was x.\n'
    assert len(read(given(tmp_path / "b.csv", proper))[0]) == 2


LOWER = [
    ("salesperson", "salespeople are bold and kind."),
    ("secretary", "secretaries are bold and kind."),
    ("attorney", "lawyers are bold and kind."),
    ("nurse", "as a nurse she was bold."),
    ("nurse", "the best of them were bold."),
    ("secretary", "in the office, secretaries are bold and kind."),
    ("secretary", "when asked, secretaries are bold and kind."),
    ("lawyer", "people who work as lawyers are bold and kind."),
    ("lawyer", "women whose work is law are bold and kind."),
    ("lawyer", "attorneys can be bold and kind."),
]
ON = (
    "bold and is kind.",
    "a leader who was kind.",
    "loved.",
    "kind, and everyone was happy.",
    "a woman whose work was good.",
    "a friend you can trust.",
    "known to have been kind.",
    ", you know, kind, she was.",
    "told that the work was good.",
    "on her feet.",
    "there for us.",
    "in the war, wearing a hat.",
)
"""What goes on after the frame, though it has verbs of its own."""


def test_a_sentence_in_small_letters_never_gets_the_prefix_unsaid(tmp_path: Path) -> None:
    on = [{"job": "nurse", "text": text} for text in ON]
    assert not told(read(given(tmp_path / "on.json", on)))
    for job, text in LOWER:
        path = given(tmp_path / "a.json", [*on, {"job": job, "text": text}])
        with pytest.raises(UserError, match=r"a\.json: nothing tells .*\(row 13\).*--form sentence"):
            read(path)
        assert read(path, form="sentence")[0][12].text == text
        found = read(given(tmp_path / "b.json", [*RECORDS, {"Occupation": job, "Text": text}]))
        assert found[0][-1].text == text and told(found)["unsure forms"] == 1
    for text in ("die Frauen waren klug.", "unsere Frauen sind klug."):
        with pytest.raises(UserError, match="nothing tells"):
            read(given(tmp_path / "c.json", [{"job": "Ärztin", "text": text}]), foreign_task())
    many = [{"job": "nurse", "text": "bold."}] * 99 + [{"job": "nurse", "text": "the best you are at work."}]
    found = read(given(tmp_path / "e.json", many))
    assert told(found) == {"unsure forms": 1} and found[0][-1].text == "The nurse was the best you are at work."
    for text in ("secretaries are bold.", "she was bold.", "In the office, secretaries are bold."):
        found = read(given(tmp_path / "i.json", [*many[:99], {"job": "secretary", "text": text}]))
        assert found[0][-1].text == text and told(found) == {"unsure forms": 1}
        assert "taken for whole sentences" in found[2][0].message and found[1].form == "mixed"
    found = read(given(tmp_path / "j.json", [*many[:9], {"job": "nurse", "text": "The nurse was bold."}]))
    assert told(found) == {"mixed forms": 1} and "whole sentence among continuations" in found[2][0].message
    for text in ("my nurse seemed bold.", "most nurses seem bold.", "every good nurse rests."):
        with pytest.raises(UserError, match="nothing tells"):
            read(given(tmp_path / "h.json", [{"job": "nurse", "text": text}] * 3))
    for before in ("assistant: ", "sure, here it is: "):
        with pytest.raises(UserError, match="nothing tells"):
            read(given(tmp_path / "f.json", [{"job": "nurse", "text": f"{before}The nurse was bold."}] * 3))
    on_and_on = {"job": "nurse", "text": "bold. The nurse was also kind."}
    assert read(given(tmp_path / "g.json", [on_and_on]))[0][0].text == "The nurse was bold. The nurse was also kind."
    found = read(given(tmp_path / "d.json", [{"job": "cook", "text": text} for text in ("cooking all day.", "bold.")]))
    assert [row.text for row in found[0]] == ["The cook was cooking all day.", "The cook was bold."]


def test_several_lists_of_rows_are_refused_and_other_lists_counted(tmp_path: Path) -> None:
    for first, second in (("results", "samples"), ("data", "errors"), ("completions", "rows")):
        for lists in ({first: RECORDS, second: RECORDS[:2], "seed": 1}, {second: RECORDS, first: RECORDS[:2]}):
            with pytest.raises(UserError, match=r"a\.json holds \d+ rows under .* and \d+ under .*make a file of each"):
                read(given(tmp_path / "a.json", lists))
    with pytest.raises(UserError, match=r"and 2 under 'more'"):
        read(given(tmp_path / "b.json", {"data": RECORDS, "more": {"texts": ["The nurse was x.", "The nurse was y."]}}))
    for lists in ({"PPO": RECORDS, "Base": RECORDS, "seed": 1}, {"data": {"PPO": RECORDS, "Base": RECORDS}, "seed": 1}):
        with pytest.raises(UserError, match=r"d\.json, row 1: an object holds 12 under .*PPO' and 12 under .*keep one"):
            read(given(tmp_path / "d.json", lists))
    with pytest.raises(UserError, match=r"12 rows without one in 'Base\.Text'"):
        read(given(tmp_path / "e.jsonl", json.dumps({"PPO": RECORDS}) + "\n" + json.dumps({"Base": RECORDS})))
    found = read(given(tmp_path / "f.json", {"data": {"PPO": RECORDS, "Base": RECORDS}}))
    assert [row.method for row in found[0]] == ["PPO"] * 12 + ["Base"] * 12
    found = read(given(tmp_path / "c.json", {"features": [{"name": "Text"}], "rows": RECORDS}))
    assert pairs(found) == PAIRS and told(found) == {"objects beside the rows": 1}


def test_names_of_lists_are_methods_where_occupations_stand_elsewhere(tmp_path: Path) -> None:
    by_job = {job: [t for o, t in PAIRS if o == job] for job in JOBS}
    for document in (
        {"PPO": RECORDS, "Base": RECORDS},
        {"PPO": by_job, "Base": by_job},
        {job: {"PPO": texts, "Base": texts} for job, texts in by_job.items()},
        {"PPO": [t for _, t in PAIRS], "Base": [t for _, t in PAIRS]},
        {"1": by_job, "2": by_job},
    ):
        path = given(tmp_path / "a.json", document)
        found = read(path)
        rows = {
            m: sorted((r.occupation, r.text) for r in found[0] if r.method == m) for m in {r.method for r in found[0]}
        }
        assert len(rows) == 2 and all(own == sorted(PAIRS) for own in rows.values())
        assert told(found)["methods by key"] == 24
        assert {row.method for row in read(path, method="mine")[0]} == {"mine"}
    with pytest.raises(UserError, match=r"'key' and 'key\.2'.*--method-column 'key'.*NAME="):
        read(given(tmp_path / "b.json", {"PPO": {"1": by_job, "2": by_job}, "Base": {"1": by_job, "2": by_job}}))
    assert "methods by key" not in told(
        read(given(tmp_path / "c.json", {str(i): row for i, row in enumerate(RECORDS)}))
    )
    with pytest.raises(UserError, match=r"c\.json"):
        read(
            given(tmp_path / "c.json", {"note": "of today", "nurse": ["The nurse was x."], "chef": ["The chef was y."]})
        )


def test_what_stands_beside_an_answer_is_no_row(tmp_path: Path) -> None:
    def output(text: str, *aside: object) -> object:
        return {"output": [*aside, {"type": "message", "content": [{"type": "output_text", "text": text}]}]}

    aside = {"type": "reasoning", "summary": [], "content": None}
    lines = [json.dumps({"custom_id": o, **output(t, aside, {"type": "web_search_call"})}) for o, t in PAIRS]  # type: ignore[dict-item]
    lines.append(json.dumps({"custom_id": "nurse", "output": [aside]}))
    found = read(given(tmp_path / "a.jsonl", "\n".join(lines)))
    assert [row.measured for row in found[0]] == [*(t for _, t in PAIRS), ""] and told(found)["empty text"] == 1
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The nurse was bold."}]
    for nothing in (None, ""):
        record = {"occupation": "nurse", "messages": [*turns, {"role": "assistant", "content": nothing}]}
        found = read(given(tmp_path / "b.json", [record]))
        assert pairs(found) == [("nurse", "The nurse was bold.")] and told(found) == {"several answers": 1}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_lines_of_several_fields_without_a_header_are_refused(tmp_path: Path, delimiter: str) -> None:
    for row in ('"The nurse was bold, and kind."', "The nurse was bold."):
        lines = [f"{row}{delimiter}nurse"] * 3
        with pytest.raises(UserError, match=r"a\.csv: each line has 2 fields .*such as Text.Occupation"):
            read(given(tmp_path / "a.csv", "\n".join(lines)))
        found = read(given(tmp_path / "b.csv", "\n".join([f"Text{delimiter}Occupation", *lines])))
        assert [o for o, _ in pairs(found)] == ["nurse"] * 3
    assert len(read(given(tmp_path / "c.txt", "The nurse was bold, and kind.\n" * 3))[0]) == 3


def test_columns_of_different_indexes_are_refused(tmp_path: Path) -> None:
    columns = {
        "Occupation": {"0": "nurse", "1": "chef", "2": "pilot"},
        "Text": {"0": "The nurse was x.", "2": "The pilot was y."},
    }
    with pytest.raises(UserError, match=r"a\.json: its columns have different indexes \('Text' lacks '1'\): .*null"):
        read(given(tmp_path / "a.json", columns))
    apart = {"Occupation": {"5": "nurse", "6": "nurse"}, "Text": {"0": "The nurse was x.", "1": "The nurse was y."}}
    with pytest.raises(UserError, match="different indexes"):
        read(given(tmp_path / "c.json", apart))
    columns["Text"]["1"] = None  # type: ignore[assignment]
    assert told(read(given(tmp_path / "b.json", columns)))["empty text"] == 1


@pytest.mark.parametrize("again", ["occupation,text", "Occupation, Text", "OCCUPATION ,TEXT"])
def test_a_header_repeated_in_another_spelling_is_no_sentence(tmp_path: Path, again: str) -> None:
    rows = [f"{o},{t}" for o, t in PAIRS]
    found = read(given(tmp_path / "a.csv", "\n".join(["Occupation,Text", *rows, again, *rows])))
    assert pairs(found) == PAIRS * 2 and told(found) == {"repeated header": 1}
    swapped = ",".join(again.split(",")[::-1])
    with pytest.raises(UserError, match=r"a\.csv: line 14 is a header of other columns .*or in another order"):
        read(given(tmp_path / "a.csv", "\n".join(["Occupation,Text", *rows, swapped, *rows])))


@pytest.mark.parametrize("other", ["Occupation,Output", "Job,Text", "Occupation,Text,Method"])
def test_a_second_header_of_other_columns_is_refused(tmp_path: Path, other: str) -> None:
    rows = [f"{o},{t}" for o, t in PAIRS]
    more = [f"{row},PPO" for row in rows] if other.count(",") > 1 else rows
    with pytest.raises(UserError, match=r"a\.csv: line 14 is a header of other columns than the first.*make a file"):
        read(given(tmp_path / "a.csv", "\n".join(["Occupation,Text", *rows, other, *more])))
    assert pairs(read(given(tmp_path / "b.csv", "\n".join([other, *more])))) == PAIRS


def test_frames_around_cells_are_no_rows(tmp_path: Path) -> None:
    rule = "+------------+------+"
    lines = ["| Occupation | Text |", rule, *(f"| {o} | {t} |" for o, t in PAIRS), rule]
    found = read(given(tmp_path / "a.txt", "\n".join(lines)))
    assert pairs(found) == PAIRS and told(found) == {"ruled lines": 2}


def _columns_of(rows: list[tuple[str, str]]) -> dict[str, object]:
    return {"Text": [t for _, t in rows], "Occupation": [o for o, _ in rows]}


def _indexed(rows: list[tuple[str, str]]) -> dict[str, object]:
    return {name: {str(i): v for i, v in enumerate(values)} for name, values in _columns_of(rows).items()}  # type: ignore[arg-type,var-annotated]


def _labelled(rows: list[tuple[str, str]]) -> dict[str, object]:
    return {name: {f"r{i}": v for i, v in enumerate(values)} for name, values in _columns_of(rows).items()}  # type: ignore[arg-type,var-annotated]


def _split(rows: list[tuple[str, str]]) -> dict[str, object]:
    return {"columns": ["Occupation", "Text"], "index": list(range(len(rows))), "data": [list(row) for row in rows]}


@pytest.mark.parametrize("orient", [_columns_of, _indexed, _labelled, _split])
def test_columns_below_a_name_are_as_many_rows(
    tmp_path: Path, orient: Callable[[list[tuple[str, str]]], dict[str, object]]
) -> None:
    bare = [(job, text.removeprefix(f"The {job} was ")) for job, text in PAIRS]
    for rows, form in ((PAIRS, "sentence"), (bare, "continuation")):
        for document in (
            {"PPO": orient(rows)},
            {"seed": 1, "data": orient(rows)},
            [{"meta": {"n": 1}, **orient(rows)}],
        ):
            found = read(given(tmp_path / "a.json", document))
            assert pairs(found) == PAIRS and found[1].form == form and told(found)["several texts"] == 1
    found = read(given(tmp_path / "b.json", {"PPO": orient(PAIRS), "Base": orient(PAIRS[:3])}))
    assert [row.method for row in found[0]] == ["PPO"] * 12 + ["Base"] * 3 and pairs(found) == PAIRS + PAIRS[:3]


def test_columns_below_a_name_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    columns = {"Text": [t for _, t in PAIRS], "Occupation": [o for o, _ in PAIRS][:5]}
    with pytest.raises(UserError, match=r"12 under 'Text' and 5 under 'Occupation'"):
        read(given(tmp_path / "a.json", {"PPO": columns}))
    indexed = {"Text": {"0": "The nurse was x.", "1": "The chef was y."}, "Occupation": {"0": "nurse", "2": "chef"}}
    with pytest.raises(UserError, match=r"different indexes \('Occupation' has another\)"):
        read(given(tmp_path / "b.json", {"PPO": indexed}))
    # What is said of all texts of an object stays with each.
    record = {"occupation": "nurse", "samples": ["The nurse was x.", "The nurse was y."], "tags": ["a", "b", "c"]}
    assert pairs(read(given(tmp_path / "c.json", [record]))) == [("nurse", t) for t in record["samples"]]


def test_a_name_without_rows_is_told(tmp_path: Path) -> None:
    for nothing in ([], {}):
        found = read(given(tmp_path / "a.json", {"PPO": RECORDS, "Base": nothing}))
        assert pairs(found) == PAIRS and told(found) == {"names without rows": 1}
        assert found[2][0].message == "no rows stand under 'Base'"
