"""The rows of a run's own files, as trackers get them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from equipoise.documents import parse_json
from equipoise.ppo.tracking.tracker import Row
from equipoise.runs.files import complete_lines, content


def rows(folder: Path, after: int, to: int) -> list[Row]:
    """What the run in `folder` logged of the steps above `after`, up to `to`, in their order. Raises OSError.

    Numbers that JSON lacks are what they were: nan, inf or -inf.
    """
    values: dict[int, dict[str, float]] = {}
    samples: dict[int, list[dict[str, Any]]] = {}
    for name in ("metrics.jsonl", "eval.jsonl"):
        for row in _within(folder / name, after, to):
            step, nonfinite = row.pop("step"), row.pop("nonfinite", {})
            own = values.setdefault(step, {})
            own |= {key: float(nonfinite[key] if value is None else value) for key, value in row.items()}
    for row in _within(folder / "samples.jsonl", after, to):
        samples.setdefault(row["step"], []).append(row)
    return [Row(step, values.get(step, {}), samples.get(step, ())) for step in sorted(values.keys() | samples.keys())]


def _within(path: Path, after: int, to: int) -> Iterator[dict[str, Any]]:
    for line in complete_lines(content(path)):
        row = parse_json(line)
        if after < row["step"] <= to:
            yield row
