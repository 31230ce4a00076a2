"""Texts as the matcher reads them: one kind of hyphen and space, no difference of case, in every script.

A *unit* is a character with the marks that belong to it (an accent, a vowel sign, the jamo of a Korean syllable),
however the text encodes them. Matches begin and end between units, so a term never matches a letter without its accent.
Two units are the same if their keys are: Unicode's default case folding, in which ß, ẞ, ss and SS are alike, between
two normalisations, so that composed and decomposed letters are alike too.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

# Dashes (en, em, minus) are not hyphens and stay. The invisible characters change no reading, so no match either.
_HYPHENS = "\u2010\u2011\ufe63\uff0d"  # hyphen, non-breaking hyphen, small and full-width hyphen-minus
_SPACES = "\u00a0\u2007\u202f"  # no-break, figure and narrow no-break space
_INVISIBLE = "\u00ad\u2060\ufeff"  # soft hyphen, word joiner, zero-width no-break space
_NORMAL = str.maketrans(dict.fromkeys(_HYPHENS, "-") | dict.fromkeys(_SPACES, " ") | dict.fromkeys(_INVISIBLE, ""))

APOSTROPHES = "'\u2019"


def normalise(text: str) -> str:
    """`text` with every Unicode hyphen as "-", every non-breaking space as " ", soft hyphens and the like removed, in
    Unicode's normalisation form C."""
    return text if text.isascii() else unicodedata.normalize("NFC", text.translate(_NORMAL))


def is_mark(character: str) -> bool:
    """Whether a character belongs to the one before it: combining marks, and the inner jamo of a Korean syllable."""
    if character.isascii():
        return False
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff"


def is_word(character: str) -> bool:
    r"""Whether a character begins a unit that words are made of: what `\w` matches, so a letter, a digit or "_"."""
    return character.isalnum() or character == "_"


class Folded(NamedTuple):
    """A text as the matcher reads it. `keys` and `shape` are equally long."""

    keys: str
    """The keys of all units, one after the other."""
    shape: str
    r"""Matches `\w` where a unit of a word stands, and holds hyphens and apostrophes where they stand."""
    starts: dict[int, int] | None
    """For each position of `keys` at which a unit begins, where that unit begins in the text as given; None where every
    position is the same in both."""
    ends: dict[int, int] | None
    """The same for the ends of units."""

    def given(self, start: int, end: int) -> tuple[int, int]:
        """Where a match from `start` to `end`, both between units, lies in the text as given."""
        if self.starts is None or self.ends is None:
            return start, end
        return self.starts[start], self.ends[end]


def fold(text: str) -> Folded:
    """Equal texts, case and encoding aside, have equal `keys`."""
    if text.isascii():
        lower = text.lower()
        return Folded(lower, lower, None, None)
    normal = text.translate(_NORMAL)
    if len(normal) == len(text) and all(map(_is_simple, set(normal))):
        keys = normal.casefold()
        return Folded(keys, keys, None, None)
    return _fold_unit_by_unit(text)


def fold_term(term: str) -> str:
    """The keys of a term's units."""
    return fold(term).keys


@lru_cache(maxsize=4096)
def _is_simple(character: str) -> bool:
    """Whether a character is a unit whose key is one character, the folded character itself."""
    return not is_mark(character) and len(character.casefold()) == 1 and _key(character) == character.casefold()


@lru_cache(maxsize=4096)
def _key(unit: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", unit).casefold())


def _fold_unit_by_unit(text: str) -> Folded:
    """`fold` by its definition."""
    places = [place for place, character in enumerate(text) if character not in _INVISIBLE]
    normal = text.translate(_NORMAL)
    firsts = [i for i, character in enumerate(normal) if i == 0 or not is_mark(character)]
    keys: list[str] = []
    shape: list[str] = []
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    position = 0
    for first, following in pairwise([*firsts, len(normal)]):
        unit = normal[first:following]
        key = _key(unit)
        keys.append(key)
        if is_word(unit[0]):
            shape.append("w" * len(key))
        else:
            shape.append(key if key == "-" or key in APOSTROPHES else " " * len(key))
        starts[position] = places[first]
        position += len(key)
        ends[position] = places[following - 1] + 1
    return Folded("".join(keys), "".join(shape), starts, ends)


_WORD = re.compile(r"\w+")
_TAIL = re.compile(rf"(?:\w|[{APOSTROPHES}-](?=\w))*")


def words_of(folded: Folded) -> list[tuple[int, int]]:
    """Start and end of each word, that is, of the longest runs of letters, digits and "_"; positions in `keys`."""
    return [word.span() for word in _WORD.finditer(folded.shape)]


def end_of_stem(folded: Folded, position: int) -> int:
    """Where the word goes on to whose stem ends at `position`: letters, digits, apostrophes and hyphens inside."""
    tail = _TAIL.match(folded.shape, position)
    assert tail is not None  # it matches nothing, too
    return tail.end()
