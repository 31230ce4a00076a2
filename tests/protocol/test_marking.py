"""Terms look the same wherever they are shown: on a terminal, in plain text, and in reports."""

import re
from pathlib import Path

import pytest

from equipoise.evaluation import page
from equipoise.protocol.lexicon import MOST_CLASSES, Piece
from equipoise.protocol.marking import LOOKS, MARKS, in_colour, in_marks, legend, pieces
from equipoise.protocol.task import PROTOCOL

STYLES = (Path(page.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
TEXT = "The nurse was bold, caring\x1b[2J and Loyal."


def test_the_same_pieces_are_coloured_and_put_in_brackets() -> None:
    cut = pieces(TEXT, PROTOCOL.lexicon)
    assert [piece for piece in cut if piece.kind >= 0] == [Piece("bold", 0), Piece("caring", 1), Piece("Loyal", 1)]
    assert in_marks(cut) == "The nurse was [bold], {caring}\\x1b[2J and {Loyal}."
    blue, orange, end = "\x1b[1;38;5;33m", "\x1b[4;38;5;208m", "\x1b[0m"
    assert in_colour(cut) == f"The nurse was {blue}bold{end}, {orange}caring{end}\\x1b[2J and {orange}Loyal{end}."
    assert in_marks(legend(["one", "two", "three", "four"])) == "[one] {two} <three> (four)"


@pytest.mark.parametrize("kind", range(MOST_CLASSES))
def test_a_class_looks_alike_on_the_terminal_and_in_the_report(kind: int) -> None:
    (rule,) = re.findall(rf"mark\.term-{kind} {{ (.*) }}", STYLES)
    look, words = LOOKS[kind], page.LOOKS[kind]
    assert ("font-weight: 700" in rule) == look.bold == ("bold" in words) == ("bold" in look.style)
    assert ("font-style: italic" in rule) == look.italic == ("italic" in words) == ("italic" in look.style)
    assert ("underline" in rule) == look.underline == ("underline" in look.style)
    assert look.underline == ("underlined" in words or "dotted" in words)
    assert len(LOOKS) == len(MARKS) == len(page.LOOKS) == MOST_CLASSES
    assert look.codes.endswith(f"38;5;{look.colour}") and f"color({look.colour})" in look.style
