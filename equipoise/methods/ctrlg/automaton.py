"""The constraint as a finite automaton over characters: the whole sentence, from its first character on.

It accepts a text exactly if the protocol accepts what `clean` leaves of it: the matcher finds the terms, and in the
strict shape `is_complete_sentence` holds. Words are not counted by states but beside them: a word begins where a
character other than white space follows white space, or the text begins. `characters` says which characters are never
written.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import UserError
from equipoise.methods.ctrlg.characters import NEVER, Character, Read, classify, describe
from equipoise.methods.ctrlg.constraint import Constraint
from equipoise.protocol.folding import fold_term, normalise

DEAD = -1
_MARKS = ".!?"
# After an end mark, and before the first letter of the sentence that follows: as in the protocol's sentence rule.
_CLOSERS, _OPENERS = "\"'\u201d\u2019)]", "\"'\u201c\u2018(["
_QUOTES = "\"'\u201c\u2018"
_USUAL = "".join(map(chr, range(32, 127))) + "\n\u00a0\u00e9\u00c9\u2013\u2018\u2019\u201c\u201d"
"""At least one character of every kind that ordinary text holds."""
_INITIALS = tuple(map(chr, range(ord("A"), ord("Z") + 1)))


class _Reading(NamedTuple):
    """What the matcher knows of the text so far."""

    missing: frozenset[int]
    """Classes of which no term has been found."""
    open: frozenset[tuple[int, int]]
    """(term, keys of it read) of every term of a missing class that may be being spelt; it began a word."""
    inside: bool
    """In a word of the matcher's kind: the last character is a letter, a digit or an underscore."""
    late: str | None
    """A key that follows once no accent does."""
    begun: bool


class _Matcher:
    """The terms: whole words, and stems, each from the beginning of a word on. A term ends between characters, so
    neither may be followed by an accent."""

    def __init__(self, classes: tuple[tuple[str, ...], ...]) -> None:
        self.terms = [(n, fold_term(term.removesuffix("*"))) for n, terms in enumerate(classes) for term in terms]
        self.stem = [term.endswith("*") for terms in classes for term in terms]
        self.start = _Reading(frozenset(range(len(classes))), frozenset(), False, None, False)
        self.letters = frozenset("".join(term for _, term in self.terms))
        self.beginning: dict[str, list[int]] = {}
        for i, (_, term) in enumerate(self.terms):
            self.beginning.setdefault(term[0], []).append(i)

    def missing(self, reading: _Reading) -> frozenset[int]:
        """Classes still missing if the text ends here."""
        if reading.late is not None:
            reading = self._read(reading._replace(late=None), reading.late, reading.inside, False)
        return reading.missing - self._complete(reading, True, True)

    def _complete(self, reading: _Reading, word_ends: bool, stem_ends: bool) -> set[int]:
        return {
            self.terms[i][0]
            for i, read in reading.open
            if read == len(self.terms[i][1]) and (stem_ends if self.stem[i] else word_ends)
        }

    def step(self, reading: _Reading, read: Read) -> _Reading:
        if not read.keys and read.late is None:
            return reading  # the matcher leaves it out
        if reading.late is not None and not read.moves:
            reading = self._read(reading._replace(late=None), reading.late, reading.inside, False)
        word = reading.inside if read.mark and reading.begun else read.word
        for key, mark in read.keys:
            reading = self._read(reading, key, word, mark)
        return reading._replace(late=read.late) if read.late is not None else reading

    def _read(self, reading: _Reading, key: str, word: bool, mark: bool) -> _Reading:
        missing = reading.missing - self._complete(reading, reading.inside and not word, not mark)
        # A word that ends inside a term ("self-") goes on; one that ends with it was counted above.
        going = [(i, n + 1) for i, n in reading.open if key and self.terms[i][1][n : n + 1] == key]
        if word and not reading.inside:
            going += [(i, 1) for i in self.beginning.get(key, ())]
        spelt = frozenset(x for x in going if self.terms[x[0]][0] in missing)
        return _Reading(missing, spelt, word, reading.late, True)


