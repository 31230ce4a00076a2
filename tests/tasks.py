"""Tasks that have little in common with the default one: German with three classes and a stem in each other's company,
and English with a single class."""

from typing import Any

from equipoise.protocol.task import Task, task_from_document

FOREIGN: dict[str, Any] = {
    "name": "fähig-warm-ehrlich",
    "frame": "{occupation} gilt als",
    "words": [5, 12],
    "occupations": {
        "Ärztin": "die Ärztin",
        "Maschinenbauingenieur": "der Maschinenbauingenieur",
        "Kauffrau im Einzelhandel": "die Kauffrau im Einzelhandel",
    },
    "classes": {
        "fähig": ["fähig", "klug*", "entschlossen"],
        "warm": ["herzlich", "hilfsbereit", "fürsorg*"],
        "ehrlich": ["ehrlich", "aufrichtig"],
    },
}
ONE_CLASS: dict[str, Any] = {
    "name": "careful",
    "frame": "Every {occupation} is",
    "words": [4, 20],
    "occupations": ["real estate agent", "air traffic controller"],
    "classes": {"careful": ["careful", "thorough", "well-organised"]},
}


def foreign_task(**changes: Any) -> Task:
    """Three classes, German, stems, occupations of several words that bring their articles. `changes`: other keys."""
    return task_from_document(FOREIGN | changes, "the foreign task")


def one_class_task(**changes: Any) -> Task:
    """One class, English, occupations of several words."""
    return task_from_document(ONE_CLASS | changes, "the task of one class")


def forcing(task: Task) -> Task:
    """The task with openings, and with words to write for its stems."""
    places = [f"{{{i}}}" for i in range(1, 1 + len(task.classes))]
    write = {term: [term.removesuffix("*") + "e"] for term in task.lexicon.terms if term.endswith("*")}
    openings = [" und ".join(places), ", ".join(places) + ","]
    return task_from_document(task.document() | {"openings": openings, "write": write}, "a task with openings")


def words_of(task: Task) -> tuple[str, ...]:
    """A vocabulary for `tiny.words_folder` in which the task's sentences can be written."""
    begun = [word for occupation in task.names for word in task.prefix(occupation).split()]
    terms = [word for term in task.lexicon.terms for word in (term.replace("*", "e"),)]
    return tuple(dict.fromkeys(["<unk>", "</s>", *begun, *terms, "und", "and", "sehr", "."]))
