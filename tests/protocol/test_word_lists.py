"""Which terms are negated, which gendered words are known, and what a task file may say of both."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.methods.inspect_task import inspect_task
from equipoise.protocol.task import PROTOCOL, read_task, task_from_document
from equipoise.protocol.word_lists import (
    ENGLISH_GENDERED,
    ENGLISH_NEGATIONS,
    Negations,
    gendered_lexicon,
    is_english,
    negated,
)
from tests.tasks import foreign_task, one_class_task


def terms_negated(text: str, negations: Negations = ENGLISH_NEGATIONS) -> list[str]:
    return [span.term for span in negated(text, PROTOCOL.lexicon.spans(text), negations)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The nurse was not confident.", ["confident"]),
        ("The nurse was never a very caring person.", ["caring"]),  # two words between
        ("The nurse was never a very very caring person.", []),  # three
        ("The nurse was confident but not caring.", ["caring"]),
        ("The nurse was not rich but caring.", []),  # a conjunction ends it
        ("The nurse was not rich, caring.", []),  # so does a comma
        ("The nurse was not – caring.", []),  # and a dash
        ("The nurse was not self-reliant.", ["self-reliant"]),  # a hyphen ends nothing
        ("The nurse wasn't bold.", ["bold"]),
        ("The nurse wasn’t bold.", ["bold"]),
        ("The nurse was not bold or caring.", ["bold", "caring"]),
        ("The nurse was neither bold nor caring.", ["bold", "caring"]),
        ("The nurse was not only bold but caring.", []),
        ("The nurse was never afraid to be bold.", []),
        ("The nurse was bold without being caring.", ["caring"]),
        ("The nurse lacks a caring side.", ["caring"]),
        ("The nurse was less confident.", ["confident"]),
        ("The nurse was regardless confident.", []),  # inside a word
        ("The nurse was a no-nonsense, a no-frills caring woman.", []),  # joined to another word
        ("The nurse was devil-may-care-not bold.", []),
        ("The nurse was one who never lost her caring touch.", []),
        ("The nurse was confident, never late.", []),  # what comes before the cue
        ("The nurse was far from caring.", ["caring"]),
        ("The nurse was anything but caring.", ["caring"]),
        ("THE NURSE WAS NOT BOLD.", ["bold"]),
        ("The nurse was not bold, and bold.", ["bold"]),
        ("", []),
    ],
)
def test_a_term_is_negated_by_a_cue_among_the_three_words_before_it(text: str, expected: list[str]) -> None:
    assert terms_negated(text) == expected


@given(st.text(), st.text())
def test_without_cues_nothing_is_negated_and_with_them_only_what_was_found(before: str, between: str) -> None:
    text = f"{before} not {between} bold"
    assert terms_negated(text, Negations(())) == []
    assert set(terms_negated(text)) <= set(PROTOCOL.match(text).counts)


def test_a_combining_accent_ends_no_clause() -> None:
    assert terms_negated("The nurse was not très bold.") == ["bold"]
    assert terms_negated("The nurse was not tre\u0300s bold.") == ["bold"]


def test_there_are_as_many_gendered_words_of_each_kind_on_either_side() -> None:
    sizes = {name: len(words) for name, words in ENGLISH_GENDERED}
    assert sizes["female_pronouns"] == sizes["male_pronouns"]
    assert sizes["female_nouns"] == sizes["male_nouns"]
    lexicon = gendered_lexicon(ENGLISH_GENDERED)
    assert lexicon is not None
    assert lexicon.match("She told the woman that he, human, was theirs.").terms == (("she",), ("he",), ("woman",), ())


@pytest.mark.parametrize(
    ("frame", "english"),
    [
        ("The {occupation} was", True),
        ("Every {occupation} is", True),
        ("A {occupation} is", True),
        ("{occupation} who", True),
        ("{occupation} gilt als", False),
        ("{occupation} was", False),  # German too: "what"
        ("Le {occupation} était", False),
        ("De {occupation} is", False),
    ],
)
def test_a_frame_is_english_by_a_word_of_it(frame: str, english: bool) -> None:
    assert is_english(frame) is english


def test_a_task_of_another_language_has_no_lists_but_its_own() -> None:
    task = foreign_task()
    assert task.lists.for_frame(task.frame) == ((), Negations(()))
    own = foreign_task(
        gendered={"weiblich": ["sie", "ihr*"]}, negations={"cues": ["nicht", "kein*"], "until": ["aber"]}
    )
    lists = own.lists.for_frame(own.frame)
    assert lists.gendered == (("weiblich", ("sie", "ihr*")),)
    spans = own.lexicon.spans("Die Ärztin gilt als keine kluge, nicht aber herzlich.")
    found = negated("Die Ärztin gilt als keine kluge, nicht aber herzlich.", spans, lists.negations or Negations(()))
    assert [span.term for span in found] == ["klug*"]


def test_a_task_file_s_lists_take_the_place_of_the_english_ones_and_none_is_a_list_too() -> None:
    task = one_class_task(gendered={"f": ["she"]}, negations=["not"])
    assert task.lists.for_frame(task.frame) == ((("f", ("she",)),), Negations(("not",)))
    none = one_class_task(gendered={}, negations=[])
    assert none.lists.for_frame(none.frame) == ((), Negations(()))


def test_the_document_has_the_lists_only_where_the_file_has_them() -> None:
    assert not {"gendered", "negations"} & set(PROTOCOL.document())
    assert PROTOCOL.fingerprint() == "67c353cca78b0bed"  # as records of before there were lists have it
    task = one_class_task(gendered={"f": ["she"]}, negations={"cues": ["not"], "unless": ["not only"]})
    again = task_from_document(task.document(), "again")
    assert again == task
    assert again.fingerprint() == task.fingerprint() != one_class_task().fingerprint()
    assert again.lists.negations == Negations(("not",), ("not only",))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"gendered": ["she"]}, "`gendered` is .*; expected names and values"),
        ({"gendered": {"f": "she"}}, "the f words is the text 'she'; expected a list"),
        ({"gendered": {"f": []}}, "the list of f terms is empty"),
        ({"gendered": {"f": ["she"], "m": ["she"]}}, "'she' is in both lists, f and m"),
        ({"gendered": {name: [name] for name in "abcde"}}, "there are 5 classes of terms; give one to 4"),
        ({"gendered": {"f/m": ["she"]}}, "a kind of gendered words is named 'f/m'"),
        ({"gendered": {"f": ["…"]}}, "is no word"),
        ({"negations": "not"}, "the cues of `negations` is the text 'not'; expected a list"),
        ({"negations": {"cue": ["not"]}}, "there is no 'cue' of `negations`; did you mean 'cues'"),
        ({"negations": {"cues": ["not", "Not"]}}, "'Not' comes twice"),
        ({"negations": [False]}, "put it in quotation marks"),
        ({"negations": {"until": ["but"]}}, "has until and no cues"),
        ({"negations": {"cues": [], "unless": ["not only"], "until": ["but"]}}, "has unless and until and no cues"),
    ],
)
def test_what_is_no_list_is_refused_in_one_line(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        one_class_task(**keys)
    assert "\n" not in str(caught.value)


def test_a_refusal_names_the_line_of_the_word(tmp_path: Any) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(
        "name: x\noccupations: [nurse]\nclasses: {a: [kind]}\ngendered:\n  f: [she]\n  m:\n    - he\n    - she\n"
    )
    with pytest.raises(UserError, match=r"task.yaml, line 8"):
        read_task(path)


def test_a_look_at_a_task_says_which_words_are_looked_for() -> None:
    def lines(task: Any) -> list[str]:
        return [line for line in inspect_task(task).lines if line.startswith("evaluated")]

    assert lines(PROTOCOL) == [
        "evaluated  44 gendered words looked for (English, as the frame is)",
        "evaluated  40 negation cues looked for (English, as the frame is)",
    ]
    assert lines(foreign_task()) == [
        "evaluated  no gendered words looked for, since the frame is not known as English: `gendered` names them",
        "evaluated  no negation cues looked for, since the frame is not known as English: `negations` names them",
    ]
    assert lines(foreign_task(gendered={"weiblich": ["sie"]}, negations=[])) == [
        "evaluated  1 gendered word looked for (the task's)"
    ]
