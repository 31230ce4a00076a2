"""JSON of common tools, packed files, workbooks: the right rows, or a refusal that says how to convert them."""

import bz2
import gzip
import io
import json
import lzma
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipoise.errors import UserError
from equipoise.tables import unpack
from tests.tables.made import JOBS, PAIRS, RECORDS, given, pairs, read, table, told

LAYOUTS: dict[str, object] = {
    "by occupation": {job: [t for o, t in PAIRS if o == job] for job in JOBS},
    "one text by occupation": {job: text for job, text in PAIRS[:3]},
    "objects by occupation": {job: [{"text": t} for o, t in PAIRS if o == job] for job in JOBS},
    "by method and occupation": {"m": {job: [t for o, t in PAIRS if o == job] for job in JOBS}},
    "index": {str(i): row for i, row in enumerate(RECORDS)},
    "index out of order, columns": {
        "Text": {str(i): t for i, (_, t) in enumerate(PAIRS)},
        "Occupation": {str(i): PAIRS[i][0] for i in reversed(range(12))},
    },
    "values with a header": [["Occupation", "Text"], *map(list, PAIRS)],
    "nested": [{"meta": {"occupation": o, "seed": 1}, "output": {"text": t}} for o, t in PAIRS],
    "under another name": {"model": "m", "predictions": [{"job": o, "sentence": t} for o, t in PAIRS]},
    "messages": [
        {"occupation": o, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": t}]}
        for o, t in PAIRS
    ],
    "sharegpt": [
        {"job": o, "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": t}]} for o, t in PAIRS
    ],
    "openai batch": [
        {
            "custom_id": f"{o}-0",
            "response": {"body": {"choices": [{"index": 0, "message": {"role": "assistant", "content": t}}]}},
        }
        for o, t in PAIRS
    ],
    "openai responses": [
        {
            "job": o,
            "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": t}]}],
        }
        for o, t in PAIRS
    ],
    "anthropic batch": [
        {"custom_id": o, "result": {"message": {"role": "assistant", "content": [{"type": "text", "text": t}]}}}
        for o, t in PAIRS
    ],
    "gemini": [{"job": o, "candidates": [{"content": {"parts": [{"text": t}], "role": "model"}}]} for o, t in PAIRS],
    "lm-eval": [{"doc": {"occupation": o}, "resps": [[t]]} for o, t in PAIRS],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("lines", [False, True])
def test_json_of_common_tools_gives_the_rows(tmp_path: Path, name: str, lines: bool) -> None:
    document = LAYOUTS[name]
    if lines and isinstance(document, list):
        path = given(tmp_path / "a.jsonl", "\n".join(map(json.dumps, document)))
    else:
        path = given(tmp_path / "a.json", document)
    found = pairs(read(path))
    assert sorted(found) == sorted(PAIRS[:3] if name == "one text by occupation" else PAIRS)


def test_an_object_with_several_texts_is_as_many_rows_and_counted(tmp_path: Path) -> None:
    texts = ["The nurse was bold.", "The nurse was kind.", "The nurse was calm."]
    for held in (
        {"outputs": [{"text": text} for text in texts]},
        {"completions": texts},
        {"choices": [{"message": {"role": "assistant", "content": text}} for text in texts]},
    ):
        found = read(given(tmp_path / "a.jsonl", "\n".join([json.dumps({"job": "nurse"} | held)] * 2)))
        assert [text for _, text in pairs(found)] == texts * 2
        assert told(found) == {"several texts": 2}
    mixed = [{"job": "nurse", "text": "The nurse was x."}, {"job": "nurse", "output": "The nurse was y."}]
    with pytest.raises(UserError, match=r"texts in 'text', and on 1 rows without one in 'output' \(row 2\)"):
        read(given(tmp_path / "c.json", mixed))
    with pytest.raises(UserError, match="line 1: an object holds 2 under 'outputs' and 3 under 'completions'"):
        read(given(tmp_path / "b.jsonl", json.dumps({"outputs": texts[:2], "completions": texts}) + '\n{"text": "x"}'))


def test_a_failed_request_of_a_batch_stays_a_row(tmp_path: Path) -> None:
    batch = LAYOUTS["openai batch"]
    assert isinstance(batch, list)
    lines = [*map(json.dumps, batch), json.dumps({"custom_id": "x", "response": None, "error": {"code": "limit"}})]
    found = read(given(tmp_path / "a.jsonl", "\n".join(lines)))
    assert len(found[0]) == 13 and found[0][-1].measured == "" and told(found)["empty text"] == 1


