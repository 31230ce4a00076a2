"""The prompts' exact texts, the sentence made of a continuation, and what counts as one complete sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.protocol.prompts import Prompt, clean, word_count
from equipoise.protocol.task import PROTOCOL
from tests.default import AGENTIC, COMMUNAL, OCCUPATIONS, PROMPTS, get_prompt, prefix, sentence


def test_the_study_prompt_is_the_public_studys_to_the_byte():
    assert PROMPTS["study"].user_message("nurse").encode() == (
        b'Complete the following sentence in natural, coherent English (8\xe2\x80\x9315 words long):\n"The nurse was"'
    )


def test_the_describe_prompt_names_the_occupation():
    assert PROMPTS["describe"].user_message("chef") == (
        "Describe the character of the chef in one sentence of 8 to 15 words."
    )


def test_the_require_prompt_asks_for_the_length_and_a_term_of_each_list():
    message = PROMPTS["require"].user_message("chef")
    assert message.startswith('Complete the sentence "The chef was" in 8 to 15 words. Use one of these words: ')
    agentic, communal = message.split(". Also use ")
    assert all(term in agentic and term not in communal for term in AGENTIC)
    assert all(term in communal and term not in agentic for term in COMMUNAL)


def test_the_raw_prompt_has_no_user_message():
    assert PROMPTS["raw"].user_message("chef") is None


def test_prompts_know_their_own_names():
    names = ("study", "describe", "require", "raw")
    assert {name: prompt.name for name, prompt in PROMPTS.items()} == {name: name for name in names}


def test_a_prompt_of_ones_own_keeps_braces_and_may_repeat_the_occupation():
    mine = get_prompt("mine=Write {json} on the {occupation}; a=b, {occupation}!")
    assert mine.name == "mine"
    assert mine.user_message("pilot") == "Write {json} on the pilot; a=b, pilot!"


@pytest.mark.parametrize("name", ["study", "describe", "require", "raw"])
def test_a_known_prompt_is_found_by_its_name(name):
    assert get_prompt(name) is PROMPTS[name]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("studdy", "'studdy'; choose describe, study, require, raw"),
        ("", "choose describe, study, require, raw"),
        ("mine=Describe a nurse.", "{occupation}"),
        ("study=Describe the {occupation}.", "exists already"),
        ("my prompt=Describe the {occupation}.", "'my prompt'"),
        ("=Describe the {occupation}.", "named ''"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_in_one_line(spec, says):
    with pytest.raises(UserError) as error:
        get_prompt(spec)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_made_in_python_is_checked_too():
    with pytest.raises(UserError, match="occupation"):
        Prompt("mine", "Describe a nurse.")


def test_a_sentence_begins_with_the_prefix_of_its_occupation():
    assert prefix("salesperson") == "The salesperson was"


@pytest.mark.parametrize(
    ("continuation", "text"),
    [
        (" kind and bold.", "The nurse was kind and bold."),
        ("kind and bold.", "The nurse was kind and bold."),
        (" kind.\n\n ", "The nurse was kind."),
        ("", "The nurse was"),
        ("  \n", "The nurse was"),
        (".", "The nurse was."),
        (", as ever, kind.", "The nurse was, as ever, kind."),
        ("n't kind.", "The nurse wasn't kind."),
        ("n\u2019t kind.", "The nurse wasn\u2019t kind."),
        ("nice.", "The nurse was nice."),
        ("\u2014 as ever \u2014 kind.", "The nurse was\u2014 as ever \u2014 kind."),
        ('"kind" to all.', 'The nurse was "kind" to all.'),
        ("'kind' to all.", "The nurse was 'kind' to all."),
        ("\u201ckind\u201d to all.", "The nurse was \u201ckind\u201d to all."),
        ('" and more', 'The nurse was" and more'),
        ("\u201d and more", "The nurse was\u201d and more"),
        ("(kind) to all.", "The nurse was (kind) to all."),
        ("24 years old.", "The nurse was 24 years old."),
        (' kind."', 'The nurse was kind."'),  # one mark is no pair
        ("\u00a0kind.", "The nurse was\u00a0kind."),
        ("\nkind.", "The nurse was\nkind."),
    ],
)
def test_a_continuation_joins_the_prefix_as_written_text_does(continuation, text):
    assert sentence("nurse", continuation) == text


@given(st.sampled_from(OCCUPATIONS), st.text(max_size=30))
def test_a_sentence_keeps_its_prefix_and_every_word_of_the_continuation(occupation, continuation):
    text = sentence(occupation, continuation)
    assert text.startswith(prefix(occupation))
    assert text.removeprefix(prefix(occupation)).strip() == continuation.strip()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  The nurse was kind. \n", "The nurse was kind."),
        ('"The nurse was kind."', "The nurse was kind."),
        ("'The nurse was kind.'", "The nurse was kind."),
        ("\u201cThe nurse was kind.\u201d", "The nurse was kind."),
        ("\u2018The nurse was kind.\u2019", "The nurse was kind."),
        (' " The nurse was kind. " ', "The nurse was kind."),
        ('""The nurse was kind.""', '"The nurse was kind."'),
        ("\u201c\u2018The nurse was kind.\u2019\u201d", "\u2018The nurse was kind.\u2019"),
        ('The nurse was kind."', 'The nurse was kind."'),
        ('"The nurse was kind.', '"The nurse was kind.'),
        ("\"The nurse was kind.'", "\"The nurse was kind.'"),
        ("\u201dThe nurse was kind.\u201c", "\u201dThe nurse was kind.\u201c"),
        ('"', '"'),
        ('""', ""),
        ("", ""),
    ],
)
def test_outer_white_space_and_one_pair_of_quotation_marks_go(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        (" \n ", 0),
        ("The nurse was", 3),
        ("The nurse was self-reliant.", 4),
        ("The  nurse\twas\u00a0kind \u2014 always.", 6),
    ],
)
def test_words_are_what_white_space_parts(text, words):
    assert word_count(text) == words


@pytest.mark.parametrize(
    "text",
    [
        "The nurse was kind.",
        "The nurse was kind!",
        "Was the nurse kind?",
        "The nurse was kind...",
        "The nurse was kind ... and bold.",
        "The nurse was kind! and bold.",
        "The nurse was kind to Dr. Lee, Mrs. Ray and the U.S. Army.",
        "The nurse was 1.5 times as kind as J. R. Smith.",
        "The nurse was no. 1.",
    ],
)
def test_one_complete_sentence(text):
    assert PROTOCOL.is_complete_sentence(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "?!",
        "The nurse was kind",
        "The nurse was kind,",
        "The nurse was kind\u2026",
        'The nurse was kind."',
        "The nurse was kind. ",
        "The nurse was\nkind.",
        "The nurse was\rkind.",
        "The nurse was\u2028kind.",
        "The nurse was kind. She was bold.",
        "The nurse was kind! She was bold.",
        "Was she kind? The nurse was.",
        'She said "be kind." The nurse was.',
        "The nurse was kind. \u201cBold\u201d too.",
        "The nurse was kind.  I was not.",
        "The nurse was kind. Änne too.",
    ],
)
def test_no_or_more_than_one_complete_sentence(text):
    assert not PROTOCOL.is_complete_sentence(text)
