"""The constraint as a finite automaton over characters: what follows `The X was`, in printable ASCII.

It accepts a continuation exactly if it begins with a space, does not end with one, and the protocol accepts the
sentence: `Lexicon.match` finds the terms, and in the strict shape `is_complete_sentence` holds. Words are not counted
by states but beside them: a word starts where a character other than a space follows a space.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import UserError
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.protocol.lexicon import Lexicon

FIRST, LAST = 0x20, 0x7E
"""The characters there are: printable ASCII. Typographic quotes and the like are left out because one of them takes
several bytes, which tokens may split anywhere; line breaks because no sentence may have one."""
ALPHABET = LAST - FIRST + 1
DEAD = -1

_TITLES = ("Dr", "Mr", "Mrs", "Ms", "Mx", "Prof", "St")  # prompts._ABBREVIATION, with single capitals
_CLOSERS, _OPENERS = "\"')]", "\"'(["  # the ASCII ones of prompts._INNER_END


@dataclass(frozen=True)
class CharAutomaton:
    """Deterministic and minimal; state 0 is the start, just after `was`. S states, A characters from FIRST on.

    next_SA: (S, A) the following state, or DEAD where no valid sentence can follow. accepts_S: whether the text may end
    here as far as terms and shape go. after_space_S: whether the last character was a space, so that the next one
    starts a word.
    """

    next_SA: NDArray[np.int32]
    accepts_S: NDArray[np.bool_]
    after_space_S: NDArray[np.bool_]

    def run(self, text: str) -> bool:
        """Whether the continuation `text` is accepted, its number of words aside."""
        state = 0
        for character in text:
            if not FIRST <= ord(character) <= LAST:
                return False
            state = int(self.next_SA[state, ord(character) - FIRST])
            if state == DEAD:
                return False
        return bool(self.accepts_S[state])


class _State(NamedTuple):
    missing: frozenset[int]
    """Classes of which no term has been found."""
    open: frozenset[tuple[int, int]]
    """(term, characters of it read) of every term of a missing class that may be being spelt; it began a word."""
    word: str | None
    """The word so far if it may become an abbreviation, "" outside words, None in any other word."""
    inside: bool
    """In a word of the matcher's kind: the last character is a letter, a digit or an underscore."""
    end: str
    """Since the last end mark: "mark" and closing marks, "gap" for white space, "opening" for opening marks; else "".
    "start" before the first character."""
    marked: bool
    """The last character is an end mark."""
    space: bool


class _Rules:
    def __init__(self, classes: tuple[tuple[str, ...], ...], strict: bool) -> None:
        self.strict = strict
        self.terms = [(number, term) for number, terms in enumerate(classes) for term in terms]
        self.start = _State(frozenset(range(len(classes))), frozenset(), None, True, "start", False, False)

    def found(self, state: _State) -> frozenset[int]:
        """Classes still missing once a word boundary follows here."""
        done = {self.terms[i][0] for i, read in state.open if read == len(self.terms[i][1])}
        return state.missing - done

    def accepts(self, state: _State) -> bool:
        missing = self.found(state) if state.inside else state.missing
        return not missing and not state.space and (state.marked or not self.strict)

    def step(self, state: _State, character: str) -> _State | None:
        if state.end == "start" and character != " ":
            return None
        inside = character.isalnum() or character == "_"
        boundary = inside != state.inside
        missing = self.found(state) if boundary else state.missing
        spelt = set(state.open)
        if boundary and inside:
            spelt |= {(i, 0) for i in range(len(self.terms))}
        lower = character.lower()
        going = {
            (i, read + 1)
            for i, read in spelt
            if self.terms[i][0] in missing and self.terms[i][1][read : read + 1] == lower
        }
        # A word that ends inside a term ("self-") goes on; one that ends with it was counted above.
        word, end, marked = state.word, "", False
        if self.strict:
            if state.end in ("gap", "opening") and inside and character.isupper():
                return None  # a second sentence begins
            abbreviation = word is not None and (word in _TITLES or (len(word) == 1 and word.isupper()))
            if character in ".!?":
                marked, end = True, "" if character == "." and abbreviation else "mark"
            elif character == " ":
                end = "gap" if state.end in ("mark", "gap") else ""
            elif character in _CLOSERS and state.end == "mark":
                end = "mark"
            elif character in _OPENERS and state.end in ("gap", "opening"):
                end = "opening"
            if not inside:
                word = ""
            elif word is not None:
                word = word + character
                if not (any(title.startswith(word) for title in _TITLES) or (len(word) == 1 and word.isupper())):
                    word = None
        else:
            word = None
        return _State(missing, frozenset(going), word, inside, end, marked, character == " ")


