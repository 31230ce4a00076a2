"""The one matcher that reward, filter, constraint and metrics share.

A term is a word, several words, or, with a "*" at its end, a stem: the beginning of a word. `folding` says which
differences between two spellings count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

from equipoise.errors import UserError
from equipoise.protocol.folding import end_of_stem, fold, fold_term, is_mark, normalise, words_of

__all__ = ["NO_CLASS", "Found", "Lexicon", "Match", "Piece", "Span", "TermClass", "TermError", "normalise"]

MOST_CLASSES = 4
NO_CLASS = -1


class Piece(NamedTuple):
    """A stretch of a text; `kind` is the number of its term's class, or NO_CLASS."""

    text: str
    kind: int = NO_CLASS


class TermClass(NamedTuple):
    """A class of terms; a sentence that holds any of them has the class."""

    name: str
    terms: tuple[str, ...]
    """As they are spelt in files. One that ends in "*" is a stem."""


class Span(NamedTuple):
    """One occurrence of a term: `text[start:end]` of the text as given. Of a stem, the whole word."""

    term: str
    start: int
    end: int


class TermError(UserError):
    """A class or term that cannot be. `place` says which: the number of a class, or those of a class and its term."""

    def __init__(self, message: str, *place: int) -> None:
        super().__init__(message)
        self.place = place


class Found:
    """What follows from the terms that were found in a text."""

    terms: tuple[tuple[str, ...], ...]

    @property
    def complete(self) -> bool:
        """Whether every class is present: the constraint."""
        return all(self.terms)

    @property
    def some(self) -> bool:
        """Whether at least one class is present."""
        return any(self.terms)

    @property
    def first(self) -> tuple[str, ...] | None:
        """The first term of each class, a *pair* where there are two; None unless every class is present."""
        return tuple(terms[0] for terms in self.terms) if self.complete else None


@dataclass(frozen=True)
class Match(Found):
    """The terms found in one text."""

    terms: tuple[tuple[str, ...], ...]
    """For each class its terms, each once, in order of first occurrence."""
    counts: dict[str, int]
    """How often each found term occurs."""


class _Entry(NamedTuple):
    """A term made ready to be looked for."""

    term: str
    key: str
    stem: bool


