"""The task as a value: what is written about, with which terms, how long, asked for how. `PROTOCOL` is the default one.

A task is read from a YAML file (`read_task`) or made of the same document in Python (`task_from_document`); both check
it. It never changes; `with_bounds` makes another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from equipoise.errors import UserError, brief
from equipoise.protocol.difference import differences
from equipoise.protocol.lexicon import Lexicon, Match, TermClass
from equipoise.protocol.plural import plural
from equipoise.protocol.possible import Occupation, check_bounds, listed_occupations
from equipoise.protocol.prompts import (
    PLACE,
    Prompt,
    fill,
    filled,
    is_complete_sentence,
    join,
    open_with,
    placeholders,
    word_count,
    words_to_write,
)
from equipoise.protocol.reward import PROTOCOL_WEIGHTS, Event, Reward, RewardWeights, reward_of
from equipoise.protocol.task_checks import Defaults, parts_of
from equipoise.protocol.task_file import Document, read_document
from equipoise.protocol.task_values import nearest
from equipoise.protocol.word_lists import WordLists

__all__ = ["PROTOCOL", "ForcedOpening", "Occupation", "Task", "packaged_tasks", "read_task", "task_from_document"]

TASKS = Path(__file__).parent / "tasks"


class ForcedOpening(NamedTuple):
    """How a sentence is made to begin."""

    order: tuple[int, ...]
    """The numbers of the classes, as their terms follow one another."""
    terms: tuple[str, ...]
    """The words that are written, in that order."""
    texts: tuple[str, ...]
    """What may follow the frame, white space before it included: one text for each of the task's openings."""


