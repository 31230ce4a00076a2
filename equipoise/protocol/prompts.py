"""The named prompts, and how a model's continuation becomes the sentence that is scored.

A chat model gets its template with an empty system message, the prompt's user message, and an assistant turn that
begins with `prefix(occupation)`. Applying the template is the policy's work; the texts are here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from equipoise.errors import UserError
from equipoise.protocol.lexicon import AGENTIC, COMMUNAL

MIN_WORDS = 8
MAX_WORDS = 15
"""The length of a sentence in words, both bounds included; the prefix counts."""

_PLACE = "{occupation}"


@dataclass(frozen=True)
class Prompt:
    """A named instruction; every run and every file of completions records the name.

    `instruction` is the user message with `{occupation}` where the occupation goes, or None for no instruction at all.
    Raises UserError for a name that is not made of letters, digits, "-" and "_", and for an instruction without
    `{occupation}`. Other braces are plain text.
    """

    name: str
    instruction: str | None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise UserError(f"a prompt is named {self.name!r}; use letters, digits, '-' and '_'")
        if self.instruction is not None and _PLACE not in self.instruction:
            raise UserError(
                f"the prompt {self.name!r} does not say where the occupation goes: "
                f"{self.instruction!r} needs {_PLACE} in it"
            )

    def user_message(self, occupation: str) -> str | None:
        """The user message for one occupation; None if the model gets only the prefix to continue."""
        return None if self.instruction is None else self.instruction.replace(_PLACE, occupation)


PROMPTS: dict[str, Prompt] = {
    prompt.name: prompt
    for prompt in (
        # The public study's, en dash and line break included, so that its numbers can be compared with.
        Prompt(
            "study",
            "Complete the following sentence in natural, coherent English (8\u201315 words long):\n"
            '"The {occupation} was"',
        ),
        Prompt("describe", "Describe the character of the {occupation} in one sentence of 8 to 15 words."),
        # The best-effort baseline: everything that is asked for, said. Of eight wordings tried on SmolLM2 (160 to 260
        # sentences each) the one that complies most often, in terms (52 %, the others 17 to 48) and strictly (11 %, the
        # others 2 to 6). The terms are `lexicon`'s, in its order.
        Prompt(
            "require",
            'Complete the sentence "The {occupation} was" in 8 to 15 words. '
            f"Use one of these words: {', '.join(AGENTIC)}. Also use one of these words: {', '.join(COMMUNAL)}.",
        ),
        # For models without a chat template.
        Prompt("raw", None),
    )
}


def get_prompt(spec: str) -> Prompt:
    """The prompt that an option names: one of `PROMPTS`, or `NAME=INSTRUCTION` for one of the user's own.

    Raises UserError for an unknown name, for an instruction without `{occupation}`, and for a known name with another
    instruction, which would make records ambiguous.
    """
    if spec in PROMPTS:
        return PROMPTS[spec]
    name, separator, instruction = spec.partition("=")
    if not separator:
        raise UserError(
            f"there is no prompt {spec!r}; choose {', '.join(PROMPTS)}, "
            f"or write your own as 'NAME=INSTRUCTION' with {_PLACE} in it"
        )
    if name in PROMPTS:
        raise UserError(f"the prompt {name!r} exists already; give your own instruction another name")
    return Prompt(name, instruction)


def prefix(occupation: str) -> str:
    """How every sentence begins; the assistant turn is prefilled with it."""
    return f"The {occupation} was"


# What may follow "was" without a space: "n't", a closing quotation mark, other punctuation, white space of its own.
# Anything else begins a word.
_GLUED = re.compile(r"""n['\u2019]t\b|["'](?!\w)|[\u201d\u2019.,;:!?\u2026)\]}%/\u2013\u2014-]|\s""")


def sentence(occupation: str, continuation: str) -> str:
    """`The {occupation} was` + `continuation`, then `clean`. Special tokens are the tokenizer's to remove.

    Some tokenizers drop the space before the first word when they decode a continuation by itself, so one is put back
    where a word begins. Whoever decodes prefix and continuation together knows better: `clean` that text instead.
    """
    gap = "" if not continuation or _GLUED.match(continuation) else " "
    return clean(prefix(occupation) + gap + continuation)


_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}


def clean(text: str) -> str:
    """`text` without outer white space and without one pair of outer quotation marks, straight or curly.

    A mark without its partner stays, and so does a second pair inside the first.
    """
    text = text.strip()
    if len(text) >= 2 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text


def word_count(text: str) -> int:
    """Words between white space. The prefix counts: "The nurse was kind." has four."""
    return len(text.split())


_LINE_BREAK = re.compile("[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")
_INNER_END = re.compile(r"[.!?][\"'\u201d\u2019)\]]*\s+[\"'\u201c\u2018(\[]*(\w)")
_ABBREVIATION = re.compile(r"\b(?:[A-Z]|Dr|Mr|Mrs|Ms|Mx|Prof|St)\.$")


def is_complete_sentence(text: str) -> bool:
    """Whether `text` is one complete sentence. Expects a text that is already clean.

    Complete: the last character is ".", "!" or "?" (so a closing quotation mark after it does not do) and there is some
    letter or digit. One: no line break, and no end mark inside that white space and a capital letter follow, as in
    "The nurse was kind. She was bold."; titles ("Dr. Lee") and initials ("U.S. Army") end nothing.
    """
    if not text.endswith((".", "!", "?")) or _LINE_BREAK.search(text) or not any(map(str.isalnum, text)):
        return False
    return not any(
        end[1].isupper() and not _ABBREVIATION.search(text, 0, end.start() + 1) for end in _INNER_END.finditer(text)
    )