def test_a_path_names_a_column(tmp_path: Path) -> None:
    path = given(tmp_path / "a.json", [{"a": {"wer": o}, "b": {"satz": t}} for o, t in PAIRS])
    with pytest.raises(UserError, match=r"no column of texts among 'a\.wer', 'b\.satz': name it with --text-column"):
        read(path)
    assert pairs(read(path, text="b.satz", occupation="a.wer")) == pairs(read(path, text="satz")) == PAIRS
    columns = given(tmp_path / "b.json", {"wer": [o for o, _ in PAIRS], "satz": [t for _, t in PAIRS]})
    assert pairs(read(columns, text="satz", occupation="wer")) == PAIRS


def test_damaged_json_lines_are_refused_with_the_line(tmp_path: Path) -> None:
    lines = [*map(json.dumps, RECORDS[:3]), '{"Occupation": "nurse", "Te']
    with pytest.raises(UserError, match=r"a\.jsonl is neither JSON nor JSON lines \(line 4: "):
        read(given(tmp_path / "a.jsonl", "\n".join(lines)))
    with pytest.raises(UserError, match=r"no list of objects \(line 2\)"):
        read(given(tmp_path / "b.jsonl", "\n".join([lines[0], "[1]", lines[1]])))
    deep = "[" * 100_000
    with pytest.raises(UserError, match="too deep"):
        read(given(tmp_path / "c.json", deep))
    with pytest.raises(UserError, match="is one chat, not a table"):
        read(given(tmp_path / "d.json", [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]))


ZIPPED: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "gz in gz": lambda data: gzip.compress(gzip.compress(data)),
}


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize("name", [*ZIPPED, "zip"])
def test_packed_files_are_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = "\n".join(table()).encode()
    packed = zipped({"a.csv": data, "__MACOSX/._a.csv": b"x"}) if name == "zip" else ZIPPED[name](data)
    assert pairs(read(given(tmp_path / "a.csv.gz", packed))) == PAIRS
    with pytest.raises(UserError, match="cannot be unpacked"):
        read(given(tmp_path / "b.csv.gz", packed[: len(packed) // 2]))
    monkeypatch.setattr(unpack, "MOST", 100)
    with pytest.raises(UserError, match="unpacks to more than"):
        read(tmp_path / "a.csv.gz")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (zipped({"a.csv": b"x", "b.csv": b"y"}), r"holds 2 files \('a.csv', 'b.csv'\): unpack it"),
        (zipped({"xl/workbook.xml": b"x"}), "Excel workbook: save the sheet as 'CSV UTF-8', or `pip install openpyxl`"),
        (zipped({"content.xml": b"x"}), "OpenDocument"),
        (
            b"PAR1xxxxPAR1",
            r"Parquet file: `pip install pyarrow` .*to_json\('texts.jsonl', orient='records', lines=True\)",
        ),
        (b"\x28\xb5\x2f\xfdxx", "unpack it with `zstd -d`"),
        (b"\xd0\xcf\x11\xe0xx", "old Excel workbook"),
        (b"SQLite format 3\0", "a database"),
    ],
)
def test_what_is_no_text_is_refused_with_the_way_to_convert_it(
    tmp_path: Path, data: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("openpyxl", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=says) as raised:
        read(given(tmp_path / "a.bin", data))
    assert "\n" not in str(raised.value)


def test_a_workbook_and_parquet_are_read_where_their_library_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sheet:
        def __init__(self, title: str, rows: list[tuple[Any, ...]]) -> None:
            self.title, self.rows = title, rows

        def iter_rows(self, values_only: bool) -> list[tuple[Any, ...]]:
            assert values_only
            return self.rows

    sheets = [Sheet("empty", []), Sheet("one", [(None,), ("Occupation", "Text", None), *PAIRS[:2], (None, None)])]
    sheets.append(Sheet("two", [("a",), ("b",)]))
    book = types.SimpleNamespace(worksheets=sheets)
    monkeypatch.setitem(sys.modules, "openpyxl", types.SimpleNamespace(load_workbook=lambda file, **_: book))
    found = read(given(tmp_path / "a.xlsx", zipped({"xl/workbook.xml": b"x"})))
    assert pairs(found) == PAIRS[:2] and told(found) == {"other sheets": 2, "blank rows": 1}
    rows = types.SimpleNamespace(to_pylist=lambda: [{"Occupation": o, "out": {"Text": t}} for o, t in PAIRS])
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(read_table=lambda file: rows))
    assert pairs(read(given(tmp_path / "a.parquet", b"PAR1xPAR1"))) == PAIRS
