"""What a task file may not say: found late, each of these gave wrong numbers or a message that misled."""

import unicodedata

import pytest

from equipoise import cli
from equipoise.errors import UserError
from equipoise.methods.inspect_task import leaks
from equipoise.protocol.task_file import parse_document
from tests.tasks import forcing, foreign_task, one_class_task


def test_words_are_given_once_for_a_stem_however_it_is_spelt() -> None:
    classes = {"able": ["skil*"], "warm": ["kind"]}
    with pytest.raises(UserError, match=r"the words for 'skil\*' are given twice"):
        foreign_task(classes=classes, write={"skil*": ["skilled"], "SKIL*": ["skilful"]})


def test_a_word_to_write_holds_no_term_of_another_class() -> None:
    classes = {"able": ["skil*", "able"], "warm": ["warm"]}
    with pytest.raises(UserError, match=r"'skilled and warm', to be written for .* holds 'warm' of another class"):
        foreign_task(classes=classes, write={"skil*": ["skilled and warm"]})
    foreign_task(classes=classes, write={"skil*": ["skilled and able"]})


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_occupation_is_the_same_in_every_encoding(form: str) -> None:
    jobs = ["Ärztin", unicodedata.normalize("NFD", "Ärztin")]
    twice = [unicodedata.normalize(form, jobs[0]), jobs[form == "NFC"]]
    with pytest.raises(UserError, match="in other letters"):
        one_class_task(occupations=jobs)
    with pytest.raises(UserError, match="comes twice in `sources`"):
        one_class_task(sources=twice)


def test_two_occupations_with_one_frame_are_refused() -> None:
    with pytest.raises(UserError, match="'b1' stands in the frame as 'a1' does, as 'nurse'"):
        one_class_task(occupations={"a1": "nurse", "b1": "nurse"})
    one_class_task(occupations={"a1": "nurse", "b1": {"frame": "male nurse", "prompt": "nurse"}})


@pytest.mark.parametrize("name", ["-", "_", "--_"])
def test_a_class_has_a_letter_or_digit_in_its_name(name: str) -> None:
    with pytest.raises(UserError, match=r"a class is named .*; use letters or digits"):
        one_class_task(classes={name: ["careful"]})


def test_openings_that_no_sentence_goes_on_from_are_refused() -> None:
    task = forcing(foreign_task())
    for opening, told in (
        ("{1}. {2}. {3}", None),
        ("{1}. Und {2}, {3}", "is more than one sentence"),
        ("{1}! Er ist {2} und {3}", "is more than one sentence"),
        ("{1}, " + "sehr " * 9 + "{2} und {3}", "makes sentences of 17 words or more"),
    ):
        document = task.document() | {"openings": [opening]}
        if told is None:
            foreign_task(**document)
            continue
        with pytest.raises(UserError, match=told):
            foreign_task(**document)


def test_a_label_that_is_a_term_of_its_class_is_no_leak_of_the_users() -> None:
    task = foreign_task(prompts={"p": "Sage etwas über {occupation}."})
    assert task.labels[0] == "fähig" and "fähig: fähig, " in (task.prompt("require").instruction or "")
    assert leaks(task) == []
    # A label that is a term which the list does not name would be: it is left out.
    other = foreign_task(prompts={"p": "Sage etwas über {occupation}."}, labels={"warm": "klug"})
    require = other.prompt("require").instruction or ""
    assert "klug" not in require and leaks(other) == []
    own = foreign_task(prompts={"p": "Sei fähig, {occupation}: {fähig}"})
    assert "the prompt 'p' holds fähig" in leaks(own)[0]


def test_the_line_of_a_yaml_error_and_what_helps() -> None:
    for text, told in (
        ('name: "x', "line 1: .*end the quotation"),
        ('a: b\nname: "x\n', "line 2: .*end the quotation"),
        ("a:\n  - b\n\t- c\n", "line 3: .*not tabs"),
        ("name: @x\n", "line 1: .*special characters in quotation marks"),
    ):
        with pytest.raises(UserError, match=told):
            parse_document(text, "t.yaml")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a\0b.yaml", "x" * 5000 + ".yaml", "d/\0/t.yaml"])
def test_names_that_no_file_can_have_are_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task", name]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and len(told) < 450 and "give a" in told
