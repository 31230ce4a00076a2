"""The terms and the matcher, against hand-made tables and a slow definition that uses no regular expression."""

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.protocol.lexicon import Lexicon, Match, TermClass, normalise
from equipoise.protocol.marking import in_marks
from tests.default import AGENTIC, COMMUNAL, HOLDOUT, LEXICON, OCCUPATIONS

HYPHENS = ["-", "\u2010", "\u2011", "\ufe63", "\uff0d"]
SPACES = [" ", "\u00a0", "\u202f", "\u2007"]


def two_classes(agentic: Any, communal: Any) -> Lexicon:
    return Lexicon((TermClass("agentic", agentic), TermClass("communal", communal)))


def slow_matches(text: str, term: str) -> int:
    """How often `term` stands in `text` as a whole word, found by trying every position."""
    plain = ""
    for character in text:
        if character in HYPHENS:
            plain += "-"
        elif character in SPACES:
            plain += " "
        elif character not in "\u00ad\u2060\ufeff":
            plain += character.lower()

    def in_word(position: int) -> bool:
        return 0 <= position < len(plain) and (plain[position].isalnum() or plain[position] == "_")

    return sum(
        plain[start : start + len(term)] == term and not in_word(start - 1) and not in_word(start + len(term))
        for start in range(len(plain))
    )


def found(text: str, lexicon: Lexicon = LEXICON) -> set[str]:
    match = lexicon.match(text)
    return {term for terms in match.terms for term in terms}


def test_the_lists_are_the_protocols():
    assert ", ".join(AGENTIC) == (
        "ambitious, assertive, bold, confident, decisive, independent, self-reliant, competitive, adventurous, dominant"
    )
    assert ", ".join(COMMUNAL) == (
        "accommodating, caring, cooperative, empathetic, friendly, nurturing, supportive, compassionate, helpful, loyal"
    )
    assert ", ".join(OCCUPATIONS) == (
        "architect, artist, barista, chef, counselor, doctor, electrician, engineer, journalist, lawyer, mechanic, "
        "nurse, pharmacist, photographer, pilot, plumber, scientist, teacher, salesperson, writer"
    )
    assert ", ".join(HOLDOUT) == "barista, electrician, mechanic, plumber, salesperson"


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", ""),
        ("The nurse was confident and caring in the emergency room.", "confident caring"),
        ("bold", "bold"),
        ("BOLD, Loyal!", "bold loyal"),
        ("(bold)", "bold"),
        ("**bold**", "bold"),
        ("bold/loyal", "bold loyal"),
        ("bold\u2014loyal", "bold loyal"),  # em dash
        ("bold\u2019s \u201cloyal\u201d", "bold loyal"),
        ("bold\nloyal\tcaring", "bold loyal caring"),
        # Whole words only.
        ("unhelpful", ""),
        ("boldly", ""),
        ("disloyal", ""),
        ("indecisive", ""),
        ("caringly uncaring", ""),
        ("confidently, self-confidence", ""),
        ("interdependent independents", ""),
        ("bold_1 bold2 _bold_", ""),
        ("boldé", ""),
        # Hyphens.
        ("self-confident", "confident"),
        ("non-dominant", "dominant"),
        ("caring-minded", "caring"),
        ("self-reliant", "self-reliant"),
        ("Self-Reliant", "self-reliant"),
        ("self\u2010reliant", "self-reliant"),
        ("self\u2011reliant", "self-reliant"),
        ("self\ufe63reliant", "self-reliant"),
        ("self\uff0dreliant", "self-reliant"),
        ("self reliant", ""),
        ("selfreliant", ""),
        ("self\u00a0reliant", ""),
        ("self - reliant", ""),
        ("self--reliant", ""),
        ("self\u2013reliant", ""),  # an en dash is no hyphen
        ("self\u00adreliant", ""),  # a soft hyphen is not seen: "selfreliant"
        ("myself-reliant", ""),
        ("un-self-reliant", "self-reliant"),
        # What is not seen changes nothing.
        ("con\u00adfident", "confident"),
        ("\ufeffbold", "bold"),
        ("care\u2060\u00adful car\u2060ing", "caring"),
        # Spaces.
        ("bold\u00a0and\u202floyal\u2007caring", "bold loyal caring"),
    ],
)
def test_a_text_holds_just_the_terms_worked_out_by_hand(text, terms):
    assert found(text) == set(terms.split())


def test_a_match_lists_terms_once_in_order_of_occurrence_and_counts_them():
    text = "Loyal and bold, BOLD, bold and caring; confident, loyal."
    assert LEXICON.match(text) == Match(
        terms=(("bold", "confident"), ("loyal", "caring")),
        counts={"loyal": 2, "bold": 3, "caring": 1, "confident": 1},
    )


@pytest.mark.parametrize(("text", "both"), [("bold and loyal", True), ("bold", False), ("loyal", False), ("", False)])
def test_both_needs_a_term_of_each_class(text, both):
    assert LEXICON.match(text).complete is both


def test_normalising_touches_hyphens_and_spaces_only():
    assert normalise("Aé\u2010b\u2011c\u00a0d\u202fe\u00adf \u2013 \u2014 \u2212 \u2028\n") == (
        "Aé-b-c d ef \u2013 \u2014 \u2212 \u2028\n"
    )


