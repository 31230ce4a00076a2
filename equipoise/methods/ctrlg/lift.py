"""The constraint as an automaton over tokens: the character automaton lifted to a vocabulary's bytes, words counted.

Lifting by bytes covers every way to cut a text into tokens: "bold" may come as " bold", " b" + "old", or "B" after a
space, and what follows ("ly", a full stop) decides whether it was the term. A token's *class* is what it does to every
state. There are far fewer classes than tokens, and all tables are by class.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from equipoise.errors import UserError
from equipoise.methods.ctrlg.automaton import DEAD, FIRST, LAST, CharAutomaton, build, refine
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.policy.prompt import Tokenizer
from equipoise.protocol.lexicon import Lexicon
from equipoise.protocol.prompts import prefix, word_count

NEVER = 1 << 20
"""Tokens needed from a state from which no valid sentence can be reached."""


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes that each token id adds to a text, None for special and other added tokens.

    From the vocabulary, never by decoding tokens one by one, which loses spaces and the parts of characters. Raises
    UserError for a tokenizer that is neither byte-level, nor SentencePiece-like, nor one of whole words.
    """
    pieces: dict[str, int] = tokenizer.get_vocab()
    out: list[bytes | None] = [None] * (max(pieces.values()) + 1)
    added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    spell = _speller(tokenizer)
    for piece, index in pieces.items():
        if index not in added:
            out[index] = spell(piece)
    return out


