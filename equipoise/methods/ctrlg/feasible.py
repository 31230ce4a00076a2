"""Whether a task's constraint can be met at all, said without a model."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from equipoise.errors import UserError
from equipoise.methods.ctrlg.automaton import CharAutomaton, build
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.ctrlg.constraint import Constraint, constraint_of
from equipoise.protocol.prompts import word_count
from equipoise.protocol.task import Task

_build_once = lru_cache(maxsize=4)(build)


def _built(constraint: Constraint, prefixes: Mapping[str, str]) -> CharAutomaton:
    # The same for all numbers of words, which it does not count.
    return _build_once(replace(constraint, min_words=0, max_words=0), tuple(prefixes.values()))


def characters_of(constraint: Constraint, prefixes: Mapping[str, str]) -> CharAutomaton:
    """The automaton over characters, made once. `prefixes`: for each occupation, how its sentences begin. Raises
    UserError, with the reason, if an occupation has no valid sentence or none of as few words as max_words."""
    characters = _built(constraint, prefixes)
    if constraint.strict:
        longest = max(prefixes.values(), key=lambda prefix: _words(characters, prefix))
        fewest = _words(characters, longest)
        if constraint.max_words < fewest:
            raise UserError(
                f"max-words {constraint.max_words} is too few: a sentence that begins with {longest!r} and meets "
                f"Ctrl-G's constraint has at least {fewest}; use {fewest} or more"
            )
    return characters


def _words(characters: CharAutomaton, prefix: str) -> int:
    return word_count(prefix) + int(characters.fewest_S[characters.starts[prefix]])


def fewest_words(task: Task, occupation: str) -> int:
    """Words, the prefix's counted, of the shortest complete sentence of an occupation that holds a term of every class,
    whatever the task's bounds. Raises UserError if there is none. Takes a second, no model and no tokenizer."""
    prefixes = {name: task.prefix(name) for name in task.names}
    return _words(_built(constraint_of(CtrlGConfig(), task), prefixes), task.prefix(occupation))


def check_without_model(config: CtrlGConfig, task: Task, max_new_tokens: int) -> None:
    """Raises UserError, with the reason, for what no model can do: an occupation without a valid sentence within the
    bounds, or more words than new tokens. `writer.check_feasible` knows a tokenizer's exact number of tokens."""
    constraint = constraint_of(config, task)
    characters_of(constraint, {name: task.prefix(name) for name in task.names})
    if constraint.strict:
        task.with_bounds(constraint.min_words, constraint.max_words).check_new_tokens(max_new_tokens)
