"""The automaton over characters, and the same over bytes, say what the protocol says of every text."""

import dataclasses
import itertools
import random
import string
import unicodedata
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.methods.ctrlg.automaton import DEAD, CharAutomaton, build
from equipoise.methods.ctrlg.characters import may_be_written
from equipoise.methods.ctrlg.constraint import Constraint
from equipoise.methods.ctrlg.utf8 import ByteAutomaton, on_bytes
from equipoise.protocol.task import PROTOCOL
from tests.methods.ctrlg.oracle import accepts, constraint, never_written

AGENTIC, COMMUNAL = (each.terms for each in PROTOCOL.classes)
NURSE, INDEPENDENT, OPEN = "The nurse was", "The independent contractor was", "La cheffe était semi-"
PREFIXES = (NURSE, INDEPENDENT, OPEN)
DEMANDS = {
    "both": constraint(AGENTIC, COMMUNAL),
    "any": constraint(AGENTIC + COMMUNAL),
    "free": constraint(AGENTIC, COMMUNAL, strict=False),
    # Terms that begin, end and contain one another, with hyphens, spaces and digits.
    "tricky": constraint(("self", "self-made", "made", "hard working", "a1"), ("made-up", "working class", "up", "s")),
    "stems": constraint(("skil*", "self-skil*"), ("nurtur*", "friendl*", "kin"), ("bold",), abbreviations=("z.B", "p")),
    "letters": constraint(("groß", "ist", "kühn"), ("ffi*", "ǳ", "σοφός", "α*"), ("ωραίᾳ*", "x", "ωι", "e\u0316")),
}

PIECES = {
    "both": [*AGENTIC, *COMMUNAL, "Self-Reliant", "BOLD", "self", "self-", "un", "ly", "Dr", "Mrs", "Prof"],
    "tricky": ["self", "made", "hard", "working", "class", "up", "a1", "s", "Up", "MADE", "ﬀ", "ſelf"],
    "stems": ["skil", "SKILled", "nurtur", "nurturing", "un", "self", "friendl", "kin", "s", "bold", "z.B", "p", "Z"],
    "letters": [
        "groß", "GROSS", "gros", "GROẞ", "s", "ﬁst", "ist", "İst", "ist", "kühn", "KÜHN", "kuhn", "ﬃ", "FFI", "f", "ﬀ",
        "i", "ǲ", "Ǳ", "σοφόσ", "ΣΟΦΌΣ", "σοφός", "ωραίᾳ", "ΩΡΑΊΑΙ", "ωραία", "ᾼ", "ᾳ", "ῳ", "α", "ῷ", "e", "İ",
        "x", "ẖ", "ŉ", "ǰ",
    ],
}  # fmt: skip
PIECES |= {"any": PIECES["both"], "free": PIECES["both"]}
COMMON = [
    " ", " ", " ", " ", ".", "!", ". ", "?", '"', "'", "“", "”", "‘", "’", "(", ")", "[", "]", ",", "-", "‑", "－", "—",
    "\u00a0", "\u202f", "\u2009", "\u3000", "\u00ad", "\ufeff", "\u2060", "\u200b", "\n", "\r\n", "\u2028", "\x85",
    "\x1c", "\x1f", "\t", "_", "9", "٣", "²", "A", "a", "É", "é", "ǅ", "Ⓐ", "𝐀", "字", "😀",
    "\u0334", "\u0316", "\u0316", "\u20dd", "\u0301",
    "\u1160", "한", "हि",
    "The", "she", "U.S.", "Dr.", "J.", "n't",
]  # fmt: skip


@cache
def built(name: str) -> CharAutomaton:
    return build(DEMANDS[name], PREFIXES)


@cache
def over_bytes(name: str) -> ByteAutomaton:
    return on_bytes(built(name))


def texts(name: str) -> st.SearchStrategy[str]:
    anything = st.text(st.characters(codec="utf-8"), max_size=2)
    ascii_text = st.text(string.ascii_letters + string.digits + string.punctuation + " ", max_size=3)
    part = st.one_of(st.sampled_from(PIECES[name]), st.sampled_from(COMMON), ascii_text, anything)
    tail = st.sampled_from(["", ".", "!", "?", ". ", ".\n", '."', ".\u00a0\n "])
    return st.tuples(st.sampled_from(["", " "]), st.lists(part, max_size=9), tail).map(
        lambda x: x[0] + "".join(x[1]) + x[2]
    )


def run_bytes(automaton: CharAutomaton, bytewise: ByteAutomaton, prefix: str, text: bytes) -> tuple[bool, int]:
    """Whether it is accepted, and the words that began."""
    state, words = automaton.starts[prefix], 0
    for byte in text:
        words += int(bytewise.begins_B256[state, byte])
        state = int(bytewise.next_B256[state, byte])
        if state == DEAD:
            return False, words
    return state < bytewise.whole and bool(automaton.accepts_S[state]), words