class _Shape(NamedTuple):
    """What the sentence rule knows of the text so far."""

    word: bool
    """The last character is a letter, a digit or an underscore."""
    open: frozenset[tuple[int, int]]
    """(abbreviation, characters of it read) of every abbreviation that may be being written."""
    end: str
    """Since the last end mark: "mark", closing marks too; "gap": white space; "opening": opening marks; else ""."""
    marked: bool
    """The last character that is no white space is an end mark."""
    over: bool
    """A line break came, so that only white space may follow."""
    space: bool
    alnum: bool
    """A letter or digit came."""


class _Sentence:
    """One complete sentence, white space after it allowed: it is stripped."""

    def __init__(self, abbreviations: tuple[str, ...]) -> None:
        self.abbreviations = (*_INITIALS, *abbreviations)
        self.start = _Shape(False, frozenset(), "", False, False, True, False)
        self.named = frozenset("".join(self.abbreviations) + _MARKS + _CLOSERS + _OPENERS)

    def accepts(self, shape: _Shape) -> bool:
        return shape.marked and shape.alnum

    def step(self, shape: _Shape, c: Character) -> _Shape | None:
        if shape.over:
            return shape if c.space else None
        if c.line_break:
            return _Shape(False, frozenset(), "", True, True, True, shape.alnum) if shape.marked else None
        if shape.end in ("gap", "opening") and c.word and c.upper:
            return None  # a second sentence begins
        spelt = set(shape.open)
        if c.word != shape.word:
            spelt |= {(i, 0) for i in range(len(self.abbreviations))}
        going = frozenset(
            (i, read + 1) for i, read in spelt if c.raw and self.abbreviations[i][read : read + 1] == c.raw
        )
        end, marked = "", False
        if c.raw and c.raw in _MARKS:
            abbreviation = any(read == len(self.abbreviations[i]) for i, read in shape.open)
            marked, end = True, "" if c.raw == "." and abbreviation else "mark"
        elif c.space:
            marked, end = shape.marked, "gap" if shape.end in ("mark", "gap") else ""
        elif c.raw and c.raw in _CLOSERS and shape.end == "mark":
            end = "mark"
        elif c.raw and c.raw in _OPENERS and shape.end in ("gap", "opening"):
            end = "opening"
        return _Shape(c.word, going, end, marked, False, c.space, shape.alnum or c.alnum)


class _Anything:
    """Any shape."""

    start = _Shape(False, frozenset(), "", False, False, False, False)
    named: frozenset[str] = frozenset()

    def accepts(self, shape: _Shape) -> bool:
        return True

    def step(self, shape: _Shape, c: Character) -> _Shape | None:
        return shape


@dataclass(frozen=True, eq=False)
class CharAutomaton:
    """Deterministic and minimal. S states, K classes of characters, class NEVER being those that are never written.

    next_SK: (S, K) the following state, or DEAD where no valid sentence can follow. accepts_S: whether the text may end
    here as far as terms and shape go. begins_SK: whether a word begins with the character; never in the free shape,
    where words do not matter. kind_N: class of each code point. starts: for each prefix the state after it.
    stand_in_S: each state that a text of usual characters can lead to stands for itself; for another, reached through a
    soft hyphen within a word and the like, the usual state that behaves most alike.
    """

    next_SK: NDArray[np.int32]
    accepts_S: NDArray[np.bool_]
    begins_SK: NDArray[np.bool_]
    kind_N: NDArray[np.uint16]
    starts: Mapping[str, int]
    stand_in_S: NDArray[np.int64]

    def run(self, prefix: str, continuation: str) -> bool:
        """Whether `continuation` is accepted after the prefix, the number of words aside."""
        state = self.starts[prefix]
        for character in continuation:
            state = int(self.next_SK[state, self.kind_N[ord(character)]])
            if state == DEAD:
                return False
        return bool(self.accepts_S[state])

    @cached_property
    def fewest_S(self) -> NDArray[np.int64]:
        """(S,) words that must still begin before the text can end."""
        need_S = np.where(self.accepts_S, 0, len(self.next_SK))
        while True:
            step_SK = np.where(self.next_SK == DEAD, len(need_S), need_S[self.next_SK] + self.begins_SK)
            shorter_S = np.minimum(need_S, step_SK.min(axis=1))
            if (shorter_S == need_S).all():
                return need_S
            need_S = shorter_S


