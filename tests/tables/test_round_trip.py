"""A random table, written in any layout that is read, reads back as the same rows."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from equipoise.protocol.prompts import clean
from equipoise.protocol.task import PROTOCOL, Task
from equipoise.tables.layout import Columns, arrange
from equipoise.tables.read import read_table
from tests.tasks import foreign_task

Rows = list[tuple[str, str]]

# Everything that a layout might trip over: quotation marks, delimiters, line breaks, backslashes, other scripts.
pieces = st.sampled_from(
    ['"', '""', "'", ",", ";", "\t", "|", "\n", "\r\n", "\\", '\\"', "{", "[", "bold", "caring", "Nurse", "The ", " ",
     ".", "é", "日本", "🙂", "“", "”", "\u2028", "sep=;", "Text", "0"]
)  # fmt: skip
tails = st.lists(st.one_of(pieces, st.characters(exclude_categories=["Cs"], exclude_characters="\x00\r")), max_size=9)


def rows_of(task: Task) -> st.SearchStrategy[Rows]:
    row = st.tuples(st.sampled_from(task.names[:3]), tails)
    return st.lists(row, min_size=1, max_size=5).map(
        lambda rows: [(o, f"{task.prefix(o)} {''.join(tail)}.") for o, tail in rows]
    )


def separated(delimiter: str = ",", **how: object) -> Callable[[Rows], str]:
    def write(rows: Rows) -> str:
        out = io.StringIO(newline="")
        csv.writer(out, delimiter=delimiter, **how).writerows([("Occupation", "Text"), *rows])  # type: ignore[arg-type]
        return out.getvalue()

    return write


def frame(rows: Rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["Occupation", "Text"])


def pandas(orient: str) -> Callable[[Rows], str]:
    return lambda rows: str(frame(rows).to_json(orient=orient))  # type: ignore[call-overload]


def lines(of: Callable[[str, str], object]) -> Callable[[Rows], str]:
    return lambda rows: "".join(json.dumps(of(o, t), ensure_ascii=False) + "\n" for o, t in rows)


def chat(occupation: str, text: str) -> object:
    turns = [("system", ""), ("user", f"About the {occupation}."), ("assistant", text)]
    return {"occupation": occupation, "messages": [{"role": role, "content": said} for role, said in turns]}


def batch(occupation: str, text: str) -> object:
    body = {"model": "m", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
    return {"custom_id": occupation, "response": {"status_code": 200, "body": body}}


LAYOUTS: dict[str, Callable[[Rows], str]] = {
    "csv": separated(),
    "csv, all quoted": separated(quoting=csv.QUOTE_ALL),
    "csv, escaped": separated(doublequote=False, escapechar="\\", quoting=csv.QUOTE_ALL),
    "csv, unix": separated(lineterminator="\n"),
    "tsv": separated("\t"),
    "semicolons": separated(";"),
    "bars": separated("|"),
    "spreadsheet": lambda rows: "sep=;\r\n" + separated(";")(rows),
    "pandas csv": lambda rows: str(frame(rows).to_csv()),
    "json": lambda rows: json.dumps([{"Occupation": o, "Text": t} for o, t in rows]),
    **{f"pandas {orient}": pandas(orient) for orient in ("records", "columns", "index", "split", "table")},
    "json lines": lines(lambda o, t: {"Occupation": o, "Text": t}),
    "nested": lines(lambda o, t: {"meta": {"occupation": o}, "output": {"text": t}}),
    "chat": lines(chat),
    "batch": lines(batch),
}


def read(path: Path, task: Task) -> tuple[Rows, Rows]:
    rows, _, _ = arrange(read_table(str(path)), 0, task, columns=Columns(), form="auto", method=None, seed="")
    return [(row.occupation, row.text) for row in rows], [(row.occupation, row.measured) for row in rows]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("task", [PROTOCOL, foreign_task()], ids=["default", "foreign"])
def test_any_table_reads_back_as_it_was(name: str, task: Task, tmp_path: Path) -> None:
    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(rows_of(task), st.booleans())
    @example([(task.names[0], f"{task.prefix(task.names[0])} \n',The .")], False)  # has a line with two fields
    def check(rows: Rows, packed: bool) -> None:
        if name == "csv, escaped":  # without a single quotation mark nothing tells that backslashes are written twice
            rows = [(o, f'{t} "So."') for o, t in rows]
        data = LAYOUTS[name](rows).encode("utf-8", "surrogatepass")
        path = tmp_path / "a.any"
        path.write_bytes(gzip.compress(data, 1) if packed else data)
        texts, measured = read(path, task)
        assert texts == rows and measured == [(o, clean(t)) for o, t in rows]

    check()


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=rows_of(PROTOCOL))
def test_sentences_a_line_read_back_as_they_were(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = [(o, " ".join(t.split())) for o, t in rows]
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_text("\n".join(t for _, t in rows) + "\n", encoding="utf-8", newline="")
    assert read(path, PROTOCOL)[0] == rows
