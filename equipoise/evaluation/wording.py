"""What a task's classes, combinations and frame are called in the sentences and headings of a report."""

import re
from collections.abc import Iterable
from itertools import combinations

from equipoise.evaluation.results import Judge
from equipoise.evaluation.visible import visible
from equipoise.protocol.prompts import PLACE
from equipoise.protocol.task import Task

_UNTRAINED = frozenset(("prompt", "prompted", "base", "baseline", "untrained", "basemodel"))
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def spelt(number: int) -> str:
    """A small number as a word."""
    return _NUMBERS[number] if number < len(_NUMBERS) else f"{number:,}"


def listed(names: Iterable[str]) -> str:
    """ "a, b and c"."""
    *first, last = [visible(name) for name in names] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def capital(text: str) -> str:
    """With its first letter as a capital."""
    return text[:1].upper() + text[1:]


def pair(task: Task) -> str:
    """What a combination of a term of each class is called: "pair", with one class "term"."""
    return task.pair_noun.removesuffix("s")


def term_pairs(task: Task) -> str:
    """The same in the plural, as a heading says it: "term pairs", "term combinations", with one class "terms"."""
    return task.pair_noun if len(task.classes) == 1 else f"term {task.pair_noun}"


def event(task: Task, name: str) -> str:
    """What compliance is the share of: `both` or `strict`, in words."""
    if name == "strict":
        return "strict success"
    return "a term of the class" if len(task.classes) == 1 else f"{task.all_classes} of terms"


def constraint(task: Task) -> str:
    """What a sentence must hold: "terms of both classes", with one class "a term of the class"."""
    return f"{'a term' if len(task.classes) == 1 else 'terms'} of {task.all_classes}"


def untrained(names: Iterable[str]) -> list[str]:
    """Those of the methods that are called as the untrained, unfiltered model usually is."""
    plain = {name: re.sub(r"[\W_]", "", name).lower() for name in names}
    return [name for name, own in plain.items() if own in _UNTRAINED or own.startswith("promptonly")]


def judge_named(judge: Judge) -> str:
    """A judge's name, with where it is from where that says more."""
    return visible(judge.name) + (f" ({visible(judge.source)})" if judge.source != judge.name else "")


def strict(task: Task) -> str:
    """What strict success asks for."""
    return f"{constraint(task)}, {task.bounds}, one complete sentence"


def begun(task: Task, occupation: str) -> str:
    """The frame with `occupation` in it, as a description of every sentence's beginning: "The X was"."""
    return task.frame.replace(PLACE, occupation)


def outcomes(task: Task) -> dict[str, str]:
    """What a sentence that is no strict success can be, by its outcome in rows.csv, and how reports call it."""
    count = len(task.classes)
    every = {1: "a term", 2: "both"}.get(count, "all")
    out = {"both": f"{every}, not strict"}
    for size in range(1, count):
        for chosen in combinations(range(count), size):
            name = "+".join(task.lexicon.names[i] for i in chosen)
            out[name] = f"{listed(task.labels[i] for i in chosen)} only"
    out["neither"] = {1: "no term", 2: "neither"}.get(count, "none")
    return out
