"""All of Unicode, in the few classes that a constraint tells apart.

What counts as a letter, a capital, white space or a line break is what Python says, for the protocol's matcher and its
sentence rule are written in it.

Some characters are never written: those that Unicode's normalisation form C would change or may join with the character
before (those without NFC_Quick_Check=Yes, 1,231 of them: above all combining accents that exist as part of a letter,
and the parts of Hangul syllables), and surrogates. Text without them needs no normalising before it is matched.
"""

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from equipoise.protocol.lexicon import normalise

COUNT = 0x110000
"""Code points."""
NEVER = 0
"""The class of the characters that are never written."""
_LINE_BREAKS = frozenset("\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029")


class Character(NamedTuple):
    """All that a constraint may ask of a character.

    folded: what the matcher reads in its place, each with whether it is a letter, digit or underscore; "" stands for
    any character that no term contains. raw: the character itself if the sentence rule names it, else "".
    """

    folded: tuple[tuple[str, bool], ...]
    raw: str
    word: bool
    alnum: bool
    upper: bool
    space: bool
    line_break: bool


class _Tables(NamedTuple):
    word_N: NDArray[np.bool_]
    upper_N: NDArray[np.bool_]
    never_N: NDArray[np.bool_]
    special: tuple[str, ...]
    """White space, and all that the matcher reads as another character or as several or not at all."""


@lru_cache(maxsize=1)
def _tables() -> _Tables:
    everything = "".join(map(chr, range(COUNT)))
    word_N = np.zeros(COUNT, dtype=bool)
    for run in re.finditer(r"\w+", everything):
        word_N[run.start() : run.end()] = True
    upper_N = np.zeros(COUNT, dtype=bool)
    upper_N[[i for i, c in enumerate(everything) if c.isupper()]] = True
    special = [c for c in everything if c.isspace() or fold(c) != c]
    return _Tables(word_N, upper_N, _never(everything), tuple(special))


def _never(everything: str) -> NDArray[np.bool_]:
    never_N = np.zeros(COUNT, dtype=bool)
    never_N[0xD800:0xE000] = True
    # The parts of a Hangul syllable but the first: vowels and final consonants.
    never_N[0x1161:0x1176] = never_N[0x11A8:0x11C3] = True
    for i, character in enumerate(everything):
        parts = unicodedata.decomposition(character).split()
        if not parts or parts[0].startswith("<"):
            continue  # none, or one of compatibility, which form C leaves alone
        never_N[i] |= unicodedata.normalize("NFC", character) != character
        pair = "".join(chr(int(part, 16)) for part in parts)
        if len(pair) == 2 and unicodedata.normalize("NFC", pair) == character:
            never_N[ord(pair[1])] = True
    return never_N


def fold(text: str) -> str:
    """What the matcher reads of a text that is in form C."""
    return normalise(text).casefold()


def is_word(character: str) -> bool:
    r"""Whether it is a `\w` of Python's `re`."""
    return character.isalnum() or character == "_"


def describe(character: str, letters: frozenset[str], named: frozenset[str]) -> Character:
    """A character for terms that are spelt with `letters`, folded, and a sentence rule that names some."""
    return Character(
        folded=tuple((c if c in letters else "", is_word(c)) for c in fold(character)),
        raw=character if character in named else "",
        word=is_word(character),
        alnum=character.isalnum(),
        upper=character.isupper(),
        space=character.isspace(),
        line_break=character in _LINE_BREAKS,
    )


def may_be_written(text: str) -> bool:
    """Whether no character of `text` is one of those that are never written."""
    never_N = _tables().never_N
    return not any(never_N[ord(character)] for character in text)


def classify(letters: Iterable[str], named: Iterable[str]) -> tuple[NDArray[np.uint16], list[Character]]:
    """(COUNT,) class of each code point, and what each class is; class NEVER is a dummy."""
    letters, named = frozenset(letters), frozenset(named)
    tables = _tables()
    usual = [describe(c, letters, named) for c in _examples(tables, letters | named)]
    number = {character: NEVER + 1 + i for i, character in enumerate(dict.fromkeys(usual))}
    # Letters and digits that are no capitals, capitals, symbols, and capitals among the symbols ("Ⓐ").
    plain_4 = np.array([number[c] for c in usual], dtype=np.uint16)
    kind_N = plain_4[2 * tables.word_N + tables.upper_N]
    for character in {*map(chr, range(128)), *tables.special, *letters, *named}:
        found = describe(character, letters, named)
        kind_N[ord(character)] = number.setdefault(found, NEVER + 1 + len(number))
    kind_N[tables.never_N] = NEVER
    characters = list(number)
    return kind_N, [characters[0], *characters]


def _examples(tables: _Tables, mentioned: frozenset[str]) -> list[str]:
    """One character of each plain kind: not word, capital or not; word, capital or not."""
    kind_N = 2 * tables.word_N + tables.upper_N
    kind_N[:128] = 9
    kind_N[[ord(c) for c in (*tables.special, *mentioned)]] = 9
    kind_N[tables.never_N] = 9
    return [chr(int(np.argmax(kind_N == kind))) for kind in range(4)]
