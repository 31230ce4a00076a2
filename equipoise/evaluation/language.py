"""What a sentence says beside its terms: gendered words, which class comes first, terms that are negated."""

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

from equipoise.protocol.lexicon import Lexicon, Span
from equipoise.protocol.task import Task
from equipoise.protocol.word_lists import Negations, WordLists, gendered_lexicon, negated


class Language(NamedTuple):
    """Of one sentence."""

    gendered: tuple[tuple[str, ...], ...]
    """For each kind of gendered words those that stand after the frame, each once."""
    negated: tuple[str, ...]
    """The task's terms that are negated somewhere, each once."""
    affirmed: bool
    """Whether every class has a term that is not negated somewhere."""
    first: int | None
    """The number of the class whose term comes first; None unless every class is present, of two or more, and where
    terms of two classes begin at one and the same place."""


class Reader:
    """Reads sentences of a task with the task's word lists, or those of its frame's language."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.lists: WordLists = task.lists.for_frame(task.frame)

    @cached_property
    def gendered(self) -> Lexicon | None:
        return gendered_lexicon(self.lists.gendered or ())

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the kinds of gendered words; none where no words are known."""
        return self.gendered.names if self.gendered else ()

    @property
    def negations(self) -> Negations:
        return self.lists.negations or Negations(())

    def __call__(self, text: str, occupation: str) -> Language:
        lexicon = self.task.lexicon
        spans = lexicon.spans(text)
        prefix = self.task.prefix(occupation)
        rest = text[len(prefix) :] if text.startswith(prefix) else text
        denied = negated(text, spans, self.negations)
        kept = {lexicon.class_of(span.term) for span in spans} if not denied else _classes(lexicon, spans, denied)
        return Language(
            gendered=self.gendered.match(rest).terms if self.gendered else (),
            negated=tuple(dict.fromkeys(span.term for span in denied)),
            affirmed=len(kept) == len(lexicon.classes),
            first=_first(lexicon, spans),
        )


def _classes(lexicon: Lexicon, spans: list[Span], denied: list[Span]) -> set[int]:
    """Those of the terms that are not denied."""
    return {lexicon.class_of(span.term) for span in spans if span not in denied}


def _first(lexicon: Lexicon, spans: list[Span]) -> int | None:
    starts: dict[int, int] = {}
    for span in spans:
        starts.setdefault(lexicon.class_of(span.term), span.start)
    if len(starts) < len(lexicon.classes) or len(starts) < 2:
        return None
    least = min(starts.values())
    leading = [number for number, start in starts.items() if start == least]
    return leading[0] if len(leading) == 1 else None


def read_all(task: Task) -> "Mapping[tuple[str, str], Language]":
    """Language by (text, occupation), each read once."""
    return _Read(Reader(task))


class _Read(dict[tuple[str, str], Language]):
    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self._reader = reader

    def __missing__(self, key: tuple[str, str]) -> Language:
        self[key] = found = self._reader(*key)
        return found