@pytest.mark.parametrize("name", DEMANDS)
def test_it_accepts_exactly_what_the_matcher_and_the_sentence_rule_accept(name: str) -> None:
    demand, automaton, bytewise = DEMANDS[name], built(name), over_bytes(name)

    @settings(max_examples=500, deadline=None)
    @given(prefix=st.sampled_from(PREFIXES), text=texts(name))
    def check(prefix: str, text: str) -> None:
        expected = not never_written(text) and accepts(demand, prefix + text, words=False)
        assert automaton.run(prefix, text) == expected
        got, words = run_bytes(automaton, bytewise, prefix, text.encode())
        assert got == expected
        if expected and demand.strict:
            assert len(prefix.split()) + words == len((prefix + text).split())

    check()


ALPHABET = "aBßẞ üÜ“”‘\u00a0\u00ad\n\"'.-"


@pytest.mark.parametrize("strict", [True, False])
def test_every_short_text_of_an_alphabet_with_all_that_is_special(strict: bool) -> None:
    demand = constraint(("ass", "ü", "a"), ("b", "ssb*", "a-b"), strict=strict)
    prefixes = ("A", "A b")
    automaton = build(demand, prefixes)
    bytewise = on_bytes(automaton)
    accepted = 0
    for length in range(5):
        for letters in itertools.product(ALPHABET, repeat=length):
            text = "".join(letters)
            for prefix in prefixes if length < 4 else prefixes[1:]:
                expected = accepts(demand, prefix + text, words=False)
                assert automaton.run(prefix, text) == expected, (prefix, text)
                accepted += expected
                if length < 4:
                    assert run_bytes(automaton, bytewise, prefix, text.encode())[0] == expected
    assert accepted > 150


@pytest.mark.parametrize(
    ("continuation", "accepted"),
    [
        (" bold and caring.", True),
        (" Bold and CARING!", True),
        (" self-reliant, loyal?", True),
        (" self-bold and over-caring.", True),  # a hyphen is a boundary
        (" 'bold' (caring).", True),
        (" boldly caring.", False),
        (" unbold caring.", False),
        (" bold_ caring.", False),
        (" bold2 caring.", False),
        (" self reliant and caring.", False),
        (" self--reliant and caring.", False),
        (" bold and unhelpful.", False),
        (" bold. She was caring.", False),  # two sentences
        (" bold. she was caring.", True),
        (' bold." (She was caring.', False),
        (" bold.” “She was caring.", False),
        (" bold.” “she was caring.", True),
        (" bold.\u00a0She was caring.", False),
        (" bold.\u00ad She was caring.", True),  # the sentence rule sees the soft hyphen
        (" bold. Élodie was caring.", False),
        (" bold.She was caring.", True),
        (" bold, Dr. Lee caring.", True),
        (" bold, J. Lee caring.", True),
        (" bold, É. Lee caring.", False),  # initials are of the Latin alphabet's 26
        (" bold, Dra. Lee caring.", False),
        (" bold and caring", False),
        (" bold and caring. ", True),  # it is stripped
        (" bold and caring.\n\n", True),
        (" bold and caring.\u00a0\u2028", True),
        (" bold and caring.\n.", False),
        (' bold and caring."', False),
        (" bold and caring.”", False),
        (" bold and caring...", True),
        ("bold and caring.", False),  # glued to "was", where no word begins
        (", bold and caring.", True),
        ("n't bold, caring.", True),
        ("", False),
        (" bold\u00a0and caring.", True),
        (" self\u2011reliant and car\u00ading.", True),
        (" self\u2013reliant and caring.", False),
        (" bold and\tcaring.", True),
        (" bold and\ncaring.", False),
        (" bold\u3000caring。", False),
        (" “bold” and caring — very.", True),
        (" bold et caring à Zürich.", True),
        (" bold et caring a\u0300 Zürich.", False),  # never written: joins with the letter before
    ],
)
def test_worked_examples(continuation: str, accepted: bool) -> None:
    assert built("both").run(NURSE, continuation) is accepted


def test_a_term_ends_between_characters_however_an_accent_sits_in_them() -> None:
    letters = built("letters")
    rest = " ist x"
    assert letters.run(NURSE, f"{rest} ᾳ.") and letters.run(NURSE, f"{rest} αι.")
    assert not letters.run(NURSE, f"{rest} ᾳ\u0316."), "the accent stands on the alpha"
    assert letters.run(NURSE, f"{rest} αι\u0316.") and letters.run(NURSE, f"{rest} ᾳ\u20dd.")
    assert letters.run(NURSE, " ffi x groß.") and not letters.run(NURSE, " ffi x groß\u0316.")
    for text in (f"{rest} ᾳ.", f"{rest} ᾳ\u0316.", f"{rest} αι\u0316.", f"{rest} ᾳ\u20dd.", " ffi x groß\u0316."):
        assert letters.run(NURSE, text) == accepts(DEMANDS["letters"], NURSE + text, words=False)


