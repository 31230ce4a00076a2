"""The model card says what is true of the task that was trained on, and nothing of the default one."""

from dataclasses import replace

import yaml

from equipoise.policy.card import ModelCard, render
from equipoise.protocol.task import PROTOCOL, Task, task_from_document
from tests.tasks import FOREIGN, foreign_task, one_class_task


def card(task: Task) -> str:
    return render(ModelCard(method="PPO", prompt="raw", task=task), None)


def test_the_example_word_is_a_term_of_the_task_and_gender_is_where_the_task_is_about_it() -> None:
    for task, term in ((foreign_task(), "fähig"), (one_class_task(), "careful")):
        text = card(task)
        assert "gender" not in text and "stereotype" not in text and "confident" not in text
        assert f'"{term}" counts as much' in text
    assert '"ambitious" counts as much' in card(PROTOCOL) and "gender-stereotypes" in card(PROTOCOL)


def test_a_copy_of_the_default_task_with_other_terms_is_no_study_of_gender() -> None:
    # `equipoise task --new` writes the default task's file, whose name a user may well leave as it is.
    copied = task_from_document(FOREIGN | {"name": PROTOCOL.name}, "mine.yaml")
    matter = yaml.safe_load(card(copied).split("---\n")[1])
    assert "gender-stereotypes" not in matter["tags"] and "language" not in matter
    renamed = yaml.safe_load(card(replace(PROTOCOL, name="mine")).split("---\n")[1])
    assert "gender-stereotypes" in renamed["tags"] and renamed["language"] == "en"


def test_a_task_of_stems_alone_has_an_example_too() -> None:
    stems = foreign_task(classes={"fähig": ["klug*"]})
    assert '"klug…" counts as much' in card(stems)
    assert '"kluge" counts as much' in card(foreign_task(classes={"fähig": ["klug*"]}, write={"klug*": ["kluge"]}))
