"""What was found about a file while it was read: which columns are what, and what is odd in it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """Something about an input file that a reader of the results should know. Nothing was dropped for it."""

    kind: str
    """`empty text`, `mixed forms`, `two methods' rows are the same text`, …"""
    count: int
    """Rows concerned."""
    lines: tuple[int, ...]
    """The first few of them, counted from 1 without a header."""
    message: str


@dataclass(frozen=True)
class Layout:
    """Which columns were read as what; None for a column that the file lacks."""

    text: str
    occupation: str | None
    """None: the occupation was read from the beginning of the text."""
    method: str | None
    model: str | None
    seed: str | None
    run_id: str | None
    form: Literal["sentence", "continuation", "mixed"]
    """Whether texts begin with the task's frame (`The {occupation} was`) or only continue it; `mixed`: each row by
    itself."""
    how: Literal["detected", "given"]
    """Whether `form` was seen in the texts or set by an option."""
