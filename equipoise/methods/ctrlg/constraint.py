"""What is demanded of a sentence, as one value that the automaton is built from."""

from dataclasses import dataclass

from equipoise.errors import UserError
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.protocol.task import Task


@dataclass(frozen=True)
class Constraint:
    """Terms of every class, and in the strict shape one complete sentence of so many words.

    classes: for each class its terms as the lexicon spells them; one that ends in "*" is a stem. min_words
    and max_words count the prefix, and like the abbreviations they say nothing unless `strict`. abbreviations: what a
    full stop may follow without ending a sentence, besides single capitals.
    """

    classes: tuple[tuple[str, ...], ...]
    strict: bool
    min_words: int
    max_words: int
    abbreviations: tuple[str, ...]


def constraint_of(config: CtrlGConfig, task: Task) -> Constraint:
    """What `config` demands of the task's sentences. Raises UserError for bounds that leave no length."""
    classes = tuple(each.terms for each in task.classes)
    if config.terms == "any":
        classes = (tuple(term for terms in classes for term in terms),)
    low = task.min_words if config.min_words is None else config.min_words
    high = task.max_words if config.max_words is None else config.max_words
    if low > high:
        raise UserError(
            f"Ctrl-G's min-words {low} and max-words {high} leave no length, where the task asks for {task.bounds}: "
            "lower the first or raise the second"
        )
    return Constraint(classes, config.shape == "strict", low, high, task.abbreviations)
