"""The named prompts, and how a model's continuation becomes the sentence that is scored.

A chat model gets its template with an empty system message, the prompt's user message, and an assistant turn that
begins with the frame. Applying the template is the policy's work; the texts are here and in the task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from equipoise.errors import UserError

PLACE = "{occupation}"
RAW = "raw"
"""The name of the prompt without an instruction, which every task has."""


@dataclass(frozen=True)
class Prompt:
    """A named instruction; every run and every file of completions records the name.

    `instruction` is the user message with `{occupation}` where the occupation goes, or None for no instruction at all.
    Raises UserError for a name that is not made of letters, digits, "-" and "_", and for an instruction without
    `{occupation}`. Other braces are plain text.
    """

    name: str
    instruction: str | None
    template: str = field(default="", compare=False)
    """The instruction as it was written, with `{min_words}` and the like; empty where nothing was filled in."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise UserError(f"a prompt is named {self.name!r}; use letters, digits, '-' and '_'")
        if self.instruction is not None and PLACE not in self.instruction:
            raise UserError(
                f"the prompt {self.name!r} does not say where the occupation goes: "
                f"{self.instruction!r} needs {PLACE} in it"
            )

    def user_message(self, occupation: str) -> str | None:
        """The user message with `occupation` in it; None if the model gets only the frame to continue.

        `Task.user_message` takes the name of an occupation and puts in it what the task calls it in prompts.
        """
        return None if self.instruction is None else self.instruction.replace(PLACE, occupation)


def fill(template: str, values: Mapping[str, str]) -> str:
    """`template` with each `{name}` of `values` replaced by its value; other braces are plain text."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template) if values else template


def placeholders(frame: str, min_words: int, max_words: int, words: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What stands for `{frame}`, `{min_words}`, `{max_words}` and `{NAME OF A CLASS}` in a task's prompts.

    `words` maps the classes to their words to write. `{occupation}` is filled in for each occupation, later.
    """
    bounds = {"min_words": str(min_words), "max_words": str(max_words)}
    return {"frame": frame} | bounds | {name: ", ".join(listed) for name, listed in words.items()}


def filled(name: str, template: str, values: Mapping[str, str]) -> Prompt:
    """The prompt of that template. Raises UserError as Prompt does, and for a class without words to write."""
    for placeholder, value in values.items():
        if not value and f"{{{placeholder}}}" in template:
            raise UserError(
                f"the prompt {name!r} names the words of {placeholder}, which has only stems and nothing to write of "
                f"them; list their words under `write`, or leave {{{placeholder}}} out"
            )
    return Prompt(name, fill(template, values), template)


def require_template(classes: Sequence[str]) -> str:
    """The template of `require` for a task whose file gives no prompts. `classes` are those with words to write."""
    asks = [f"{'Also use' if i else 'Use'} one of these words: {{{name}}}." for i, name in enumerate(classes)]
    return " ".join(['Complete the sentence "{frame}" in {min_words} to {max_words} words.', *asks])


def words_to_write(terms: Sequence[str], write: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The terms, and in the place of those that `write` has, its words. A stem that it does not have is left out."""
    return tuple(word for term in terms for word in write.get(term, () if term.endswith("*") else (term,)))


_OPENING_PLACE = re.compile(r"\{(a|[0-9]+)\}")


def open_with(opening: str, terms: Sequence[str]) -> str:
    """What follows the frame where an opening is filled in: {1}, {2} are the terms, {a} the article of the next one."""
    places = [place[1] for place in _OPENING_PLACE.finditer(opening)]

    def text_of(number: int) -> str:
        if places[number] != "a":
            return terms[int(places[number]) - 1]
        following = next(place for place in places[number + 1 :] if place != "a")
        return "an" if terms[int(following) - 1][0].lower() in "aeiou" else "a"

    numbers = iter(range(len(places)))
    return " " + _OPENING_PLACE.sub(lambda _: text_of(next(numbers)), opening)


# What may follow the frame without a space: "n't", a closing quotation mark, other punctuation, white space of its own.
# Anything else begins a word.
_GLUED = re.compile(r"""n['\u2019]t\b|["'](?!\w)|[\u201d\u2019.,;:!?\u2026)\]}%/\u2013\u2014-]|\s""")


def join(prefix: str, continuation: str) -> str:
    """`prefix` + `continuation`, then `clean`. Special tokens are the tokenizer's to remove.

    Some tokenizers drop the space before the first word when they decode a continuation by itself, so one is put back
    where a word begins. Whoever decodes prefix and continuation together knows better: `clean` that text instead.
    """
    gap = "" if not continuation or _GLUED.match(continuation) else " "
    return clean(prefix + gap + continuation)


QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}
"""Opening quotation marks and the closing ones that make a pair with them."""


def clean(text: str) -> str:
    """`text` without outer white space and without one pair of outer quotation marks, straight or curly.

    A mark without its partner stays, and so does a second pair inside the first.
    """
    text = text.strip()
    if len(text) >= 2 and QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text


def word_count(text: str) -> int:
    """Words between white space. The frame counts: "The nurse was kind." has four."""
    return len(text.split())


_LINE_BREAK = re.compile("[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")
_INNER_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s+[\"'\u201c\u2018(\[]*(\w)")


@lru_cache(maxsize=64)
def _abbreviation(abbreviations: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(['[A-Z]', *map(re.escape, abbreviations)])})\.$")


def is_complete_sentence(text: str, abbreviations: tuple[str, ...]) -> bool:
    """Whether `text` is one complete sentence. Expects a text that is already clean.

    Complete: the last character is ".", "!" or "?" (so a closing quotation mark after it does not do) and there is some
    letter or digit. One: no line break, and no end mark inside that white space and a capital letter follow, as in
    "The nurse was kind. She was bold."; `abbreviations` ("Dr. Lee") and initials ("U.S. Army") end nothing. They are
    given without their last point.
    """
    if not text.endswith((".", "!", "?")) or _LINE_BREAK.search(text) or not any(map(str.isalnum, text)):
        return False
    pattern = _abbreviation(abbreviations)
    return not any(
        end[1].isupper() and not pattern.search(text, 0, end.start() + 1) for end in _INNER_END.finditer(text)
    )
