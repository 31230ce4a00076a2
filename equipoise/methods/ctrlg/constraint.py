"""What is demanded of a sentence, as one value that the automaton is built from."""

from collections.abc import Sequence
from dataclasses import dataclass

from equipoise.methods.ctrlg.config import CtrlGConfig


@dataclass(frozen=True)
class Constraint:
    """Terms of every class, and in the strict shape one complete sentence of so many words.

    classes: for each class its terms as the lexicon spells them, lower case; one that ends in "*" is a stem. min_words
    and max_words count the prefix, and like the abbreviations they say nothing unless `strict`. abbreviations: what a
    full stop may follow without ending a sentence, besides single capitals.
    """

    classes: tuple[tuple[str, ...], ...]
    strict: bool
    min_words: int
    max_words: int
    abbreviations: tuple[str, ...]