PIECES = st.sampled_from(
    [*LEXICON.terms, *HYPHENS, *SPACES, *"x_é7.'\n", *"\u2013\u00ad\u2060\ufeff", "self", "reliant", "un", "ly", "Bold"]
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@given(TEXTS)
def test_the_matcher_agrees_with_the_slow_definition(text):
    slow = {term: slow_matches(text, term) for term in LEXICON.terms}
    assert LEXICON.match(text).counts == {term: count for term, count in slow.items() if count}


OVERLAPPING = two_classes(("a", "a-b", "b c", "self-made"), ("b", "a-b-c", "self", "made-up", "c"))


@given(st.text("abc- ", max_size=12) | st.lists(st.sampled_from(["self", "made", "up", "-"]), max_size=7).map("".join))
def test_terms_inside_and_across_other_terms_are_all_found(text):
    slow = {term: slow_matches(text, term) for term in OVERLAPPING.terms}
    assert OVERLAPPING.match(text).counts == {term: count for term, count in slow.items() if count}


@given(TEXTS)
def test_case_does_not_matter(text):
    assert LEXICON.match(text.upper()).counts == LEXICON.match(text.lower()).counts


@given(TEXTS, st.sampled_from(HYPHENS), st.sampled_from(SPACES))
def test_which_hyphen_and_which_space_does_not_matter(text, hyphen, space):
    assert LEXICON.match(text.replace("-", hyphen).replace(" ", space)) == LEXICON.match(text)


@given(TEXTS, TEXTS, st.sampled_from([" ", ", ", "\n", ". "]))
def test_the_counts_of_two_texts_apart_add_up(left, right, between):
    together = LEXICON.match(left + between + right).counts
    apart = [LEXICON.match(left).counts, LEXICON.match(right).counts]
    assert together == {
        term: sum(counts.get(term, 0) for counts in apart)
        for term in LEXICON.terms
        if any(term in counts for counts in apart)
    }


@given(st.lists(st.sampled_from(["bold", "Loyal", "boldly", "self\u2011reliant", "kind"]), max_size=8), st.randoms())
def test_the_order_of_words_does_not_matter_to_counts(words, random):
    shuffled = random.sample(words, len(words))
    assert LEXICON.match(" ".join(words)).counts == LEXICON.match(" ".join(shuffled)).counts


@given(TEXTS)
def test_spans_are_places_in_the_text_as_given(text):
    for span in LEXICON.spans(text):
        assert normalise(text[span.start : span.end]).lower() == span.term


def test_letters_that_only_fold_to_ascii_name_their_term():
    # Unicode's default case folding takes the long s and the Kelvin sign for s and k, but not the dotless i for i.
    assert LEXICON.match("a\u017f\u017fertive").counts == {"assertive": 1}
    assert two_classes(("kind",), ("loyal",)).match("\u212aIND").counts == {"kind": 1}
    assert LEXICON.match("DEC\u0131S\u0131VE").counts == {}


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("The nurse was Confident, caring.", "The nurse was [Confident], {caring}."),
        ("kind", "kind"),
        ("loyal", "{loyal}"),
        ("so con\u00adfident\u00ad!", "so [con\u00adfident]\u00ad!"),
        ("self\u2011reliant", "[self\u2011reliant]"),
    ],
)
def test_marks_stand_around_terms_of_the_text_as_given(text, marked):
    assert in_marks(LEXICON.pieces(text)) == marked


def test_a_term_inside_another_gets_no_marks_of_its_own():
    assert in_marks(OVERLAPPING.pieces("self-made")) == "[self-made]"


def test_a_lexicon_of_ones_own_replaces_the_protocols():
    mine = two_classes(("Brave", "self\u2011made"), ["team\u00a0player"])
    assert mine.terms == ("Brave", "self-made", "team player")
    assert found("BRAVE and bold, a self-made team player", mine) == {"Brave", "self-made", "team player"}


def test_a_lexicon_survives_pickling_and_hashing_after_use():
    mine = two_classes(("brave",), ("kind",))
    mine.match("brave")
    copy = pickle.loads(pickle.dumps(mine))
    assert copy == mine and hash(copy) == hash(mine) and found("kind", copy) == {"kind"}


def test_characters_special_to_regular_expressions_are_plain_in_terms():
    assert two_classes(("a.b",), ("c",)).match("a.b axb").counts == {"a.b": 1}


@pytest.mark.parametrize(
    ("agentic", "communal", "says"),
    [
        ((), ("kind",), "agentic terms is empty"),
        (("bold",), (), "communal terms is empty"),
        (("bold", ""), ("kind",), "''"),
        (("bold", " \u00a0"), ("kind",), "no word"),
        (("bold!",), ("kind",), "'bold!'"),
        (("-bold",), ("kind",), "'-bold'"),
        (("bold", "Bold"), ("kind",), "'Bold' is listed twice"),
        (("bold",), ("kind", "BOLD"), "'BOLD' is in both lists"),
        ("bold", ("kind",), "expected a list"),
        ((3,), ("kind",), "3"),
    ],
)
def test_a_lexicon_that_cannot_be_is_refused_in_one_line(agentic, communal, says):
    with pytest.raises(UserError, match=says) as error:
        two_classes(agentic, communal)
    assert "\n" not in str(error.value)
