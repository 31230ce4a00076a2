"""A small table, files that hold it, and how they are read."""

import json
from pathlib import Path
from typing import Any

from equipoise.protocol.task import PROTOCOL, Task
from equipoise.tables.found import Layout, Problem
from equipoise.tables.layout import Columns, Row, arrange
from equipoise.tables.read import read_table

JOBS = ("nurse", "pilot", "chef")
PAIRS = [
    (job, f"The {job} was confident and caring with every one of the {i} people.") for i in range(4) for job in JOBS
]
RECORDS = [{"Occupation": job, "Text": text} for job, text in PAIRS]

Read = tuple[list[Row], Layout, list[Problem]]


def read(path: Path, task: Task = PROTOCOL, form: Any = "auto", method: str | None = None, **columns: Any) -> Read:
    named = Columns(**columns)
    table = read_table(str(path), None, named.given)
    return arrange(table, 0, task, columns=named, form=form, method=method, seed="")


def given(path: Path, content: str | bytes | object) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return path


def pairs(found: Read) -> list[tuple[str, str]]:
    return [(row.occupation, row.measured) for row in found[0]]


def told(found: Read) -> dict[str, int]:
    return {problem.kind: problem.count for problem in found[2]}


def table(delimiter: str = ",") -> list[str]:
    return [f"Occupation{delimiter}Text", *(f"{o}{delimiter}{t}" for o, t in PAIRS)]
