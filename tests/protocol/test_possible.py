"""A task that no sentence can meet is refused before a model is looked for, by every command that would try."""

from pathlib import Path
from typing import Any

import pytest

from equipoise import cli
from equipoise.errors import UserError
from equipoise.protocol.task import PROTOCOL
from tests.tasks import one_class_task

NOWHERE = ["--model", "/nonexistent"]
COMMANDS = [
    ["task"],
    ["train", "--task", *NOWHERE],
    ["doctor", "--preset", "bundled-cpu", "--task"],
    ["study", "--methods", "ctrlg", *NOWHERE, "--task"],
    ["study", "--methods", "sft", *NOWHERE, "--task"],
    ["sample", "--method", "ctrlg", *NOWHERE, "--task"],
    ["sft", "--data", "forced", *NOWHERE, "--task"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words[:3]))
@pytest.mark.parametrize(
    ("words", "occupation", "told"),
    [("[100, 200]", "nurse", "97 words"), ("[8, 15]", '"Nurse. Doctor"', "is more than one sentence")],
)
def test_every_command_that_needs_strict_sentences_refuses_a_task_that_has_none(
    command: list[str], words: str, occupation: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "task.yaml"
    file.write_text(f"name: t\nwords: {words}\noccupations: [{occupation}]\nclasses: {{a: [bold]}}\n")
    argv = [*command, str(file)]
    if "train" in argv:
        argv = ["train", "--task", str(file), "--preset", "bundled-cpu", *NOWHERE]
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert told in printed.out + printed.err and "nonexistent" not in printed.err


def test_as_many_tokens_as_words_after_the_frame_are_the_least(capsys: pytest.CaptureFixture[str]) -> None:
    # "Every real estate agent is" has 5 words and "Every air traffic controller is" too: 15 words more for 20.
    task = one_class_task(words=[20, 30])
    task.check_new_tokens(15)
    with pytest.raises(UserError, match=r"at most 14 new tokens .*at least 15 words.*raise --max-new-tokens"):
        task.check_new_tokens(14)
    PROTOCOL.check_new_tokens(5)


def document(**changes: Any) -> Any:
    return one_class_task(**changes)


def test_the_line_is_the_occupations_where_the_frame_is_sound() -> None:
    with pytest.raises(UserError, match=r"'Every Dr\. Lee is' is more than one sentence"):
        document(occupations=["nurse", "Dr. Lee"], abbreviations=["Prof"])
    document(occupations=["nurse", "Dr. Lee"])  # an abbreviation of the default task
    with pytest.raises(UserError, match="quotation mark"):
        document(frame="{occupation} is", occupations=['"nurse"'])


def test_a_class_of_terms_that_all_end_a_sentence_is_refused_and_one_other_term_saves_it() -> None:
    with pytest.raises(UserError, match=r"every term of 'a' ends a sentence within, as 'Stop\. Go' does"):
        document(classes={"a": ["Stop. Go"]})
    assert document(classes={"a": ["Stop. Go", "careful"]}).lexicon.terms
    assert document(classes={"a": ["St. Go"]}, abbreviations=["St"]).lexicon.terms