def build(constraint: Constraint, prefixes: Iterable[str]) -> CharAutomaton:
    """The automaton of a constraint, its numbers of words aside, with a start after each prefix. Raises UserError, with
    the reason, if a class has no term that can be written, or for a prefix that no valid sentence begins with, its
    words aside."""
    matcher = _Matcher(constraint.classes)
    sentence = _Sentence(constraint.abbreviations) if constraint.strict else _Anything()
    kind_N, characters = classify(matcher.letters, sentence.named)
    # Each component moves by itself, over states that are numbered as they are met.
    read: dict[tuple[_Reading, Read], _Reading] = {}
    number: dict[tuple[_Reading, _Shape], int] = {}
    starts = {}
    for prefix in dict.fromkeys(prefixes):
        state = _after(prefix, matcher, sentence)
        starts[prefix] = number.setdefault(state, len(number))
    queue = deque(number)
    rows: list[list[int]] = []
    while queue:
        reading, shape = queue.popleft()
        row = [DEAD]
        for character in characters[1:]:
            following = sentence.step(shape, character)
            if following is None:
                row.append(DEAD)
                continue
            key = (reading, character.read)
            if key not in read:
                read[key] = matcher.step(*key)
            state = (read[key], following)
            if state not in number:
                number[state] = len(number)
                queue.append(state)
            row.append(number[state])
        rows.append(row)
    accepts_S = np.array([sentence.accepts(shape) and not matcher.missing(reading) for reading, shape in number])
    space_S = np.array([shape.space for _, shape in number])
    solid_K = np.array([not character.space for character in characters])
    own_S = np.arange(len(rows))
    whole = CharAutomaton(np.array(rows, dtype=np.int32), accepts_S, space_S[:, None] & solid_K, kind_N, starts, own_S)
    return _minimal(whole)


def _after(prefix: str, matcher: _Matcher, sentence: _Sentence | _Anything) -> tuple[_Reading, _Shape]:
    """The state after a prefix, which `clean` strips on the left."""
    prefix = prefix.lstrip()
    if prefix[:1] and prefix[0] in _QUOTES:
        raise UserError(
            f"Ctrl-G writes no sentences that begin with a quotation mark, as {prefix!r} does: take it out of the "
            "frame or the occupation"
        )
    reading, shape = matcher.start, sentence.start
    for character in normalise(prefix):
        reading = matcher.step(reading, describe(character, matcher.letters, sentence.named).read)
    for character in prefix:
        following = sentence.step(shape, describe(character, matcher.letters, sentence.named))
        if following is None:
            raise UserError(
                f"no complete sentence begins with {prefix!r}, which is more than one by itself: shorten the frame or "
                "the occupation, or list what ends in a full stop under abbreviations"
            )
        shape = following
    return reading, shape


def _minimal(a: CharAutomaton) -> CharAutomaton:
    """Without states from which nothing is accepted, and with equivalent ones merged (Moore's refinement)."""
    alive_S = a.accepts_S.copy()
    while True:
        more_S = alive_S | (alive_S[a.next_SK] & (a.next_SK != DEAD)).any(axis=1)
        if (more_S == alive_S).all():
            break
        alive_S = more_S
    for prefix, state in a.starts.items():
        if not alive_S[state]:
            raise UserError(
                f"no sentence that begins with {prefix!r} can meet Ctrl-G's constraint: each class needs a term whose "
                "letters and accents are single characters in Unicode's form C"
            )
    next_SK = np.where((a.next_SK != DEAD) & alive_S[a.next_SK], a.next_SK, DEAD)
    begins_SK = a.begins_SK & (next_SK != DEAD)
    _, label_S = np.unique(np.column_stack([a.accepts_S, begins_SK]), axis=0, return_inverse=True)
    group_S = refine(next_SK, label_S.reshape(-1))
    first = np.sort(np.unique(group_S, return_index=True)[1])
    kept = first[alive_S[first]]
    order = np.full(int(group_S.max()) + 1, DEAD, dtype=np.int32)
    order[group_S[kept]] = np.arange(len(kept))
    next_kept = next_SK[kept]
    renumbered = np.where(next_kept == DEAD, DEAD, order[group_S[next_kept]]).astype(np.int32)
    starts = {prefix: int(order[group_S[state]]) for prefix, state in a.starts.items()}
    own_S = np.arange(len(kept))
    return _stand_ins(
        _fewer_kinds(CharAutomaton(renumbered, a.accepts_S[kept], begins_SK[kept], a.kind_N, starts, own_S))
    )


