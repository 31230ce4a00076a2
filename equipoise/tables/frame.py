"""How sentences of a task begin: told from their texts, and put before what only continues it."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from equipoise.protocol.prompts import PLACE, clean
from equipoise.protocol.task import Task
from equipoise.tables.clauses import PRONOUNS, Verb, subject_verb

Form = Literal["auto", "sentence", "continuation"]
Seen = Literal["sentence", "continuation", "mixed"]

_LONGEST = 12
"""Words of an occupation that the task does not have, at most."""
_OTHER = re.compile(r"\s*(?:[{\[<]|\(?\d+[.)]\s)")
"""What begins JSON, a list, markup or a numbered line; no sentence goes on with it."""
SHORT = 3
"""Words of one that a single text may bring in; a longer one must stand in several."""
_SOME = frozenset(("my", "our", "your", "his", "her", "their", "most", "many", "all", "every", "each", "some", "few",
                   "no", "these", "those", "such", "other", "any", "both", "alle", "viele", "manche", "jede", "jeder",
                   "mein", "meine", "unser", "unsere", "einige"))  # fmt: skip
"""Words before an occupation that begin a sentence more often than they go on after "was"."""
_FEW = 0.02
"""Share of texts with a subject of their own among what goes on after the frame that is not refused: those that cannot
go on after it are left as they are, of the others ("the best you are") each may."""
_VERBS = frozenset(("is", "was", "are", "were", "has", "have", "had", "will", "would", "can", "could", "should", "may"))


class Frame:
    """A task's frame as a pattern: "The {occupation} was"."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.before, self.after = (part.strip() for part in task.frame.split(PLACE))
        self._names: dict[str, str] = {}
        for each in task.occupations:
            for form in each:
                self._names.setdefault(form.casefold(), each.name)
        forms = sorted((each.frame for each in task.occupations), key=len, reverse=True)
        # Without words after it nothing tells where an occupation of no list ends.
        anything = [rf"\w[\w'\u2019/-]*(?:,?\s+\w[\w'\u2019/-]*){{0,{_LONGEST - 1}}}?"] if self.after else []
        occupation = "|".join([*map(_spaced, forms), *anything])
        self._begins = re.compile(rf"\W*{self._opened()}({occupation}){_then(self.after)}", re.IGNORECASE)
        self._goes_on = re.compile(rf"\s*{_spaced(self.after)}(?!\w)") if self.after else None
        self._own: Callable[[str], tuple[re.Pattern[str], re.Pattern[str]]] = lru_cache(maxsize=4096)(self._patterns)

    def _opened(self) -> str:
        return f"{_spaced(self.before)}{_gap(self.before[-1])}" if self.before else ""

    def example(self, occupation: str = "X") -> str:
        """The frame with a name in it."""
        return self.task.frame.replace(PLACE, occupation)

    def has(self, occupation: str) -> bool:
        """Whether the task has an occupation of that name."""
        return self.canonical(occupation) in self.task.names

    def canonical(self, name: str) -> str:
        """The task's own name of an occupation, whatever its case, its article or the form that the frame takes. What
        the frame says around the place is no part of another one: no sentence begins "The The" or "The nurse was was".
        """
        name = " ".join(name.split())
        known = self._names.get(name.casefold()) or self._names.get(re.sub(r"^(the|an?) ", "", name.casefold()))
        if known or not self.before:
            return known or name
        before, after = (" ".join(part.split()).casefold() for part in (self.before, self.after))
        if not name.casefold().startswith(f"{before} "):
            return name
        inner = name[len(before) + 1 :]
        if after and inner.casefold().endswith(f" {after}"):  # the whole frame, as prompts to be completed have it
            inner = inner[: -len(after) - 1]
        return self._names.get(inner.casefold(), inner)

    def occupation(self, text: str) -> str | None:
        """The occupation that a text begins with, as the frame has it; None where it does not begin so."""
        begins = self._begins.match(text)
        return self.canonical(begins[1]) if begins else None

    def _patterns(self, occupation: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
        own = self.task.occupation(occupation)
        begun = re.compile(rf"\W*{self._opened()}{_spaced(own.frame)}(?!\w)", re.IGNORECASE)
        forms = "|".join(_spaced(form) for form in dict.fromkeys((own.frame, own.name, own.prompt)) if form)
        # "cooking all day" has no cook for its subject.
        subject = rf"\W*(?P<before>(?:\w+\s+){{0,2}}?)(?:{forms})(?P<ending>(?!ing\b)\w{{0,3}})(?!\w)\W*(?P<next>\w*)"
        return begun, re.compile(subject, re.IGNORECASE)

    def is_begun(self, text: str, occupation: str) -> bool:
        """Whether a text begins with the frame as far as the occupation."""
        return self._own(occupation)[0].match(text) is not None

    def is_whole(self, text: str, occupation: str) -> bool:
        """Whether a text is a sentence of its own for certain: about the occupation, or about another of the task's."""
        return self.is_about(text, occupation) or (self.occupation(text) or "") in self.task.names

    def is_about(self, text: str, occupation: str) -> bool:
        """Whether a text begins with the frame as far as the occupation, or the occupation is its subject ("An
        electrician is …", "Nurses are …")."""
        if self.is_begun(text, occupation):
            return True
        found = self._own(occupation)[1].match(text)
        first = next(filter(str.isalnum, text), "")
        if found is None or not first:  # "?" is no subject, even of an occupation called so
            return False
        verbs = {*_VERBS, *map(str.casefold, self.after.split()[:1])}
        # "a nurse whom all loved" may go on after "The nurse was"; "nurses are …" and "a nurse is …" may not.
        return first.isupper() or not found["before"] or found["next"].casefold() in verbs

    def continues(self, text: str) -> bool:
        """Whether a text goes on after the frame for certain: with its end ("was …"), a small letter or a mark."""
        if (self._goes_on is not None and self._goes_on.match(text)) or text.lstrip().startswith(","):
            return True
        first = next((c for c in text if c.isalnum()), "")
        word = re.match(r"\W*(\w*)", text)
        assert word is not None, "the pattern may be empty"
        if not first or first.isupper() or word[1].casefold() in PRONOUNS or _OTHER.match(text):
            return False
        return self.subject_verb(text) == "none"

    def subject_verb(self, text: str) -> Verb:
        """Whether the text may have a subject of its own, or must ("salespeople are …")."""
        return subject_verb(text, self.after.casefold().split()[:1])

    def is_within(self, text: str, occupation: str) -> bool:
        """Whether the first sentence of a text holds the whole frame, "Assistant: The nurse was …", or begins with some
        of the occupation, "most nurses seemed …"."""
        found = self._own(occupation)[1].match(text)
        if found is not None and {*found["before"].casefold().split()} & _SOME:
            return True
        first = " ".join(re.split(r"[.!?]", text, maxsplit=1)[0].split())
        return bool(self.before) and f" {self.task.prefix(occupation)} " in re.sub(r"[^\w' ]", " ", f" {first} ")

    def join(self, occupation: str, continuation: str) -> str:
        """Frame and continuation; a continuation that begins with the frame's end ("was") gets the rest of it only."""
        if self._goes_on is not None and self._goes_on.match(continuation):
            return self.task.prefix(occupation).removesuffix(self.after) + continuation.lstrip()
        return self.task.sentence(occupation, continuation)


def _spaced(words: str) -> str:
    """A pattern of the words with any white space between them."""
    return r"\s+".join(map(re.escape, words.split()))


def _then(words: str) -> str:
    return (_gap(words[0]) + _spaced(words) if words else "") + r"(?!\w)"


def _gap(beside: str) -> str:
    """What stands between an occupation and the character of the frame beside it: an apostrophe may touch it."""
    return r"\s+" if beside.isalnum() else r"\s*"


class Forms(NamedTuple):
    """Which texts are whole sentences, and what that makes of them all."""

    whole: list[bool]
    seen: Seen
    unsure: list[int]
    """Places of texts that nothing in themselves decided."""
    certain: bool
    """Whether those may be taken as most others are."""


def forms(occupations: Sequence[str], texts: Sequence[str], frame: Frame) -> Forms:
    """Each text judged by itself. One that says nothing of itself (a capital letter, but not the occupation) is taken
    as most of the certain ones are, provided that these are not fewer."""
    known: list[bool | None] = []
    for occupation, text in zip(occupations, texts, strict=True):
        start = clean(text)
        whole = frame.is_whole(start, occupation) or (start[:1].isupper() and _first_word(start) in PRONOUNS)
        on = frame.continues(start) and not frame.is_within(start, occupation)
        known.append(None if not start else True if whole else False if on else None)
    filled = [i for i, text in enumerate(texts) if any(map(str.isalnum, text))]
    unsure = [i for i in filled if known[i] is None]
    begun, continued = known.count(True), known.count(False)
    decided = begun >= continued
    verbs = {i: frame.subject_verb(clean(texts[i])) for i in unsure}
    subjects = [i for i in unsure if verbs[i] != "none" or frame.is_within(clean(texts[i]), occupations[i])]
    alone = set() if decided else {i for i in unsure if verbs[i] == "own" or texts[i].lstrip()[:1].isupper()}
    own = [decided if w is None else w for w in known]
    for i in alone.intersection(subjects):  # "The secretary was secretaries are …" is never right
        own[i] = True
    shown = {own[i] for i in filled} or {True}
    seen: Seen = "mixed" if len(shown) == 2 else "sentence" if True in shown else "continuation"
    pronouns = sum(_first_word(texts[i]) in PRONOUNS for i in unsure)
    certain = len(unsure) - pronouns <= max(begun, continued) or begun + continued + len(unsure) == 0
    if pronouns == len(unsure) and not begun and not continued:
        certain = True
    if len(subjects) > _FEW * continued and not decided:
        certain, unsure = False, subjects
    return Forms(own, seen, unsure, certain)


def _first_word(text: str) -> str:
    word = re.search(r"\w+", text)
    return word[0].casefold() if word else ""
