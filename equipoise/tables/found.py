"""What was found about a file while it was read: which columns are what, and what is odd in it."""

from dataclasses import dataclass
from typing import Literal

from equipoise.protocol.plural import plural


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

    def told(self, rows: int, methods: bool = True, options: bool = True) -> str:
        """What was taken for what, and how to overrule it. `methods`: whether they matter; `options`: whether there are
        some to overrule it with."""
        how = "as an option says" if self.how == "given" else "detected"
        parts = [f"{plural(rows, 'row')}, texts in {self.text!r} read as {self.form} ({how})"]
        parts.append(
            "occupations read from the texts" if self.occupation is None else f"occupations in {self.occupation!r}"
        )
        if methods and self.method is not None:
            parts.append(f"methods in {self.method!r}")
        names = ["--text-column", "--occupation-column", *(["--method-column"] if methods else []), "--form"]
        return ", ".join(parts) + (f"; {', '.join(names[:-1])} and {names[-1]} decide otherwise" if options else "")
