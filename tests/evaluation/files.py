"""Rows and files for tests of the evaluation, made without its code."""

import csv
from collections.abc import Sequence
from pathlib import Path

from equipoise.evaluation.counted import Fluency, Sample
from equipoise.evaluation.measure import measure
from equipoise.protocol.task import PROTOCOL, Task
from equipoise.tables.layout import Row


def row(text: str, occupation: str = "nurse", method: str = "m", line: int = 1) -> Row:
    return Row(0, line, method, "", "", occupation, str(line), text, text)


def sample(
    texts: Sequence[tuple[str, str]],
    task: Task = PROTOCOL,
    judges: dict[str, Fluency] | None = None,
    seed: int = 0,
    draws: int = 200,
) -> Sample:
    """A method's sample from (occupation, text) pairs."""
    rows = [row(text, occupation, line=i) for i, (occupation, text) in enumerate(texts, 1)]
    return Sample(measure(rows, task), task, judges or {}, {}, draws, seed, "m")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]], delimiter: str = ",") -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(rows)
    return str(path)
