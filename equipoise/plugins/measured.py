"""A sentence measured for another program's evaluation, under the names of `equipoise evaluate`, by its matcher."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.documents import parse_json
from equipoise.errors import UserError
from equipoise.measures.variety import effective, pair_counts
from equipoise.plugins.written import COMMAND, Turn, label, read_label, sentence, task_named

SHARES = ("strict", "both", "either", "in_length", "complete")
"""Of each sentence 1 or 0."""
MEANS = (*SHARES, "reward", "words", "terms")
"""What a sentence has by itself; of many the mean counts."""
SEPARATOR = "\t"
"""Between the terms of a pair written as one text. No term holds one."""


def measured(told: Any, prompt: Turn, completion: Turn) -> dict[str, Any]:
    """What `equipoise evaluate` measures of one sentence: the numbers of `MEANS`; `pair`, the first term of each class
    joined by `SEPARATOR`, empty where a class is missing; `text`, the sentence; and `terms_CLASS`, those of each class.

    `told`: its row's label. Raises UserError.
    """
    task, occupation = read_label(told)
    text = sentence(task, occupation, prompt, completion)
    reward = task.score(text)
    first = reward.first
    return {
        "strict": float(task.strict(text)),
        "both": float(all(reward.terms)),
        "either": float(any(reward.terms)),
        "in_length": float(task.in_length(reward.words)),
        "complete": float(task.is_complete_sentence(text)),
        "reward": float(reward.reward),
        "words": float(reward.words),
        "terms": float(sum(map(len, reward.terms))),
        "pair": SEPARATOR.join(first) if first is not None else "",
        "text": text,
        **{f"terms_{name}": list(terms) for name, terms in zip(reward.classes, reward.terms, strict=True)},
    }


def unique_pairs(pairs: Iterable[str]) -> float:
    """How many different pairs there are; empty ones are none."""
    return float(len(pair_counts((pair,) if pair else None for pair in pairs)))


def effective_pairs(pairs: Iterable[str]) -> float:
    """2^H over the pairs, H their entropy in bits; 0 where there are none."""
    return effective(pair_counts((pair,) if pair else None for pair in pairs))


class Asked(NamedTuple):
    """One prompt of an evaluation."""

    label: str
    occupation: str
    run: int
    """From 1: each prompt is asked so many times."""
    system: str | None
    """None for no such turn."""
    user: str
    """The user's message, or the whole text that the model reads, where there are no messages."""
    begun: str
    """What the model's turn begins with, to be continued; empty where it writes the sentence from its first word."""
    chat: bool = True
    """Whether there are messages."""

    @property
    def prompt(self) -> Turn:
        """As `written.sentence` takes it."""
        turns = [{"role": "user", "content": self.user}, {"role": "assistant", "content": self.begun}]
        return turns[: 2 if self.begun else 1] if self.chat else self.user


def asked(
    task: str = "",
    prompt: str = "",
    runs: int = 1,
    prompts: str = "",
    system: str | None = "",
    begin: bool = True,
) -> list[Asked]:
    """The prompts of an evaluation, one after the other occupation, `runs` times.

    `task`: a task file or the name of a packaged one, the default one where it is empty; `prompt`: one of its prompts,
    or NAME=INSTRUCTION; `begin`: whether the model's turn begins with the frame. Or `prompts`: a file that `equipoise
    prompts` wrote, which says all of that. Raises UserError.
    """
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise UserError(f"runs {runs!r:.40} must be a whole number from 1 up: it is how often each prompt is asked")
    once = _of_file(Path(prompts)) if prompts else _of_task(task, prompt, system, begin)
    return [each._replace(run=run) for run in range(1, runs + 1) for each in once]


def _of_task(name: str, prompt: str, system: str | None, begin: bool) -> list[Asked]:
    task = task_named(name)
    chosen = task.prompt(prompt) if prompt else task.default_prompt
    if chosen.instruction is None and not begin:
        raise UserError(f"the prompt {chosen.name} has no instruction, so there is nothing to ask with: name another")
    out = []
    for occupation in task.names:
        user, begun = task.user_message(chosen, occupation), task.prefix(occupation)
        told = label(name, occupation)
        if user is None:
            out.append(Asked(told, occupation, 1, None, begun, "", chat=False))
        else:
            out.append(Asked(told, occupation, 1, system, user, begun if begin else ""))
    return out


def _of_file(path: Path) -> list[Asked]:
    out = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts {path} ({error}): write them with {COMMAND}") from None
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
            told, prompt = row["label"], row["prompt"]
            turns = {turn["role"]: str(turn["content"]) for turn in prompt} if isinstance(prompt, list) else {}
            _, occupation = read_label(told)
            user = turns["user"] if isinstance(prompt, list) else str(prompt)
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"line {number} of {path} is no row with `prompt` and `label`: write the file with {COMMAND} --for trl"
            ) from None
        told = told if isinstance(told, str) else json.dumps(told)
        out.append(Asked(told, occupation, 1, turns.get("system"), user, turns.get("assistant", ""), bool(turns)))
    if not out:
        raise UserError(f"{path} holds no prompts: write them with {COMMAND} --for trl")
    return out