@dataclass(frozen=True)
class Task:
    """Occupations are named as in files: `names`. One that the task does not have stands everywhere as it is given."""

    name: str
    classes: tuple[TermClass, ...]
    occupations: tuple[Occupation, ...]
    held_out: tuple[str, ...]
    """Names of occupations that training may leave out."""
    frame: str
    """How every sentence begins, with `{occupation}` where the occupation goes."""
    min_words: int
    """Fewest words of a sentence that succeeds, those of the frame included."""
    max_words: int
    prompts: tuple[Prompt, ...]
    """The first is the default one, the last is `raw`."""
    sources: tuple[str, ...]
    """Citations of where the terms come from."""
    labels: tuple[str, ...]
    """What reports call each class."""
    openings: tuple[str, ...]
    """How a forced sentence may go on after the frame: {1}, {2} for terms, {a} for the article of the next one."""
    write: tuple[tuple[str, tuple[str, ...]], ...]
    """Terms and the words to write instead: of a stem those that it stands for, of another term none."""
    abbreviations: tuple[str, ...]
    """What ends no sentence, without the last point."""
    not_in_source: tuple[str, ...]
    """Terms that the sources do not list."""
    lists: WordLists
    """What an evaluation looks for beside the terms, where the file says it."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Lines about what reading the task changed."""

    def __repr__(self) -> str:
        return f"<Task {self.name}: {len(self.classes)} classes, {len(self.occupations)} occupations>"

    def __hash__(self) -> int:
        return int(self._digest[:15], 16)  # the same in every process, so that it may be pickled

    # Occupations and sentences.

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The occupations' names, as they stand in files."""
        return tuple(occupation.name for occupation in self.occupations)

    def training_names(self, holdout: bool) -> tuple[str, ...]:
        """The occupations to train on: with `holdout`, without those held out."""
        return tuple(name for name in self.names if not (holdout and name in self.held_out))

    @cached_property
    def _by_name(self) -> dict[str, Occupation]:
        return {occupation.name: occupation for occupation in self.occupations}

    def occupation(self, name: str) -> Occupation:
        """The occupation of that name."""
        return self._by_name.get(name) or Occupation(name, name, name)

    def prefix(self, occupation: str) -> str:
        """How every sentence about the occupation begins; the assistant turn is prefilled with it."""
        form = self.occupation(occupation).frame
        if self.frame.startswith(PLACE):
            form = form[:1].title() + form[1:]
        return self.frame.replace(PLACE, form)

    def prefix_words(self, occupation: str) -> int:
        return word_count(self.prefix(occupation))

    def sentence(self, occupation: str, continuation: str) -> str:
        """Prefix and continuation, joined and cleaned as `prompts.join` says."""
        return join(self.prefix(occupation), continuation)

    def continuation(self, text: str, occupation: str) -> str | None:
        """What follows the prefix, white space included; None if `text` does not begin with the prefix."""
        prefix = self.prefix(occupation)
        return text.removeprefix(prefix) if text.startswith(prefix) else None

    # What is found, and what it is worth.

    @cached_property
    def lexicon(self) -> Lexicon:
        return Lexicon(self.classes)

    def match(self, text: str) -> Match:
        """The terms that `text` holds."""
        return self.lexicon.match(text)

    def score(self, text: str, weights: RewardWeights = PROTOCOL_WEIGHTS) -> Reward:
        """The reward of `text`; the length penalty goes by the task's bounds."""
        return reward_of(text, self.match(text), self.lexicon.names, weights, self.in_length(word_count(text)))

    def in_length(self, words: int) -> bool:
        return self.min_words <= words <= self.max_words

    def is_complete_sentence(self, text: str) -> bool:
        """`prompts.is_complete_sentence` with the task's abbreviations."""
        return is_complete_sentence(text, self.abbreviations)

    def strict(self, text: str) -> bool:
        """Strict success: every class, a length within the bounds, one complete sentence."""
        return _strict(self, text)

    def complies(self, text: str, event: Event) -> bool:
        """`both`: terms of every class, however many classes there are; `strict`: strict success."""
        return self.match(text).complete if event == "both" else self.strict(text)

    @property
    def bounds(self) -> str:
        """The bounds in words: "8 to 15 words"."""
        if self.min_words == self.max_words:
            return f"{self.min_words} word{'' if self.min_words == 1 else 's'}"
        return f"{self.min_words} to {self.max_words} words"

    def mould(self, text: str, occupation: str) -> str:
        """What is left of `text` without what the task asks for: lower case, every term as "*", the occupation as "_".

        Sentences of one mould differ in nothing else.
        """
        parts: list[str] = []
        end = 0
        for span in self.lexicon.spans(text):
            if span.start >= end:
                parts += [text[end : span.start], "*"]
            end = max(end, span.end)
        masked = "".join([*parts, text[end:]]).lower()
        form = re.escape(self.occupation(occupation).frame.lower())
        return re.sub(rf"(?<!\w){form}(?!\w)", "_", masked)

    def opening(self, text: str, occupation: str) -> str:
        """The first two words after those of the prefix, lower case, words with a term in them as "*".

        It begins with a ">", so that it cannot be mistaken for a term.
        """
        skipped = self.prefix_words(occupation)
        words = list(re.finditer(r"\S+", text))[skipped : skipped + 2]
        spans = self.lexicon.spans(text)
        masked = (
            "*" if any(s.start < word.end() and word.start() < s.end for s in spans) else word[0].lower()
            for word in words
        )
        return "> " + " ".join(masked)

    # Words about the task.

    @property
    def pair_count(self) -> int:
        """How many combinations of a term of each class there are."""
        return self.lexicon.cells

    @property
    def pair_noun(self) -> str:
        """What such combinations are called, in the plural."""
        return {1: "terms", 2: "pairs"}.get(len(self.classes), "combinations")

    @property
    def all_classes(self) -> str:
        """What it is called that every class is present."""
        return {1: "the class", 2: "both classes"}.get(len(self.classes), f"all {len(self.classes)} classes")

    # Prompts.

    @property
    def default_prompt(self) -> Prompt:
        return self.prompts[0]

    def prompt(self, spec: str) -> Prompt:
        """The prompt that an option names: one of the task's, or `NAME=INSTRUCTION` for one of the user's own.

        Raises UserError for an unknown name, for an instruction without `{occupation}`, and for a known name with
        another instruction, which would make records ambiguous.
        """
        known = {prompt.name: prompt for prompt in self.prompts}
        if spec in known:
            return known[spec]
        name, separator, instruction = spec.partition("=")
        if not separator:
            raise UserError(
                f"there is no prompt {spec!r}; choose {', '.join(known)}, "
                f"or write your own as 'NAME=INSTRUCTION' with {PLACE} in it"
            )
        if name in known:
            raise UserError(f"the prompt {name!r} exists already; give your own instruction another name")
        return filled(name, instruction, self._values)

    def user_message(self, prompt: Prompt, occupation: str) -> str | None:
        """The prompt's user message about the occupation; None if the model gets only the prefix to continue."""
        if prompt.instruction is None:
            return None
        forms = {"occupation": self.occupation(occupation).prompt, "frame": self.prefix(occupation)}
        return fill(prompt.template or prompt.instruction, self._values | forms)

    def leak_free(self, prompt: Prompt) -> Prompt:
        """The prompt without the terms that `{NAME OF A CLASS}` puts into it, and without a label that heads such words
        and is one of them: what it names by accident remains."""
        if prompt.instruction is None:
            return prompt
        template = prompt.template or prompt.instruction
        for (name, words), label in zip(self._words.items(), self.labels, strict=True):
            if self.match(", ".join(words)).counts.keys() >= self.match(label).counts.keys():
                template = template.replace(f"{label}: {{{name}}}", "")
        return filled(prompt.name, fill(template, dict.fromkeys(self.lexicon.names, "")), self._values)

    @cached_property
    def _values(self) -> dict[str, str]:
        return placeholders(self.frame, self.min_words, self.max_words, self._words)

    @cached_property
    def _words(self) -> dict[str, tuple[str, ...]]:
        write = dict(self.write)
        return {name: words_to_write(terms, write) for name, terms in self.classes}

    # Sentences that are made to begin with terms.

    def words_of(self, number: int) -> tuple[str, ...]:
        """What can be written of a class: its terms, with a stem's words in its place, or nothing of it without any."""
        return self._words[self.classes[number].name]

    @property
    def can_force(self) -> bool:
        """Whether sentences can be made to begin with a term of each class."""
        return bool(self.openings) and all(self._words.values())

    def forced_openings(self) -> Iterator[ForcedOpening]:
        """Every combination of a word of each class, in every order of the classes; nothing unless `can_force`.

        The orders follow one another, the classes' own first, each with all combinations in one and the same sequence.
        """
        words = list(self._words.values())
        for order in permutations(range(len(words))) if self.can_force else ():
            for chosen in product(*words):
                terms = tuple(chosen[number] for number in order)
                yield ForcedOpening(order, terms, tuple(open_with(opening, terms) for opening in self.openings))

    # The document.

    def document(self) -> dict[str, Any]:
        """The task as its YAML file says it, with what may be left out; `task_from_document` reads it."""
        return {
            "name": self.name,
            "frame": self.frame,
            "words": [self.min_words, self.max_words],
            "occupations": listed_occupations(self.occupations),
            "held_out": list(self.held_out),
            "classes": {name: list(terms) for name, terms in self.classes},
            "prompts": {prompt.name: prompt.template for prompt in self.prompts if prompt.instruction is not None},
            "sources": list(self.sources),
            "labels": dict(zip(self.lexicon.names, self.labels, strict=True)),
            "openings": list(self.openings),
            "write": {stem: list(words) for stem, words in self.write},
            "abbreviations": list(self.abbreviations),
            "not_in_source": list(self.not_in_source),
            **self.lists.document(),
        }

    def to_yaml(self) -> str:
        """The document as the text of a YAML file."""
        return str(yaml.safe_dump(self.document(), allow_unicode=True, sort_keys=False, width=120))

    def fingerprint(self) -> str:
        """16 hexadecimal digits that are the same for equal tasks and, in practice, for no others."""
        return self._digest[:16]

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.document()).encode()).hexdigest()

    def with_bounds(self, min_words: int | None, max_words: int | None) -> Task:
        """The task with other bounds, which its prompts name too. Raises UserError for bounds that leave no length."""
        min_words = self.min_words if min_words is None else min_words
        max_words = self.max_words if max_words is None else max_words
        check_bounds(min_words, max_words, self.frame, self.occupations, self.lexicon)
        values = placeholders(self.frame, min_words, max_words, self._words)
        prompts = tuple(
            prompt if prompt.instruction is None else filled(prompt.name, prompt.template, values)
            for prompt in self.prompts
        )
        return replace(self, min_words=min_words, max_words=max_words, prompts=prompts)

    def check_new_tokens(self, limit: int, remedy: str = "raise --max-new-tokens") -> None:
        """Raises UserError where `limit` tokens after the frame cannot hold the fewest words of a sentence that
        succeeds. Each takes a token or more, so this refuses only what no model can do."""
        shortest = min(self.names, key=self.prefix_words)
        needed = self.min_words - self.prefix_words(shortest)
        if needed > limit:
            raise UserError(
                f"at most {plural(limit, 'new token')} cannot make sentences of {self.bounds}: after "
                f"{self.prefix(shortest)!r} come at least {plural(needed, 'word')}, and each takes a token or more; "
                f"{remedy}, or lower the task's words"
            )

    def differences(self, other: Task) -> list[str]:
        """A line for each place where the other task says something else: "words: [8, 15] → [6, 20]"."""
        return differences(self.document(), other.document())


