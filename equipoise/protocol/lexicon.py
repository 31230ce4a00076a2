"""The terms, the occupations, and the one matcher that reward, filter, constraint and metrics share.

Source of the terms: D. Gaucher, J. Friesen and A. C. Kay (2011), "Evidence that gendered wording in job advertisements
exists and sustains gender inequality", Journal of Personality and Social Psychology 101(1). Five of the twenty (bold,
accommodating, caring, friendly, helpful) are not in that paper's stem lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from equipoise.errors import UserError

AGENTIC: tuple[str, ...] = (
    "ambitious", "assertive", "bold", "confident", "decisive",
    "independent", "self-reliant", "competitive", "adventurous", "dominant",
)  # fmt: skip
COMMUNAL: tuple[str, ...] = (
    "accommodating", "caring", "cooperative", "empathetic", "friendly",
    "nurturing", "supportive", "compassionate", "helpful", "loyal",
)  # fmt: skip
OCCUPATIONS: tuple[str, ...] = (
    "architect", "artist", "barista", "chef", "counselor", "doctor", "electrician", "engineer", "journalist", "lawyer",
    "mechanic", "nurse", "pharmacist", "photographer", "pilot", "plumber", "scientist", "teacher", "salesperson",
    "writer",
)  # fmt: skip
HOLDOUT: tuple[str, ...] = ("barista", "electrician", "mechanic", "plumber", "salesperson")
"""The occupations that training may leave out, to test on ones it never saw."""

# Dashes (en, em, minus) are not hyphens and stay. The invisible characters change no reading, so no match either.
_HYPHENS = "\u2010\u2011\ufe63\uff0d"  # hyphen, non-breaking hyphen, small and full-width hyphen-minus
_SPACES = "\u00a0\u2007\u202f"  # no-break, figure and narrow no-break space
_INVISIBLE = "\u00ad\u2060\ufeff"  # soft hyphen, word joiner, zero-width no-break space
_NORMAL = str.maketrans(dict.fromkeys(_HYPHENS, "-") | dict.fromkeys(_SPACES, " ") | dict.fromkeys(_INVISIBLE, ""))


def normalise(text: str) -> str:
    """`text` with every Unicode hyphen as "-", every non-breaking space as " ", soft hyphens and the like removed."""
    return text.translate(_NORMAL)


@dataclass(frozen=True)
class Match:
    """The terms found in one text: `agentic` and `communal` hold each term once, in order of first occurrence."""

    agentic: tuple[str, ...]
    communal: tuple[str, ...]
    counts: dict[str, int]
    """How often each found term occurs."""

    @property
    def both(self) -> bool:
        """Whether both classes are present: the constraint."""
        return bool(self.agentic and self.communal)


@dataclass(frozen=True)
class Span:
    """One occurrence of a term: `text[start:end]` of the text as given."""

    term: str
    start: int
    end: int


@dataclass(frozen=True)
class Lexicon:
    r"""Two lists of terms and the matcher over them: whole word (`\bterm\b`), case-insensitive, after `normalise`.

    Terms are normalised and lower-cased. Raises UserError for an empty list, a term that is empty or does not begin
    and end with a letter or digit, and a term that is listed twice, be it in one list or in both.
    """

    agentic: tuple[str, ...] = AGENTIC
    communal: tuple[str, ...] = COMMUNAL

    def __post_init__(self) -> None:
        # A frozen dataclass lets only `object.__setattr__` store the checked terms.
        object.__setattr__(self, "agentic", _checked("agentic", self.agentic))
        object.__setattr__(self, "communal", _checked("communal", self.communal))
        if shared := [term for term in self.agentic if term in self.communal]:
            raise UserError(f"the term {shared[0]!r} is in both lists; keep it in the agentic or the communal one")

    @property
    def terms(self) -> tuple[str, ...]:
        """All terms, the agentic ones first."""
        return self.agentic + self.communal

    @cached_property
    def _by_length(self) -> tuple[str, ...]:
        return tuple(sorted(self.terms, key=len, reverse=True))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # A look-ahead, so that terms which overlap in a text are all found; the longest first, one group for each.
        return re.compile(rf"\b(?=(?:{'|'.join(f'({re.escape(term)})' for term in self._by_length)})\b)", re.IGNORECASE)

    @cached_property
    def _heads(self) -> dict[str, tuple[str, ...]]:
        """Each term with the shorter terms that begin it, longest first: where "self-made" matches, so does "self"."""
        return {
            term: tuple(other for other in self._by_length if re.match(rf"{re.escape(other)}\b", term))
            for term in self._by_length
        }

    def spans(self, text: str) -> list[Span]:
        """Every occurrence of every term, from left to right; spans overlap only if terms of the lexicon do."""
        normal = normalise(text)
        # Normalising replaces single characters or drops them, so a position is found again among those that are kept.
        kept = range(len(text)) if len(normal) == len(text) else [i for i, c in enumerate(text) if c not in _INVISIBLE]
        found: list[Span] = []
        for hit in self._pattern.finditer(normal):
            assert hit.lastindex is not None  # every alternative is a group
            # The group says which term it was. The matched text cannot: it may be upper-case, or hold a long s.
            for term in self._heads[self._by_length[hit.lastindex - 1]]:
                start = hit.start()
                found.append(Span(term, kept[start], kept[start + len(term) - 1] + 1))
        return found

    def match(self, text: str) -> Match:
        """The terms that `text` holds."""
        counts: dict[str, int] = {}
        for span in self.spans(text):
            counts[span.term] = counts.get(span.term, 0) + 1
        return Match(
            agentic=tuple(term for term in counts if term in self.agentic),
            communal=tuple(term for term in counts if term in self.communal),
            counts=counts,
        )

    def mark(self, text: str, agentic: tuple[str, str] = ("[", "]"), communal: tuple[str, str] = ("<", ">")) -> str:
        """`text` with each term between the two strings of its class, by default "[confident]" and "<caring>"."""
        parts: list[str] = []
        end = 0
        for span in self.spans(text):
            if span.start < end:
                continue  # inside the term marked before
            before, after = agentic if span.term in self.agentic else communal
            parts += [text[end : span.start], before, text[span.start : span.end], after]
            end = span.end
        return "".join([*parts, text[end:]])


def _checked(name: str, terms: Iterable[str]) -> tuple[str, ...]:
    if isinstance(terms, str):
        raise UserError(f"the {name} terms are one text, {terms!r}; expected a list of terms")
    checked: list[str] = []
    for given in terms:
        if not isinstance(given, str):
            raise UserError(f"the {name} term {given!r} is not a text; expected words such as 'confident'")
        term = " ".join(normalise(given).lower().split())
        if not re.fullmatch(r"\w(.*\w)?", term):
            raise UserError(f"the {name} term {given!r} is no word; a term begins and ends with a letter or digit")
        if term in checked:
            raise UserError(f"the {name} term {term!r} is listed twice; remove one")
        checked.append(term)
    if not checked:
        raise UserError(f"the list of {name} terms is empty; it needs at least one term")
    return tuple(checked)


LEXICON = Lexicon()
"""The protocol's twenty terms."""