@dataclass(frozen=True)
class Lexicon:
    """Classes of terms and the matcher over them.

    A term is found where its words stand as whole words, whatever their case; white space inside it is one space. A
    stem is found where a word begins with it. A hyphen ends a word: "semi-skilled" holds `skil*`, "unskilled" does not.
    Terms that overlap in a text are all found. Raises TermError (a UserError) for classes that `checked` refuses.
    """

    classes: tuple[TermClass, ...]

    def __post_init__(self) -> None:
        # A frozen dataclass lets only `object.__setattr__` store the checked classes.
        object.__setattr__(self, "classes", checked(self.classes))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.classes)

    @cached_property
    def terms(self) -> tuple[str, ...]:
        """All terms, those of the first class first."""
        return tuple(term for each in self.classes for term in each.terms)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of terms of each class."""
        return tuple(len(each.terms) for each in self.classes)

    @property
    def cells(self) -> int:
        """How many combinations of a term of each class there are."""
        return prod(self.sizes)

    def class_of(self, term: str) -> int:
        """The number of the class that a term belongs to. Raises KeyError for what is no term."""
        return self._class_of[term]

    @cached_property
    def _class_of(self) -> dict[str, int]:
        return {term: number for number, each in enumerate(self.classes) for term in each.terms}

    @cached_property
    def _by_first(self) -> dict[str, list[_Entry]]:
        """The terms by the first character of their keys, the longest first."""
        entries = [_Entry(term, fold_term(term.removesuffix("*")), term.endswith("*")) for term in self.terms]
        entries.sort(key=lambda entry: len(entry.key), reverse=True)
        found: dict[str, list[_Entry]] = {}
        for entry in entries:
            found.setdefault(entry.key[0], []).append(entry)
        return found

    def spans(self, text: str) -> list[Span]:
        """Every occurrence of every term, from left to right and the longest first; they overlap only if terms do."""
        folded = fold(text)
        keys = folded.keys
        words = words_of(folded)
        word_ends = {end for _, end in words}
        found: list[Span] = []
        for start, _ in words:
            here: list[Span] = []
            for term, key, stem in self._by_first.get(keys[start], ()):
                if not keys.startswith(key, start):
                    continue
                end = start + len(key)
                if not stem:
                    if end in word_ends:
                        here.append(Span(term, *folded.given(start, end)))
                elif end == len(keys) or not is_mark(keys[end]):
                    here.append(Span(term, *folded.given(start, end_of_stem(folded, end))))
            found += here if len(here) < 2 else sorted(here, key=lambda span: span.end, reverse=True)
        return found

    def match(self, text: str) -> Match:
        """The terms that `text` holds."""
        counts: dict[str, int] = {}
        for span in self.spans(text):
            counts[span.term] = counts.get(span.term, 0) + 1
        terms: list[list[str]] = [[] for _ in self.classes]
        for term in counts:
            terms[self._class_of[term]].append(term)
        return Match(tuple(map(tuple, terms)), counts)

    def pieces(self, text: str) -> list[Piece]:
        """`text` cut at its terms, from left to right; none is empty. A term inside another is no piece of its own."""
        parts, end = [], 0
        for span in self.spans(text):
            if span.start < end:
                continue  # inside the term before
            parts += [Piece(text[end : span.start]), Piece(text[span.start : span.end], self._class_of[span.term])]
            end = span.end
        return [piece for piece in [*parts, Piece(text[end:])] if piece.text]


def checked(classes: Iterable[TermClass]) -> tuple[TermClass, ...]:
    """The classes with their terms normalised.

    Raises TermError for no class or more than four, a class that is named twice or has no terms, and a term that does
    not begin and end with a letter or digit, holds a "*" elsewhere than at its end, comes twice, or is swallowed by a
    stem of another class.
    """
    classes = tuple(classes)
    if not 1 <= len(classes) <= MOST_CLASSES:
        raise TermError(f"there are {len(classes)} classes of terms; give one to {MOST_CLASSES}")
    names: dict[str, str] = {}
    for number, each in enumerate(classes):
        if other := names.get(each.name.casefold()):
            raise TermError(f"the classes {other!r} and {each.name!r} have one name; rename one", number)
        names[each.name.casefold()] = each.name
    result = tuple(TermClass(each.name, _checked_terms(number, *each)) for number, each in enumerate(classes))
    _check_between(result)
    return result


def spell(term: str) -> str:
    """A term as it stands in files: normalised, and one space where there is white space."""
    return " ".join(normalise(term).split())


def _checked_terms(number: int, name: str, terms: Iterable[str]) -> tuple[str, ...]:
    if isinstance(terms, str):
        raise TermError(f"the {name} terms are one text, {terms!r}; expected a list of terms", number)
    seen: dict[str, str] = {}
    for place, given in enumerate(terms):
        if not isinstance(given, str):
            raise TermError(
                f"the {name} term {given!r} is not a text; expected words such as 'confident'", number, place
            )
        term = spell(given)
        if "*" in term[:-1]:
            raise TermError(f"the {name} term {given!r} has a '*' inside; it can only end a stem", number, place)
        if not _is_wordlike(term.removesuffix("*")):
            raise TermError(
                f"the {name} term {given!r} is no word; a term begins and ends with a letter or digit "
                "('*' may end a stem)", number, place,
            )  # fmt: skip
        if fold_term(term) in seen:
            raise TermError(f"the {name} term {term!r} is listed twice; remove one", number, place)
        seen[fold_term(term)] = term
    if not seen:
        raise TermError(f"the list of {name} terms is empty; it needs at least one term", number)
    return tuple(seen.values())


def _is_wordlike(term: str) -> bool:
    end = term.rstrip("".join(filter(is_mark, set(term))))
    return bool(end) and end[0].isalnum() and end[-1].isalnum()


def swallows(stem: str, term: str) -> bool:
    """Whether the stem is found wherever `term` stands, as the same word: `skil*` swallows "skilled" and `skill*`."""
    if not stem.endswith("*"):
        return False
    beginning, folded = fold_term(stem[:-1]), fold(term.removesuffix("*"))
    end = len(beginning)
    if not folded.keys.startswith(beginning) or is_mark(folded.keys[end : end + 1] or " "):
        return False
    return end_of_stem(folded, end) == len(folded.keys)


def _check_between(classes: Sequence[TermClass]) -> None:
    """Raises TermError for a term that two classes share, be it through a stem."""
    owner: dict[str, str] = {}
    for number, (name, terms) in enumerate(classes):
        for place, term in enumerate(terms):
            if other := owner.get(fold_term(term)):
                raise TermError(
                    f"the term {term!r} is in both lists, {other} and {name}; keep it in one", number, place
                )
        owner |= {fold_term(term): name for term in terms}
    everything = [(n, place, term) for n, (_, terms) in enumerate(classes) for place, term in enumerate(terms)]
    for n, _, stem in everything:
        for m, place, term in everything if stem.endswith("*") else ():
            if m != n and swallows(stem, term):
                raise TermError(
                    f"the {classes[m].name} term {term!r} begins with {stem!r}, a stem of {classes[n].name}, so that "
                    "one word would be of both classes; remove one, or make the stem longer", m, place,
                )  # fmt: skip


def without_swallowed(classes: Iterable[TermClass]) -> tuple[tuple[TermClass, ...], tuple[str, ...]]:
    """The classes without the terms that a stem of their own class swallows, and a line for each that went."""
    kept: list[TermClass] = []
    notes: list[str] = []
    for name, terms in classes:
        gone: set[str] = set()
        for term in terms:
            stem = next((s for s in terms if s != term and swallows(s, term)), None)
            if stem is not None:
                gone.add(term)
                notes.append(f"{name}: {term!r} is left out, because the stem {stem!r} covers it")
        kept.append(TermClass(name, tuple(term for term in terms if term not in gone)))
    return tuple(kept), tuple(notes)
