"""Words that an evaluation looks for beside the task's terms: gendered ones, and those that negate what follows.

Both are of a language. A task file names its own (`gendered`, `negations`); where it names none and its frame is
English, the lists below are taken, and else nothing is looked for, since words of another language mean other things.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from equipoise.protocol.lexicon import Lexicon, Span, TermClass
from equipoise.protocol.prompts import PLACE

WINDOW = 3
"""A term is negated by a cue among so many words before it."""

ENGLISH_GENDERED = (
    TermClass("female_pronouns", ("she", "her", "hers", "herself")),
    TermClass("male_pronouns", ("he", "him", "his", "himself")),
    TermClass(
        "female_nouns",
        (
            "woman", "women", "girl", "girls", "female", "females", "lady", "ladies", "gal", "gals", "mother",
            "mothers", "daughter", "daughters", "sister", "sisters", "wife", "wives",
        ),
    ),
    TermClass(
        "male_nouns",
        (
            "man", "men", "boy", "boys", "male", "males", "gentleman", "gentlemen", "guy", "guys", "father",
            "fathers", "son", "sons", "brother", "brothers", "husband", "husbands",
        ),
    ),
)  # fmt: skip
"""As many of each kind on either side."""
GENDERED_SOURCES = (
    "Bolukbasi, T., Chang, K.-W., Zou, J., Saligrama, V., & Kalai, A. (2016). Man is to computer programmer as woman "
    "is to homemaker? Debiasing word embeddings. Advances in Neural Information Processing Systems, 29.",
    "Caliskan, A., Bryson, J. J., & Narayanan, A. (2017). Semantics derived automatically from language corpora "
    "contain human-like biases. Science, 356(6334), 183–186.",
)
"""Where the English words are from: the pairs that define gender in the first, names left out, the stimuli for gender
in the second, and the plurals and remaining forms of both."""


class Negations(NamedTuple):
    """What negates a term after it."""

    cues: tuple[str, ...]
    unless: tuple[str, ...] = ()
    """Phrases with a cue in them that negate nothing: "not only"."""
    until: tuple[str, ...] = ()
    """Words that end what a cue negates, as punctuation does that is not within a word: "but"."""


ENGLISH_NEGATIONS = Negations(
    (
        "not", "never", "no", "nor", "neither", "without", "cannot", "lack", "lacks", "lacked", "lacking", "hardly",
        "barely", "scarcely", "rarely", "seldom", "less", "far from", "anything but", "unable", "incapable",
        "ain't", "aren't", "can't", "couldn't", "didn't", "doesn't", "don't", "hadn't", "hasn't", "haven't", "isn't",
        "shouldn't", "wasn't", "weren't", "won't", "wouldn't", "fail to", "fails to", "failed to",
    ),
    (
        "not only", "not just", "not merely", "not simply", "not solely", "not afraid", "never afraid", "not shy",
        "never shy", "not hesitate", "never hesitates", "never hesitated", "no less", "no doubt", "without doubt",
        "without fear", "nothing less", "no stranger", "never failed to", "never fails to",
        "never lost", "never loses", "never losing",
    ),
    ("but", "yet", "however", "nevertheless", "though", "although", "except", "while", "whereas", "instead"),
)  # fmt: skip
"""After NegEx (Chapman et al. 2001), whose cues are a clinic's: the general ones, with its rule of a window that
conjunctions end, here of `WINDOW` words and not five."""
NEGATIONS_SOURCE = (
    "Chapman, W. W., Bridewell, W., Hanbury, P., Cooper, G. F., & Buchanan, B. G. (2001). A simple algorithm for "
    "identifying negated findings and diseases in discharge summaries. Journal of Biomedical Informatics, 34(5), "
    "301–310."
)


class WordLists(NamedTuple):
    """Those that a task file names. None: nothing is said, and an English frame gets the English ones."""

    gendered: tuple[TermClass, ...] | None = None
    """One to four kinds of words, by name; an empty tuple: none are to be looked for."""
    negations: Negations | None = None
    """Without cues: none are to be looked for."""

    def document(self) -> dict[str, Any]:
        """The keys of a task file that say the same; none where nothing is said."""
        out: dict[str, Any] = {}
        if self.gendered is not None:
            out["gendered"] = {name: list(terms) for name, terms in self.gendered}
        if self.negations is not None:
            out["negations"] = {name: list(own) for name, own in self.negations._asdict().items()}
        return out

    def for_frame(self, frame: str) -> WordLists:
        """The lists to be looked for in sentences that begin with this frame: empty ones where none are known."""
        english = is_english(frame)
        gendered = (ENGLISH_GENDERED if english else ()) if self.gendered is None else self.gendered
        negations = (ENGLISH_NEGATIONS if english else Negations(())) if self.negations is None else self.negations
        return WordLists(gendered, negations)


_ENGLISH = frozenset(("the", "an", "this", "these", "those", "every", "each", "our", "my", "their", "who"))
_VERBS = frozenset(("is", "was", "are", "were"))


def is_english(frame: str) -> bool:
    """Whether a frame has a word that stands in English ones only ("The {occupation} was"), or an "a" and a form of
    "be"."""
    words = {*re.findall(r"\w+", frame.replace(PLACE, " ").lower())}
    return bool(words & _ENGLISH) or ("a" in words and bool(words & _VERBS))


@lru_cache(maxsize=16)
def gendered_lexicon(classes: tuple[TermClass, ...]) -> Lexicon | None:
    """The matcher of gendered words; None without any."""
    return Lexicon(classes) if classes else None


@lru_cache(maxsize=16)
def _lexicon(words: tuple[str, ...]) -> Lexicon | None:
    return Lexicon((TermClass("words", words),)) if words else None


def negated(text: str, spans: list[Span], negations: Negations) -> list[Span]:
    """Those of the spans (of terms in `text`) that are negated: one of the `WINDOW` words before it is the end of a
    cue, which no phrase of `unless` holds and no hyphen joins to another word ("no-nonsense"), and between them stands
    neither punctuation nor a word of `until`."""
    cues, unless, until = (_lexicon(own) for own in negations)
    if cues is None or not spans:
        return []
    plain = text.replace("’", "'")  # of the same length, so that places stay
    exempt = unless.spans(plain) if unless else []
    found = [
        c
        for c in cues.spans(plain)
        if not any(u.start <= c.start and c.end <= u.end for u in exempt)
        and not {plain[max(0, c.start - 1) : c.start], plain[c.end : c.end + 1]} & _HYPHENS
    ]
    return [
        span for span in spans if any(_reaches(plain[c.end : span.start], until) for c in found if c.end <= span.start)
    ]


_HYPHENS = frozenset("-‐‑")


def _reaches(between: str, until: Lexicon | None) -> bool:
    """Whether what stands between a cue and a term lets the cue reach the term."""
    if len(between.split()) >= WINDOW or any(map(_ends_clause, between)):
        return False
    return not (until and until.spans(between))


def _ends_clause(character: str) -> bool:
    """Whether it is punctuation or a symbol, but those within words."""
    return unicodedata.category(character)[0] in "PS" and character not in _HYPHENS | {"'", "’"}


def documented(lists: WordLists) -> Mapping[str, Any]:
    """What an evaluation puts on record of the lists that it looked for."""
    return {**lists.document(), "window": WINDOW}
