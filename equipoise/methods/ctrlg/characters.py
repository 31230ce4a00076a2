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

from equipoise.protocol import folding

COUNT = 0x110000
"""Code points."""
NEVER = 0
"""The class of the characters that are never written."""
_LINE_BREAKS = frozenset("\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029")


class Read(NamedTuple):
    """What the matcher reads in a character's place.

    keys: folded characters, each with whether it is a mark; "" stands for any that no term contains. Empty for what the
    matcher leaves out. late: a key that comes after the accents that follow; a Greek letter's subscript iota is one.
    word: whether they are letters, digits or underscores. mark: whether the character belongs to the one before it,
    and is of a word if that is; it is no white space and ends nothing. moves: whether it is an accent that can come
    before a late key.
    """

    keys: tuple[tuple[str, bool], ...]
    late: str | None
    word: bool
    mark: bool
    moves: bool


class Character(NamedTuple):
    """All that a constraint may ask of a character.

    read: what the matcher reads in its place. raw: the character itself if the sentence rule names it, else "". The
    rest is what Python says of it.
    """

    read: "Read"
    raw: str
    word: bool
    alnum: bool
    upper: bool
    space: bool
    line_break: bool


class _Tables(NamedTuple):
    plain_N: NDArray[np.int64]
    """What there is to say of most characters, as a number below PLAIN."""
    never_N: NDArray[np.bool_]
    special: tuple[str, ...]
    """White space, and all that the matcher reads as another character or as several or not at all."""


_PLAIN = 16  # word, capital, mark, accent that moves: four bits


@lru_cache(maxsize=1)
def _tables() -> _Tables:
    everything = "".join(map(chr, range(COUNT)))
    plain_N = np.zeros(COUNT, dtype=np.int64)
    for run in re.finditer(r"\w+", everything):
        plain_N[run.start() : run.end()] += 1
    plain_N[[i for i, c in enumerate(everything) if c.isupper()]] += 2
    marks = [i for i, c in enumerate(everything) if c.isprintable() and folding.is_mark(c)]
    plain_N[marks] += 4
    plain_N[[i for i in marks if unicodedata.combining(everything[i])]] += 8
    # A part that normalising leaves as it is has no character that normalising would change.
    parts = (everything[i : i + 64] for i in range(0, COUNT, 64))
    changed = {c for part in parts if folding.normalise(part) != part for c in part if folding.normalise(c) != c}
    special = [c for c in everything if c.isspace() or c.casefold() != c or c in changed]
    return _Tables(plain_N, _never(everything), tuple(special))


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


def describe(character: str, letters: frozenset[str], named: frozenset[str]) -> Character:
    """A character for terms that are spelt with `letters`, folded, and a sentence rule that names some."""
    keys = folding.fold(character).keys
    mark = folding.is_mark(character)
    late = keys[-1] if "\u0345" in unicodedata.normalize("NFD", character) else None

    def known(key: str) -> str:
        return key if key in letters else ""

    return Character(
        Read(
            keys=tuple((known(key), folding.is_mark(key)) for key in (keys[:-1] if late else keys)),
            late=known(late) if late else None,
            word=folding.is_word(character),
            mark=mark,
            moves=mark and unicodedata.combining(character) > 0,
        ),
        raw=character if character in named else "",
        word=folding.is_word(character),
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
    explicit = [c for c in (*map(chr, range(128)), *tables.special, *letters, *named) if may_be_written(c)]
    plain_N = tables.plain_N.copy()
    plain_N[[ord(character) for character in explicit]] = _PLAIN
    plain_N[tables.never_N] = _PLAIN
    number: dict[Character, int] = {}
    kind_of = np.full(_PLAIN + 1, NEVER, dtype=np.uint16)
    kinds, examples = np.unique(plain_N, return_index=True)
    for kind, example in zip(kinds.tolist(), examples.tolist(), strict=True):
        if kind != _PLAIN:
            kind_of[kind] = number.setdefault(describe(chr(example), letters, named), len(number) + 1)
    kind_N = kind_of[plain_N]
    for character in explicit:
        kind_N[ord(character)] = number.setdefault(describe(character, letters, named), len(number) + 1)
    characters = list(number)
    return kind_N, [characters[0], *characters]