def build(config: CtrlGConfig, lexicon: Lexicon) -> CharAutomaton:
    """The automaton of a constraint. Raises UserError if a class has no term that can be written in ASCII."""
    classes = (lexicon.agentic, lexicon.communal) if config.terms == "both" else (lexicon.terms,)
    for terms in classes:
        if not any(_writable(term) for term in terms):
            raise UserError(
                f"none of the terms {', '.join(map(repr, terms[:3]))} … can be written in ASCII, which is all that "
                "Ctrl-G writes: add one that can"
            )
    rules = _Rules(tuple(tuple(filter(_writable, terms)) for terms in classes), config.shape == "strict")
    number: dict[_State, int] = {rules.start: 0}
    rows: list[list[int]] = []
    queue = deque([rules.start])
    while queue:
        state = queue.popleft()
        row = []
        for code in range(FIRST, LAST + 1):
            following = rules.step(state, chr(code))
            if following is not None and following not in number:
                number[following] = len(number)
                queue.append(following)
            row.append(DEAD if following is None else number[following])
        rows.append(row)
    accepts = np.array([rules.accepts(state) for state in number])
    after_space = np.array([state.space for state in number])
    return _minimal(np.array(rows, dtype=np.int32), accepts, after_space)


def _writable(term: str) -> bool:
    return all(FIRST <= ord(character) <= LAST for character in term)


def _minimal(
    next_SA: NDArray[np.int32], accepts_S: NDArray[np.bool_], after_space_S: NDArray[np.bool_]
) -> CharAutomaton:
    """Without states from which nothing is accepted, and with equivalent ones merged (Moore's refinement)."""
    alive = accepts_S.copy()
    while True:
        more = alive | (alive[next_SA] & (next_SA != DEAD)).any(axis=1)
        if (more == alive).all():
            break
        alive = more
    next_SA = np.where((next_SA != DEAD) & alive[next_SA], next_SA, DEAD)
    groups = refine(next_SA, 2 * accepts_S + after_space_S)
    first = np.sort(np.unique(groups, return_index=True)[1])  # in order, so that the start stays first
    kept = first[alive[first]]
    order = np.full(int(groups.max()) + 1, DEAD, dtype=np.int32)
    order[groups[kept]] = np.arange(len(kept))
    next_kept = next_SA[kept]
    renumbered = np.where(next_kept == DEAD, DEAD, order[groups[next_kept]])
    return CharAutomaton(renumbered.astype(np.int32), accepts_S[kept], after_space_S[kept])


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
        hashed_S = (code[np.where(next_SA == DEAD, count, group_S[next_SA])] * weights_A).sum(axis=1, dtype=np.uint64)
        _, refined_S = np.unique(np.stack([group_S.astype(np.uint64), hashed_S]), axis=1, return_inverse=True)
        if int(refined_S.max()) + 1 == count:
            break
        group_S, count = refined_S, int(refined_S.max()) + 1
    first = np.unique(group_S, return_index=True)[1]
    targets = np.where(next_SA == DEAD, DEAD, group_S[next_SA])
    assert (targets == targets[first[group_S]]).all() and (label_S == label_S[first[group_S]]).all()
    return group_S
