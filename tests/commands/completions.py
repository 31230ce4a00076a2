"""Files of sentences, and the command that measures them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from equipoise.cli import main
from tests.default import AGENTIC, COMMUNAL, OCCUPATIONS
from tests.evaluation.files import write_csv

COLUMNS = ["Model", "Occupation", "RunID", "Text", "WordCount", "Label"]


def completions(path: Path, label: str, compliant: int, n: int = 10) -> str:
    """Of n sentences for each occupation the first `compliant` are strict successes."""
    rows = []
    for o, occupation in enumerate(OCCUPATIONS):
        for i in range(1, n + 1):
            k = o * n + i
            terms = f"{AGENTIC[k % 10]} and {COMMUNAL[k // 3 % 10]}" if i <= compliant + o % 2 else "calm and quick"
            text = f"The {occupation} was {terms} at work with number {k} ."
            rows.append(["tiny", occupation, i, text, len(text.split()), label])
    return write_csv(path, COLUMNS, rows)


def run(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def numbers(document: Any) -> Iterator[float]:
    if isinstance(document, dict):
        for value in document.values():
            yield from numbers(value)
    elif isinstance(document, list):
        for value in document:
            yield from numbers(value)
    elif isinstance(document, float):
        yield document
