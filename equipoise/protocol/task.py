# Uncommitted stand-in until branch `task` lands.
from dataclasses import dataclass, replace
from typing import NamedTuple

from equipoise.protocol.lexicon import AGENTIC, COMMUNAL, OCCUPATIONS, Lexicon


class TermClass(NamedTuple):
    name: str
    terms: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    names: tuple[str, ...] = OCCUPATIONS
    classes: tuple[TermClass, ...] = (TermClass("agentic", AGENTIC), TermClass("communal", COMMUNAL))
    frame: str = "The {occupation} was"
    min_words: int = 8
    max_words: int = 15
    abbreviations: tuple[str, ...] = ("Dr", "Mr", "Mrs", "Ms", "Mx", "Prof", "St")

    def prefix(self, occupation: str) -> str:
        return self.frame.replace("{occupation}", occupation)

    @property
    def bounds(self) -> str:
        return f"{self.min_words} to {self.max_words} words"

    @property
    def lexicon(self):
        return Lexicon(self.classes[0].terms, self.classes[1].terms)

    def match(self, text):
        return self.lexicon.match(text)

    def with_bounds(self, a, b):
        return replace(self, min_words=a, max_words=b)


PROTOCOL = Task()