def _fewer_kinds(a: CharAutomaton) -> CharAutomaton:
    """With those classes of characters merged that no state tells apart; the characters that are never written are one
    class with those that no state allows."""
    columns_KX = np.concatenate([a.next_SK, a.begins_SK], axis=0).T
    nowhere = np.flatnonzero((a.next_SK == DEAD).all(axis=0))
    _, first_K, group_K = np.unique(columns_KX, axis=0, return_index=True, return_inverse=True)
    order = [int(group_K[NEVER]), *(g for g in range(len(first_K)) if g != group_K[NEVER])]
    assert (group_K[nowhere] == group_K[NEVER]).all()
    place = np.empty(len(order), dtype=np.uint16)
    place[order] = np.arange(len(order))
    chosen = first_K[order]
    kind_N = place[group_K.reshape(-1)][a.kind_N]
    return replace(a, next_SK=a.next_SK[:, chosen], begins_SK=a.begins_SK[:, chosen], kind_N=kind_N)


def _stand_ins(a: CharAutomaton) -> CharAutomaton:
    usual_K = np.unique(a.kind_N[[ord(c) for c in _USUAL]])
    usual_K = usual_K[usual_K != NEVER]
    code_SK = np.where(a.next_SK == DEAD, DEAD, 2 * a.next_SK + a.begins_SK)[:, usual_K]
    usual_S = np.zeros(len(code_SK), dtype=bool)
    frontier = np.unique(list(a.starts.values()))
    while len(frontier):
        usual_S[frontier] = True
        codes = np.unique(code_SK[frontier])
        following = np.unique(codes[codes != DEAD] // 2)
        frontier = following[~usual_S[following]]
    stand_in_S = np.arange(len(code_SK))
    able = np.flatnonzero(usual_S)
    for state in np.flatnonzero(~usual_S).tolist():
        alike = (code_SK[able] == code_SK[state]).sum(axis=1) + (a.accepts_S[able] == a.accepts_S[state])
        stand_in_S[state] = able[alike.argmax()]
    return replace(a, stand_in_S=stand_in_S)


def refine(next_SA: NDArray[np.int32], label_S: NDArray[np.int_]) -> NDArray[np.int64]:
    """(S,) group of each state: the coarsest grouping that agrees with the labels and with every transition.

    Rows are compared by 64-bit hashes, so two rounds could in principle merge too much; the result is checked exactly.
    """
    random = np.random.default_rng(0)
    weights_A = random.integers(1, 2**63, size=next_SA.shape[1], dtype=np.uint64) | np.uint64(1)
    _, group_S = np.unique(label_S, return_inverse=True)
    count = int(group_S.max()) + 1
    while True:
        code = random.integers(0, 2**63, size=count + 1, dtype=np.uint64)  # the last is that of DEAD
        of_S = np.append(code[group_S], code[count])
        hashed_S = of_S[next_SA] @ weights_A + code[group_S] * np.uint64(0x9E3779B97F4A7C15)
        _, refined_S = np.unique(hashed_S, return_inverse=True)
        if int(refined_S.max()) + 1 == count:
            break
        group_S, count = refined_S, int(refined_S.max()) + 1
    first = np.unique(group_S, return_index=True)[1]
    targets = np.where(next_SA == DEAD, DEAD, group_S[next_SA])
    assert (targets == targets[first[group_S]]).all() and (label_S == label_S[first[group_S]]).all()
    return group_S