def _speller(tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend is not None else {"type": "unknown"}
    kinds = json.dumps(decoder)
    if decoder is None:  # whole words, which transformers joins with spaces
        return lambda piece: b" " + piece.encode()
    if "ByteLevel" in kinds:
        byte_of = _byte_alphabet()
        return lambda piece: bytes(byte_of[c] for c in piece) if all(c in byte_of for c in piece) else None
    if "\u2581" in decoder_text(decoder):
        fallback = "ByteFallback" in kinds

        def spell(piece: str) -> bytes:
            if fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("\u2581", " ").encode()

        return spell
    raise UserError(
        "Ctrl-G does not know how this model's tokenizer turns tokens into text: use a model with a byte-level or "
        "SentencePiece tokenizer (Llama, SmolLM, Qwen, Mistral, Gemma, GPT-2 have one)"
    )


def decoder_text(decoder: dict[str, object]) -> str:
    """Every setting of a decoder, not escaped."""
    return json.dumps(decoder, ensure_ascii=False)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on, in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    table = {chr(byte): byte for byte in own} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    return table


@dataclass(frozen=True)
class TokenAutomaton:
    """F live states, then `done` and `dead`; C classes of tokens, class 0 being those that are never allowed.

    next_FC: (F + 2, C) the following state. class_V: (V,) each token's class. need_F: (F + 2,) the fewest tokens, the
    stop token counted, with which a valid sentence can be ended from a state: what may be drawn follows from it alone.
    glued_C: whether a class's tokens begin with something other than a space.
    """

    next_FC: NDArray[np.int32]
    class_V: NDArray[np.int32]
    need_F: NDArray[np.int32]
    glued_C: NDArray[np.bool_]
    start: int

    @property
    def done(self) -> int:
        return len(self.next_FC) - 2

    @property
    def dead(self) -> int:
        return len(self.next_FC) - 1

    def run(self, tokens: Sequence[int]) -> bool:
        """Whether the tokens, the stop token among them, are a valid sentence."""
        state = self.start
        for i, token in enumerate(tokens):
            if state == self.done:
                return not tokens[i:]
            state = int(self.next_FC[state, self.class_V[token]])
        return state == self.done


def lift(
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
    config: CtrlGConfig,
    lexicon: Lexicon,
    *,
    max_new_tokens: int,
    vocabulary: int = 0,
    prefix_words: int | None = None,
) -> TokenAutomaton:
    """The automaton of a constraint for a tokenizer and a token limit.

    `vocabulary` is the model's, where it has more ids than the tokenizer: the rest is never allowed. Words of the
    prefix count. Raises UserError, with the reason, where no valid sentence exists.
    """
    characters = build(config, lexicon)
    words = word_count(prefix("nurse")) if prefix_words is None else prefix_words
    _check_words(characters, config, words)
    spelt = token_bytes(tokenizer)
    spelt += [None] * (vocabulary - len(spelt))
    # Of a stop token only what decoding shows becomes text: nothing if it is special.
    hidden = set(tokenizer.all_special_ids)
    added = {index: text.encode() for text, index in tokenizer.get_added_vocab().items()}
    ends = {i: b"" if i in hidden else spelt[i] or added.get(i, b"") for i in stop_ids if 0 <= i < len(spelt)}
    automaton = _count_words(characters, _classes(characters, spelt, ends), config, words)
    need = int(automaton.need_F[automaton.start])
    if need >= NEVER:
        raise UserError("the model's tokens cannot spell any sentence that meets the constraint: use another model")
    if need > max_new_tokens:
        raise UserError(
            f"max-new-tokens {max_new_tokens} is too few: the shortest sentence that meets the constraint needs {need} "
            f"tokens, its end counted; use {max(need, 32)} or more"
        )
    return automaton


@dataclass(frozen=True)
class _Classes:
    next_CS: NDArray[np.int32]
    """(C, S) where each class leads from each state of the character automaton."""
    starts_C2: NDArray[np.int32]
    """(C, 2) words that begin in a token, after another character and after a space."""
    ends_C: NDArray[np.bool_]
    """Stop tokens: the text must be acceptable after them."""
    glued_C: NDArray[np.bool_]
    class_V: NDArray[np.int32]


def _classes(characters: CharAutomaton, spelt: Sequence[bytes | None], ends: dict[int, bytes]) -> _Classes:
    """What each token does to every state. Tokens share prefixes and effects, so each effect is extended by each byte
    once, however many tokens need it."""
    states = len(characters.next_SA)
    table_AS = np.ascontiguousarray(characters.next_SA.T)
    # An effect: where each state leads, and the words that begin on the way. The last character is a space or not, or
    # there is none yet: then the state says.
    effects: list[tuple[NDArray[np.int32], int, int, int]] = [(np.arange(states, dtype=np.int32), 0, 0, -1)]
    nowhere = (np.full(states, DEAD, dtype=np.int32), 0, 0, 0)
    number: dict[tuple[bytes, int, int, int], int] = {}
    extended: dict[tuple[int, int], int] = {}

    def add(effect: tuple[NDArray[np.int32], int, int, int]) -> int:
        key = (effect[0].tobytes(), *effect[1:])
        if key not in number:
            number[key] = len(effects)
            effects.append(effect)
        return number[key]

    dead = add(nowhere)

    def extend(effect: int, byte: int) -> int:
        next_S, after_other, after_space, last = effects[effect]
        led_S = np.where(next_S == DEAD, DEAD, table_AS[byte - FIRST][next_S])
        if (led_S == DEAD).all():
            return dead
        space = byte == FIRST
        began_other = not space and last == 1
        began_space = not space and last != 0
        return add((led_S.astype(np.int32), after_other + began_other, after_space + began_space, int(space)))

    def effect_of(text: bytes) -> int:
        effect = 0
        for byte in text:
            if not FIRST <= byte <= LAST:
                return dead
            if (following := extended.get((effect, byte))) is None:
                following = extended[effect, byte] = extend(effect, byte)
            effect = following
        return effect

    keys: dict[tuple[int, bool, bool], int] = {(dead, False, True): 0}
    class_V = np.zeros(len(spelt), dtype=np.int32)
    for index, text in enumerate(spelt):
        ends_here = index in ends
        text = ends.get(index, text)
        if text is None or not (text or ends_here) or (effect := effect_of(text)) == dead:
            continue
        class_V[index] = keys.setdefault((effect, ends_here, not text.startswith(b" ")), len(keys))
    chosen = [effects[effect] for effect, _, _ in keys]
    return _Classes(
        np.stack([next_S for next_S, *_ in chosen]),
        np.array([[other, space] for _, other, space, _ in chosen], dtype=np.int32),
        np.array([ends_here for _, ends_here, _ in keys]),
        np.array([glued for _, _, glued in keys]),
        class_V,
    )


def _count_words(characters: CharAutomaton, classes: _Classes, config: CtrlGConfig, words: int) -> TokenAutomaton:
    """The product with the counter of words, without unreachable and hopeless states, minimal."""
    count_C, states = len(classes.ends_C), len(characters.next_SA)
    counted = config.shape == "strict"
    levels = config.max_words - words + 1 if counted else 1
    enough_L = np.arange(levels) >= config.min_words - words if counted else np.ones(levels, dtype=bool)
    live = levels * states
    done, dead = live, live + 1
    began_SC = np.where(characters.after_space_S[:, None], classes.starts_C2[:, 1], classes.starts_C2[:, 0])
    base_SC = classes.next_CS.T
    next_FC = np.full((live + 2, count_C), dead, dtype=np.int32)
    next_FC[done] = done
    accepts_SC = (base_SC != DEAD) & characters.accepts_S[base_SC] & classes.ends_C
    for level in range(levels):
        reached_SC = level + (began_SC if counted else 0 * began_SC)
        fits_SC = (base_SC != DEAD) & (reached_SC < levels)
        goes_SC = np.where(fits_SC & ~classes.ends_C, reached_SC * states + base_SC, dead)
        ends_SC = accepts_SC & fits_SC & enough_L[np.minimum(reached_SC, levels - 1)]
        next_FC[level * states : (level + 1) * states] = np.where(ends_SC, done, goes_SC)
    need_F = _distances(next_FC, done)
    keep_F = _reachable(next_FC) & (need_F < NEVER)
    keep_F[[0, done, dead]] = True
    kept = np.flatnonzero(keep_F)
    renumber = np.full(live + 2, len(kept) - 1, dtype=np.int32)
    renumber[kept] = np.arange(len(kept))
    next_FC, need_F = renumber[next_FC[kept]], need_F[kept]
    label_F = np.zeros(len(kept), dtype=np.int64)
    label_F[-2:] = 1, 2
    group_F = refine(next_FC, label_F)
    first = np.sort(np.unique(group_F, return_index=True)[1])  # in order: the start, …, done, dead
    order = np.empty(len(first), dtype=np.int32)
    order[group_F[first]] = np.arange(len(first))
    return TokenAutomaton(order[group_F[next_FC[first]]], classes.class_V, need_F[first], classes.glued_C, 0)


def _distances(next_FC: NDArray[np.int32], done: int) -> NDArray[np.int32]:
    need_F = np.full(len(next_FC), NEVER, dtype=np.int32)
    need_F[done] = 0
    while True:
        shorter_F = np.minimum(need_F, need_F[next_FC].min(axis=1) + 1)
        if (shorter_F == need_F).all():
            return np.minimum(need_F, NEVER)
        need_F = shorter_F


def _reachable(next_FC: NDArray[np.int32]) -> NDArray[np.bool_]:
    reached_F = np.zeros(len(next_FC), dtype=bool)
    frontier = np.array([0])
    while len(frontier):
        reached_F[frontier] = True
        following = np.unique(next_FC[frontier])
        frontier = following[~reached_F[following]]
    return reached_F


def _check_words(characters: CharAutomaton, config: CtrlGConfig, words: int) -> None:
    """Raises UserError if no sentence has as few words as max_words."""
    if config.shape != "strict":
        return
    # Fewest word starts from each state to acceptance: a word starts on a character after a space.
    weight_S = characters.after_space_S.astype(np.int64)
    need_S = np.where(characters.accepts_S, 0, NEVER)
    space = 0
    while True:
        target = np.where(characters.next_SA == DEAD, NEVER, need_S[characters.next_SA])
        target[:, space + 1 :] += weight_S[:, None]
        shorter = np.minimum(need_S, target.min(axis=1))
        if (shorter == need_S).all():
            break
        need_S = shorter
    fewest = words + int(need_S[0])
    if config.max_words < fewest:
        raise UserError(
            f"max-words {config.max_words} is too few: a sentence that begins with its {words} words and meets the "
            f"constraint has at least {fewest}; use {fewest} or more"
        )
