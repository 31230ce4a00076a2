"""The constraint as an automaton over tokens: the byte automaton lifted to a vocabulary, words counted.

Lifting by bytes covers every way to cut a text into tokens: "bold" may come as " bold", " b" + "old", or "B" after a
space, a curly quotation mark in two or three parts, and what follows ("ly", a full stop) decides whether it was the
term. A token's *class* is what it does to every state. There are far fewer classes than tokens, and all tables are by
class.

A state is a state of the byte automaton and a number of words. That is many states, most of them in the middle of a
character or after a soft hyphen within a word. What may be written is decided in each of them exactly. Only the
look-ahead, which weighs and never decides, is kept for the usual ones alone: the others borrow the row of one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import UserError
from equipoise.methods.ctrlg.automaton import DEAD, CharAutomaton, refine
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.ctrlg.constraint import Constraint, constraint_of
from equipoise.methods.ctrlg.feasible import characters_of
from equipoise.methods.ctrlg.spelling import token_bytes
from equipoise.methods.ctrlg.utf8 import ByteAutomaton, on_bytes
from equipoise.policy.prompt import Tokenizer, ends_sentence
from equipoise.protocol.prompts import word_count
from equipoise.protocol.task import Task

NEVER = 1 << 20
"""Tokens needed from a state from which no valid sentence can be reached."""
_WORDS = 1 << 10  # more than the words that begin in one token: those beyond are not counted


@dataclass(frozen=True)
class TokenAutomaton:
    """B states of the byte automaton, `done` and `dead` the last two; L numbers of words; C classes of tokens, class 0
    being those that are never allowed. State b · L + l is b after l words more than the shortest prefix has.

    next_BC: where each class leads. words_BC: words that begin on the way. class_V: each token's class. need_F: of each
    state the fewest tokens after which the token limit may cut the text or it has ended, and is a valid sentence: what
    may be drawn follows from it alone. It is 0 where the limit may cut here: the model's own sentences that are cut off
    comply, or not, by their text as well. starts: for each occupation the state after its prefix.

    row_F: each state's row of the look-ahead. next_RC: (R, C) where each class leads from each row, as rows;
    the last two are those of `done` and `dead`. accepts_R: whether the limit may cut there. glued_C: whether a class's
    tokens begin with something other than a space.
    """

    next_BC: NDArray[np.int32]
    words_BC: NDArray[np.int16]
    class_V: NDArray[np.int32]
    need_F: NDArray[np.int32]
    starts: Mapping[str, int]
    row_F: NDArray[np.int32]
    next_RC: NDArray[np.int32]
    accepts_R: NDArray[np.bool_]
    glued_C: NDArray[np.bool_]

    @property
    def levels(self) -> int:
        return len(self.need_F) // len(self.next_BC)

    @property
    def dead(self) -> int:
        """A state from which nothing leads on; there are others."""
        return len(self.need_F) - self.levels

    def is_done(self, state: int) -> bool:
        """Whether a valid sentence has ended."""
        return state // self.levels == len(self.next_BC) - 2 and bool(self.need_F[state] == 0)

    def fewest_tokens(self, occupation: str) -> int:
        """Tokens after the prefix that a valid sentence of the occupation needs. Within a limit of so many it needs no
        stop token."""
        return int(self.need_F[self.starts[occupation]])

    def step(self, state: int, token: int) -> int:
        base, level = divmod(state, self.levels)
        kind = self.class_V[token]
        level += int(self.words_BC[base, kind])
        return int(self.next_BC[base, kind]) * self.levels + level if level < self.levels else self.dead

    def run(self, tokens: Sequence[int], occupation: str, limit: int | None = None) -> bool:
        """Whether the tokens are a valid sentence of the occupation: ended by a stop token, or cut by the limit."""
        state = self.starts[occupation]
        for i, token in enumerate(tokens):
            if self.is_done(state):
                return not tokens[i:]
            state = self.step(state, token)
        return self.is_done(state) or (len(tokens) == limit and bool(self.need_F[state] == 0))


def lift(
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
    config: CtrlGConfig,
    task: Task,
    *,
    max_new_tokens: int | None = None,
    vocabulary: int = 0,
) -> TokenAutomaton:
    """The automaton of a task's constraint for a tokenizer, with a start for each of the task's occupations: made once,
    and not to be changed. `vocabulary` is the model's, where it has more ids than the tokenizer: the rest is never
    allowed.

    Raises UserError, with the reason, where an occupation has no valid sentence, or none of so few tokens.
    """
    prefixes = {occupation: task.prefix(occupation) for occupation in task.names}
    return lift_constraint(
        tokenizer,
        stop_ids,
        constraint_of(config, task),
        prefixes,
        max_new_tokens=max_new_tokens,
        vocabulary=vocabulary,
    )


def lift_constraint(
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
    constraint: Constraint,
    prefixes: Mapping[str, str],
    *,
    max_new_tokens: int | None = None,
    vocabulary: int = 0,
) -> TokenAutomaton:
    """As `lift`; `prefixes` says for each occupation how its sentences begin."""
    characters = characters_of(constraint, prefixes)
    spelt = token_bytes(tokenizer)
    spelt += [None] * (vocabulary - len(spelt))
    # A stop token is text only where it is the sentence's own end, and shown by decoding.
    hidden = set(tokenizer.all_special_ids)
    added = {index: text.encode() for text, index in tokenizer.get_added_vocab().items()}
    shown = {i: b"" if i in hidden else spelt[i] or added.get(i, b"") for i in stop_ids if 0 <= i < len(spelt)}
    ends = {i: text if ends_sentence(text.decode(errors="replace")) else b"" for i, text in shown.items()}
    automaton = _lifted(characters, constraint, tuple(prefixes.items()), tuple(spelt), tuple(ends.items()))
    occupation = max(prefixes, key=automaton.fewest_tokens)
    need = automaton.fewest_tokens(occupation)
    if need >= NEVER:
        within, raised = (f" in {constraint.max_words} words", "raise max-words or ") if constraint.strict else ("", "")
        raise UserError(
            f"the model's tokens spell no sentence that begins with {prefixes[occupation]!r} and meets Ctrl-G's "
            f"constraint{within}: {raised}use another model"
        )
    if max_new_tokens is not None and need > max_new_tokens:
        raise UserError(
            f"max-new-tokens {max_new_tokens} is too few: the shortest sentence that begins with "
            f"{prefixes[occupation]!r} and meets Ctrl-G's constraint needs {need} tokens more; use {max(need, 32)} or "
            "more"
        )
    return automaton


# A command asks before it loads a model, and again for each sampling that the model then does; a study for each method.
@lru_cache(maxsize=4)
def _lifted(
    characters: CharAutomaton,
    constraint: Constraint,
    prefixes: tuple[tuple[str, str], ...],
    spelt: tuple[bytes | None, ...],
    ends: tuple[tuple[int, bytes], ...],
) -> TokenAutomaton:
    bytewise = _over_bytes(characters)
    return _count_words(characters, bytewise, _classes(bytewise, spelt, dict(ends)), constraint, dict(prefixes))


_over_bytes = lru_cache(maxsize=4)(on_bytes)


@dataclass(frozen=True)
class _Block:
    """What some classes of tokens do to some states, and all that they do."""

    first: int
    """The first of the states."""
    class_Y: NDArray[np.intp]
    code_XY: NDArray[np.int64]
    """Where each class leads and how many words begin on the way, as state · _WORDS + words, or DEAD."""


@dataclass(frozen=True)
class _Classes:
    blocks: list[_Block]
    ends_C: NDArray[np.bool_]
    """Stop tokens: the text must be acceptable after them."""
    bare_end: bool
    """Whether a stop token adds nothing to the text, so that whatever is acceptable can be ended at once. Without one
    the limit may not cut either: a text that it may cut later need not have a way to get there."""
    glued_C: NDArray[np.bool_]
    class_V: NDArray[np.int32]


class _Effects:
    """What texts do to some states. Tokens share beginnings and effects, so each effect is extended by each byte once,
    however many tokens need it."""

    def __init__(self, bytewise: ByteAutomaton, begin: int, end: int) -> None:
        self.code_256B = np.where(
            bytewise.next_B256 == DEAD, DEAD, bytewise.next_B256.astype(np.int64) * _WORDS + bytewise.begins_B256
        ).T.copy()
        self.rows: list[NDArray[np.int64]] = [np.arange(begin, end, dtype=np.int64) * _WORDS]
        self.number: dict[bytes, int] = {}
        self.extended: dict[tuple[int, int], int] = {}

    def of(self, text: bytes) -> int | None:
        """The effect's number; None if no state survives the text."""
        effect = 0
        for byte in text:
            key = (effect, byte)
            if key not in self.extended:
                self.extended[key] = self._extend(*key)
            effect = self.extended[key]
            if effect < 0:
                return None
        return effect

    def _extend(self, effect: int, byte: int) -> int:
        row_X = self.rows[effect]
        step_X = self.code_256B[byte][row_X // _WORDS]
        dead_X = (row_X == DEAD) | (step_X == DEAD)
        if dead_X.all():
            return DEAD
        words_X = np.minimum(row_X % _WORDS + step_X % _WORDS, _WORDS - 1)
        row_X = np.where(dead_X, DEAD, step_X // _WORDS * _WORDS + words_X)
        found = self.number.setdefault(row_X.tobytes(), len(self.rows))
        if found == len(self.rows):
            self.rows.append(row_X)
        return found


def _classes(bytewise: ByteAutomaton, spelt: Sequence[bytes | None], ends: dict[int, bytes]) -> _Classes:
    """What each token does to every state. A token that begins within a character does something to partial states
    only, any other to whole ones only."""
    states, whole = len(bytewise.next_B256), bytewise.whole
    halves = {False: _Effects(bytewise, 0, whole), True: _Effects(bytewise, whole, states)}
    keys: dict[tuple[bool, int, bool, bool], int] = {}
    class_V = np.zeros(len(spelt), dtype=np.int32)
    for index, text in enumerate(spelt):
        ends_here = index in ends
        text = ends.get(index, text)
        if text is None or not (text or ends_here):
            continue
        within = text[:1] >= b"\x80" and text[:1] < b"\xc0"
        if (effect := halves[within].of(text)) is not None:
            class_V[index] = keys.setdefault((within, effect, ends_here, not text.startswith(b" ")), len(keys)) + 1
    blocks = []
    for within, first in ((False, 0), (True, whole)):
        chosen = [(c + 1, effect) for (inside, effect, _, _), c in keys.items() if inside == within]
        if chosen:
            code_YX = np.stack([halves[within].rows[effect] for _, effect in chosen])
            blocks.append(_Block(first, np.array([c for c, _ in chosen]), code_YX.T))
    ends_C = np.array([False, *(ends_here for _, _, ends_here, _ in keys)])
    glued_C = np.array([True, *(glued for *_, glued in keys)])
    return _Classes(blocks, ends_C, b"" in ends.values(), glued_C, class_V)


def _count_words(
    characters: CharAutomaton,
    bytewise: ByteAutomaton,
    classes: _Classes,
    constraint: Constraint,
    prefixes: Mapping[str, str],
) -> TokenAutomaton:
    """The product with the counter of words."""
    states = len(bytewise.next_B256)
    shortest = min(word_count(prefix) for prefix in prefixes.values())
    levels = constraint.max_words - shortest + 1 if constraint.strict else 1
    next_BC, words_BC = _tables(characters, states, classes)
    starts = {
        occupation: characters.starts[prefix] * levels + (word_count(prefix) - shortest if constraint.strict else 0)
        for occupation, prefix in prefixes.items()
    }
    fewest = constraint.min_words - shortest if constraint.strict else 0
    over_B = np.zeros(states + 2, dtype=bool)
    over_B[: len(characters.accepts_S)] = characters.accepts_S & classes.bare_end
    over_B[states] = True
    over_BL = over_B[:, None] & (np.arange(levels) >= fewest)
    need_BL, reached_BL = _explore(next_BC, words_BC, over_BL, list(starts.values()), bytewise)
    row_BL, next_RC, accepts_R = _rows(next_BC, words_BC, need_BL, reached_BL, bytewise)
    need_F, row_F = need_BL.reshape(-1), row_BL.reshape(-1)
    return TokenAutomaton(
        next_BC, words_BC, classes.class_V, need_F, starts, row_F, next_RC, accepts_R, classes.glued_C
    )


def _tables(characters: CharAutomaton, states: int, classes: _Classes) -> tuple[NDArray[np.int32], NDArray[np.int16]]:
    """Where each class leads from each state, `done` and `dead` included, and the words that begin on the way."""
    done, dead = states, states + 1
    accepts_B = np.zeros(states, dtype=bool)
    accepts_B[: len(characters.accepts_S)] = characters.accepts_S
    next_BC = np.full((states + 2, len(classes.ends_C)), dead, dtype=np.int32)
    words_BC = np.zeros(next_BC.shape, dtype=np.int16)
    next_BC[done] = done
    for block in classes.blocks:
        living_XY = block.code_XY != DEAD
        target_XY = np.where(living_XY, block.code_XY // _WORDS, 0)
        ended_XY = np.where(accepts_B[target_XY], done, dead)
        target_XY = np.where(living_XY, np.where(classes.ends_C[block.class_Y], ended_XY, target_XY), dead)
        words_XY = np.where(target_XY == dead, 0, block.code_XY % _WORDS)
        rows = slice(block.first, block.first + len(target_XY))
        next_BC[rows, block.class_Y], words_BC[rows, block.class_Y] = target_XY, words_XY
    return next_BC, words_BC


def _explore(
    next_BC: NDArray[np.int32],
    words_BC: NDArray[np.int16],
    over_BL: NDArray[np.bool_],
    starts: list[int],
    bytewise: ByteAutomaton,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """(B, L) the fewest tokens needed to a state in which all may be over, and which states can come up, those that
    stand for them included."""
    states, levels = len(next_BC) - 2, over_BL.shape[1]
    # Each state's distinct edges.
    from_X, class_X = np.nonzero((next_BC[:states] != states + 1) & (words_BC[:states] < levels))
    target_X, words_X = next_BC[from_X, class_X].astype(np.int64), words_BC[from_X, class_X]
    kinds_E = np.unique((from_X * (states + 2) + target_X) * _WORDS + words_X)
    words_E, target_E, from_E = kinds_E % _WORDS, kinds_E // _WORDS % (states + 2), kinds_E // _WORDS // (states + 2)
    need_BL = np.where(over_BL, 0, NEVER).astype(np.int32)
    sources, begin_E = np.unique(from_E, return_index=True)
    for level in reversed(range(levels)):  # words never become fewer
        level_E = level + words_E
        fits_E = level_E < levels
        level_E = np.minimum(level_E, levels - 1)
        while True:
            through_E = np.where(fits_E, need_BL[target_E, level_E], NEVER) + 1
            shorter = np.minimum(np.minimum.reduceat(through_E, begin_E), need_BL[sources, level])
            if (shorter == need_BL[sources, level]).all():
                break
            need_BL[sources, level] = shorter
    reached_BL = np.zeros((states + 2, levels), dtype=bool)
    reached_BL.reshape(-1)[starts] = True
    from_E = np.concatenate([from_E, bytewise.stand_ins[:, 0]])
    target_E = np.concatenate([target_E, bytewise.stand_ins[:, 1]])
    words_E = np.concatenate([words_E, bytewise.stand_ins[:, 2]])
    for level in range(levels):
        fits_E = level + words_E < levels
        source_E, end_E, level_E = from_E[fits_E], target_E[fits_E], level + words_E[fits_E]
        before = -1
        while (now := int(reached_BL.sum())) != before:
            before = now
            on_E = reached_BL[source_E, level]
            reached_BL[end_E[on_E], level_E[on_E]] = True
    return need_BL, reached_BL


def _rows(
    next_BC: NDArray[np.int32],
    words_BC: NDArray[np.int16],
    need_BL: NDArray[np.int32],
    reached_BL: NDArray[np.bool_],
    bytewise: ByteAutomaton,
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """(B, L) each state's row of the look-ahead, (R, C) where the rows lead, and (R,) where the limit may cut."""
    states, levels = len(next_BC) - 2, need_BL.shape[1]
    usual_B = np.ones(states + 2, dtype=bool)
    usual_B[[*bytewise.stand_ins[:, 0], states, states + 1]] = False
    able_BL = need_BL < NEVER
    base_R, level_R = np.nonzero(usual_B[:, None] & able_BL & reached_BL)
    done, dead = len(base_R), len(base_R) + 1
    row_BL = np.full((states + 2, levels), dead, dtype=np.int32)
    row_BL[base_R, level_R] = np.arange(done)
    row_BL[states, able_BL[states]] = done
    _borrow(row_BL, dead, bytewise.stand_ins, able_BL)
    level_RC = level_R[:, None] + words_BC[base_R]
    next_RC = np.full((done + 2, next_BC.shape[1]), dead, dtype=np.int32)
    next_RC[:done] = np.where(level_RC < levels, row_BL[next_BC[base_R], np.minimum(level_RC, levels - 1)], dead)
    next_RC[done] = done
    label_R = np.zeros(done + 2, dtype=np.int64)
    label_R[:done] = np.where(need_BL[base_R, level_R] == 0, 3, 0)
    label_R[-2:] = 1, 2
    group_R = refine(next_RC, label_R)
    first = np.sort(np.unique(group_R, return_index=True)[1])  # in order: live ones, done, dead
    order = np.empty(len(first), dtype=np.int32)
    order[group_R[first]] = np.arange(len(first))
    return order[group_R[row_BL]], order[group_R[next_RC[first]]], label_R[first] == 3


def _borrow(row_BL: NDArray[np.int32], dead: int, stand_ins: NDArray[np.int64], able_BL: NDArray[np.bool_]) -> None:
    """Give each state without a row that of the likeliest state to stand for it that has one; else it stays dead's,
    which weighs the state low and forbids nothing."""
    levels = row_BL.shape[1]
    for state, other, words, _ in stand_ins[np.argsort(stand_ins[:, 3], kind="stable")]:
        row_L = np.full(levels, dead, dtype=np.int32)
        row_L[: max(0, levels - words)] = row_BL[other, words:]
        better_L = able_BL[state] & (row_L != dead)
        row_BL[state, better_L] = row_L[better_L]


def fewest_tokens(tokenizer: Tokenizer, stop_ids: Sequence[int], task: Task, occupation: str) -> int:
    """Tokens after the prefix of the shortest sentence that is a strict success. Raises UserError if there is none.
    Takes seconds."""
    automaton = lift(tokenizer, stop_ids, CtrlGConfig(), task)
    return automaton.fewest_tokens(occupation)
