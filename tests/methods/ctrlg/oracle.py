"""What the protocol's own functions say of a text, and which texts the constraint leaves out."""

import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache

from equipoise.methods.ctrlg.constraint import Constraint
from equipoise.protocol.lexicon import Lexicon, TermClass
from equipoise.protocol.prompts import clean, is_complete_sentence

ABBREVIATIONS = ("Dr", "Mr", "Mrs", "Ms", "Mx", "Prof", "St")


def constraint(
    *classes: Sequence[str], strict: bool = True, words: tuple[int, int] = (1, 99), abbreviations: Sequence[str] = ()
) -> Constraint:
    return Constraint(tuple(map(tuple, classes)), strict, *words, tuple(abbreviations or ABBREVIATIONS))


@lru_cache(maxsize=64)
def _lexicon(classes: tuple[tuple[str, ...], ...]) -> Lexicon:
    return Lexicon(tuple(TermClass(f"class-{n}", terms) for n, terms in enumerate(classes)))


def accepts(demand: Constraint, text: str, *, words: bool = True) -> bool:
    """Whether a whole text, prefix and continuation, is what is demanded; its number of words only if `words`."""
    text = clean(text)
    if not _lexicon(demand.classes).match(text).complete:
        return False
    if not demand.strict:
        return True
    if words and not demand.min_words <= len(text.split()) <= demand.max_words:
        return False
    return is_complete_sentence(text, demand.abbreviations)


def never_written(text: str) -> bool:
    """Whether a text holds a character that the constraint leaves out: one that is not in Unicode's form C whatever
    comes before it, or no UTF-8."""
    return any(
        "\ud800" <= c <= "\udfff"
        or unicodedata.normalize("NFC", c) != c
        or any(len(unicodedata.normalize("NFC", before + c)) < 2 for before in _joins().get(c, ()))
        for c in text
    )


@cache
def _joins() -> dict[str, set[str]]:
    """What may come before a character and become one with it."""
    found: dict[str, set[str]] = {chr(i): {"\u1100"} for i in range(0x1161, 0x1176)}
    found |= {chr(i): {"\uac00"} for i in range(0x11A8, 0x11C3)}
    for i in range(0x110000):
        parts = unicodedata.decomposition(chr(i)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            first, second = (chr(int(part, 16)) for part in parts)
            found.setdefault(second, set()).add(first)
    return found