@lru_cache(maxsize=4096)  # training asks three times of every sentence
def _strict(task: Task, text: str) -> bool:
    return task.in_length(word_count(text)) and task.match(text).complete and task.is_complete_sentence(text)


def packaged_tasks() -> dict[str, Path]:
    """The task files that come with the package, by name."""
    return {path.stem: path for path in sorted(TASKS.glob("*.yaml"))}


def read_task(path: Path | str) -> Task:
    """The task in a YAML file, or the packaged one of that name ("competence-warmth").

    Raises UserError for what is no task, in one line that names the file and, wherever there is one, the line.
    """
    packaged, name = packaged_tasks(), str(path)
    if Path(path).name == name and not Path(path).suffix and name not in packaged and not os.path.lexists(path):
        near = nearest(name, list(packaged))
        raise UserError(f"there is no task '{brief(name)}'{near}; give a YAML file, or one of {', '.join(packaged)}")
    return _task(read_document(packaged.get(name, Path(path))))


def task_from_document(document: Mapping[str, Any], where: str) -> Task:
    """The task that `Task.document` wrote, or any other such document; `where` is named in errors (UserError)."""
    return _task(Document(document, where))


def _task(document: Document) -> Task:
    return Task(**parts_of(document, _DEFAULTS))


def _defaults(task: Task) -> Defaults:
    templates = {prompt.name: prompt.template for prompt in task.prompts if prompt.name in ("describe", "study")}
    return Defaults(task.frame, (task.min_words, task.max_words), templates, task.abbreviations)


PROTOCOL = Task(**parts_of(read_document(TASKS / "agentic-communal.yaml"), None))
"""The default task."""
_DEFAULTS = _defaults(PROTOCOL)
