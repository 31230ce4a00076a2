"""What each row's sentence holds, by the task's one matcher; equal texts are matched once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from equipoise.evaluation.language import Language, read_all
from equipoise.protocol.reward import Reward
from equipoise.protocol.task import Task
from equipoise.tables.layout import Row


class Found(NamedTuple):
    """What a text holds, wherever it stands."""

    reward: Reward
    outcome: str
    """`both` with every class, `neither` with none, else the names of the classes that are present, joined by "+"."""
    complete: bool
    """One complete sentence."""
    in_length: bool
    strict: bool
    repeated: bool
    """Any one term more than twice."""


@dataclass(frozen=True)
class Measured:
    row: Row
    found: Found
    duplicate: bool
    """An earlier row of the same method and occupation has this text. Empty texts are none."""
    language: Language


def measure(rows: Sequence[Row], task: Task) -> list[Measured]:
    """Every row measured, in order."""
    known: dict[str, Found] = {}
    read = read_all(task)
    seen: set[tuple[str, str, str]] = set()
    out = []
    for row in rows:
        text = row.measured
        if text not in known:
            known[text] = _find(text, task)
        key = (row.method, row.occupation, text)
        out.append(Measured(row, known[text], key in seen, read[text, row.occupation]))
        if text:
            seen.add(key)
    return out


def _find(text: str, task: Task) -> Found:
    reward = task.score(text)
    present = [name for name, terms in zip(reward.classes, reward.terms, strict=True) if terms]
    outcome = "both" if reward.complete else "+".join(present) or "neither"
    complete = task.is_complete_sentence(text)
    in_length = task.in_length(reward.words)
    strict = reward.complete and in_length and complete
    return Found(reward, outcome, complete, in_length, strict, reward.repetition_penalty < 0)
