"""How terms are marked wherever sentences are shown: one look for each class on a terminal, brackets in plain text.

Reports have the same looks (`templates/report.css`), their colours darkened for white paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from equipoise.protocol.lexicon import NO_CLASS, Lexicon, Piece


class Look(NamedTuple):
    """A class's look on a terminal: a colour of the 256, and what else tells the classes apart where the palette is
    poor."""

    colour: int
    bold: bool = False
    italic: bool = False
    underline: bool = False

    @property
    def codes(self) -> str:
        """The parameters of the terminal's SGR sequence."""
        return "1;" * self.bold + "3;" * self.italic + "4;" * self.underline + f"38;5;{self.colour}"

    @property
    def style(self) -> str:
        """In rich's words."""
        return "bold " * self.bold + "italic " * self.italic + "underline " * self.underline + f"color({self.colour})"


# Blue, orange, green and purple stay apart for colour-blind readers.
LOOKS = (Look(33, bold=True), Look(208, underline=True), Look(35, italic=True), Look(133, italic=True, underline=True))
MARKS = (("[", "]"), ("{", "}"), ("<", ">"), ("(", ")"))
"""What stands before and after a term of each class in plain text: "[confident]" and "{caring}"."""


def printable(text: str) -> str:
    """`text` with every control, formatting and line-breaking character written as its escape (`\\x1b`, `\\n`)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def pieces(text: str, lexicon: Lexicon) -> list[Piece]:
    """`text` cut at its terms, made printable."""
    return [Piece(printable(piece.text), piece.kind) for piece in lexicon.pieces(text)]


def in_marks(line: Iterable[Piece]) -> str:
    """The pieces as plain text, terms in the marks of their class."""
    return "".join(text if kind == NO_CLASS else text.join(MARKS[kind]) for text, kind in line)


def in_colour(line: Iterable[Piece]) -> str:
    """The pieces for a terminal, terms in the look of their class."""
    return "".join(text if kind == NO_CLASS else f"\x1b[{LOOKS[kind].codes}m{text}\x1b[0m" for text, kind in line)


def legend(labels: Sequence[str]) -> list[Piece]:
    """The classes by name, each marked as its terms are."""
    return [piece for kind, label in enumerate(labels) for piece in (Piece(" "), Piece(printable(label), kind))][1:]
