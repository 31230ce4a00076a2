"""The character automaton says what the protocol's matcher and its sentence rule say, on any printable ASCII."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.methods.ctrlg.automaton import CharAutomaton, build
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.protocol.lexicon import AGENTIC, COMMUNAL, LEXICON, Lexicon
from equipoise.protocol.prompts import is_complete_sentence

STRICT = build(CtrlGConfig(), LEXICON)
ANY = build(CtrlGConfig(terms="any"), LEXICON)
FREE = build(CtrlGConfig(shape="free"), LEXICON)
# Terms that begin, end and contain one another, with hyphens, spaces and digits.
TRICKY = Lexicon(
    agentic=("self", "self-made", "made", "hard working", "a1"), communal=("made-up", "working class", "up", "s")
)
TRICKY_STRICT = build(CtrlGConfig(), TRICKY)

PIECES = [*AGENTIC, *COMMUNAL, "Self-Reliant", "BOLD", "self", "self-", "un", "ly", "a", "The", "the", "X", "D", "Dr"]
PIECES += ["Mrs", "Prof", "St", "9", "_", "-", "'", '"', "(", ")", "[", "]", ",", ".", "!", "?", ". ", ' "', " ", " "]
TRICKY_PIECES = [
    "self",
    "made",
    "hard",
    "working",
    "class",
    "up",
    "a1",
    "s",
    "Up",
    "MADE",
    "-",
    " ",
    " ",
    ".",
    "'",
    "_",
]


def texts(pieces: list[str]) -> st.SearchStrategy[str]:
    ascii_text = st.text(string.ascii_letters + string.digits + string.punctuation + " ", max_size=3)
    parts = st.lists(st.one_of(st.sampled_from(pieces), ascii_text), max_size=9)
    return st.tuples(parts, st.sampled_from(["", ".", "!", "?", ". "])).map(lambda x: " " + "".join(x[0]) + x[1])


def expected(continuation: str, lexicon: Lexicon = LEXICON, terms: str = "both", shape: str = "strict") -> bool:
    text = "The nurse was" + continuation
    match = lexicon.match(text)
    found = match.both if terms == "both" else bool(match.counts)
    return found and not text.endswith(" ") and (shape == "free" or is_complete_sentence(text))


@settings(max_examples=600, deadline=None)
@given(texts(PIECES))
def test_it_accepts_exactly_what_the_matcher_and_the_sentence_rule_accept(continuation: str) -> None:
    assert STRICT.run(continuation) == expected(continuation)
    assert ANY.run(continuation) == expected(continuation, terms="any")
    assert FREE.run(continuation) == expected(continuation, shape="free")


@settings(max_examples=400, deadline=None)
@given(texts(TRICKY_PIECES))
def test_so_it_does_for_terms_that_overlap(continuation: str) -> None:
    assert TRICKY_STRICT.run(continuation) == expected(continuation, TRICKY)


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
        (" bold.She was caring.", True),
        (" bold, Dr. Lee caring.", True),
        (" bold, J. Lee caring.", True),
        (" bold, Dra. Lee caring.", False),
        (" bold and caring", False),
        (" bold and caring. ", False),
        (' bold and caring."', False),
        (" bold and caring...", True),
        ("bold and caring.", False),  # glued to "was"
        (", bold and caring.", False),
        ("", False),
        (" bold\u00a0and caring.", False),  # outside the alphabet
        (" bold and\tcaring.", False),
        (" bold and\ncaring.", False),
    ],
)
def test_worked_examples(continuation: str, accepted: bool) -> None:
    assert STRICT.run(continuation) is accepted


def reachable_pairs(automaton: CharAutomaton) -> int:
    """States that some text tells apart from every other, counted with a breadth-first table filling of its own."""
    states = range(len(automaton.next_SA))
    apart = {
        (a, b)
        for a in states
        for b in states
        if automaton.accepts_S[a] != automaton.accepts_S[b] or automaton.after_space_S[a] != automaton.after_space_S[b]
    }
    while True:
        more = {
            (a, b)
            for a in states
            for b in states
            if (a, b) not in apart
            and any(
                (x < 0) != (y < 0) or (x, y) in apart
                for x, y in zip(automaton.next_SA[a].tolist(), automaton.next_SA[b].tolist(), strict=True)
                if x != y
            )
        }
        if not more:
            break
        apart |= more
    return sum(all((a, b) in apart for b in states if b != a) for a in states)


def test_it_is_minimal() -> None:
    small = build(CtrlGConfig(terms="any"), Lexicon(agentic=("ab",), communal=("a-b",)))
    assert reachable_pairs(small) == len(small.next_SA)


def test_a_class_that_ascii_cannot_write_is_refused() -> None:
    with pytest.raises(UserError, match="ASCII"):
        build(CtrlGConfig(), Lexicon(agentic=("kühn",), communal=("loyal",)))
    build(CtrlGConfig(), Lexicon(agentic=("kühn", "bold"), communal=("loyal",)))