def test_a_term_of_the_prefix_counts() -> None:
    both = built("both")
    assert both.run(INDEPENDENT, " caring.") and not both.run(NURSE, " caring.")
    assert built("stems").run(OPEN, "skilled, nurturing, bold.")
    assert not built("stems").run(NURSE, "skilled, nurturing, bold.")


def test_what_never_is_written_is_what_form_c_may_change_and_no_more() -> None:
    everything = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    chance = random.Random(0)
    for character in chance.sample(everything[:0x30000], 4000) + [chr(i) for i in range(0x300, 0x370)]:
        assert may_be_written(character) == (not never_written(character)), hex(ord(character))
    assert sum(not may_be_written(c) for c in everything) == 1231


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_a_text_without_such_characters_is_matched_as_form_c_is(before: str, text: str) -> None:
    # Form C may still put accents in another order, which no term can tell.
    if may_be_written(text):
        before = unicodedata.normalize("NFC", before)
        assert sorted(unicodedata.normalize("NFC", before + text)) == sorted(before + text)


def test_all_of_utf_8_and_nothing_else_is_read() -> None:
    automaton, bytewise = built("both"), over_bytes("both")
    start = automaton.starts[NURSE]
    chance = random.Random(1)
    for code in [
        *range(0x3000),
        *chance.sample(range(0x3000, 0x110000), 3000),
        0xD7FF,
        0xE000,
        0xFFFF,
        0x10000,
        0x10FFFF,
    ]:
        if 0xD800 <= code < 0xE000:
            continue
        state = start
        for byte in chr(code).encode():
            state = int(bytewise.next_B256[state, byte]) if state != DEAD else DEAD
        assert state == automaton.next_SK[start, automaton.kind_N[code]]
    for bad in (b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\x80",
                b"\xf0\x80\x80\x80", b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xff", b"\xc3a",
                b"\xe2\x80a", b"\xf0\x9f\x98 ", b"\xc3\xc3"):  # fmt: skip
        state = start
        for byte in bad:
            state = int(bytewise.next_B256[state, byte]) if state != DEAD else DEAD
        assert state == DEAD, bad


def apart(automaton: CharAutomaton) -> int:
    """States that some text tells apart from every other, counted with a table filling of its own."""
    states, kinds = automaton.next_SK.shape
    different = np.zeros((states, states), dtype=bool)
    for a, b in itertools.product(range(states), repeat=2):
        different[a, b] = automaton.accepts_S[a] != automaton.accepts_S[b] or any(
            (x == DEAD) != (y == DEAD) or (x != DEAD and i != j)
            for x, y, i, j in zip(
                automaton.next_SK[a], automaton.next_SK[b], automaton.begins_SK[a], automaton.begins_SK[b], strict=True
            )
        )
    while True:
        more = different.copy()
        for a, b in itertools.product(range(states), repeat=2):
            more[a, b] |= any(
                different[automaton.next_SK[a, k], automaton.next_SK[b, k]]
                for k in range(kinds)
                if automaton.next_SK[a, k] != DEAD and automaton.next_SK[b, k] != DEAD
            )
        if (more == different).all():
            return int((different.sum(1) == states - 1).sum())
        different = more


def test_it_is_minimal() -> None:
    small = build(constraint(("ab",), strict=False), ("x",))
    assert apart(small) == len(small.next_SK)
    strict = build(constraint(("a",), abbreviations=("b",)), ("x",))
    assert apart(strict) == len(strict.next_SK)
    assert len(np.unique(np.concatenate([strict.next_SK, strict.begins_SK]), axis=1).T) == strict.next_SK.shape[1]


def test_the_usual_states_are_those_that_text_without_oddities_leads_to() -> None:
    automaton = built("both")
    usual = automaton.stand_in_S == np.arange(len(automaton.stand_in_S))
    state = automaton.starts[NURSE]
    for character in " bold, “caring” — É. Lee’s\u00a0n. She":
        following = int(automaton.next_SK[state, automaton.kind_N[ord(character)]])
        if following == DEAD:
            break
        assert usual[following], character
        state = following
    assert usual[automaton.stand_in_S].all() and not usual.all()


def test_what_cannot_be_written_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="form C"):
        build(constraint(("ẋ̣a",), ("b",)), (NURSE,))
    build(constraint(("ẋ̣a", "a"), ("b",)), (NURSE,))
    with pytest.raises(UserError, match="quotation mark"):
        build(constraint(("a",)), ("“The nurse was",))
    with pytest.raises(UserError, match=r"'The nurse\. She was', which is more than one"):
        build(constraint(("a",)), (NURSE, "The nurse. She was"))
    with pytest.raises(UserError, match=r"'The nurse\\nwas'"):
        build(constraint(("a",)), ("The nurse\nwas",))
    build(constraint(("a",), strict=False), ("The nurse. She was",))


def test_a_constraint_is_a_value() -> None:
    one: Constraint = constraint(("a",))
    assert one == constraint(["a"]) and hash(one) == hash(constraint(("a",)))
    assert one != dataclasses.replace(one, strict=False)
