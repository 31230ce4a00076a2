"""Whether a text may have a subject of its own: told from verbs that need one, and from where its clauses begin."""

import re
from collections.abc import Collection
from typing import Literal

Verb = Literal["none", "possible", "own"]
"""`own`: the text is a sentence whatever is before it ("secretaries are …"); `possible`: perhaps ("told she was …")."""

PRONOUNS = frozenset(
    ("i", "you", "he", "she", "it", "we", "they", "this", "that", "these", "those", "ich", "du", "er", "sie",
     "es", "wir", "ihr", "il", "elle", "ils", "elles", "nous", "él", "ella", "ellos", "ellas")
)  # fmt: skip
"""Words that begin a sentence of their own."""
_ENGLISH = frozenset(("is", "are", "was", "were", "has", "have"))
"""Verbs that have a subject before them, so that a text with one of them at its beginning may be a sentence."""
_OTHERS = frozenset(("ist", "sind", "war", "waren", "hat", "haben", "hatte", "hatten", "wird", "werden", "gilt",
                     "gelten", "est", "sont", "était", "étaient"))  # fmt: skip
"""The same for frames that are not English, whose "war" and "hat" are no verbs."""
_AUXILIARIES = frozenset(("can", "could", "will", "would", "must", "should", "may", "might", "had", "do", "does", "did",
                          "seem", "seems", "seemed", "tend", "tends"))  # fmt: skip
"""Verbs that are such too, but behind a pronoun: "a friend you can trust" goes on after the frame."""
_JOINTS = frozenset(("and", "or", "but", "nor", "what", "because", "when", "while", "where", "if", "than", "though",
                     "although", "since", "until", "so", "how", "why", "und", "oder", "aber", "weil", "dass", "wo",
                     "wenn", "ob", "als", "et", "ou", "mais", "qui", "que"))  # fmt: skip
"""Words behind which another clause has a subject of its own."""
_OPENING = frozenset(("when", "while", "where", "if", "though", "although", "since", "until", "because", "wenn", "weil",
                      "als"))  # fmt: skip
"""Those that begin a clause before the one that the sentence is of: "when asked, nurses are …"."""
_RELATIVE = frozenset(("who", "whom", "whose", "which", "that"))
"""Words of a clause within the subject: "people who work here are …"; but "a leader who was kind" goes on after it."""
_FIRST_WORDS = 7
"""Words among which the verb of a subject is looked for."""
_CLOSE = 4
"""Words among which those that may be another clause's as well are looked for."""
_CLAUSE_WORDS = 14
"""The same where another clause is before it."""


def subject_verb(text: str, after: Collection[str] = ()) -> Verb:
    """Whether a verb stands so early that what is before it may be its subject: "salespeople are …", "as a nurse she
    was …", "in the office, secretaries are …", "people who work here are …". One at the very beginning has none.

    `after`: the words that follow the occupation in the frame, in small letters.
    """
    words = [word.casefold() for word in re.findall(r"\w[\w'\u2019-]*|[.,;:!?()\u2013\u2014]|--", text)[:_CLAUSE_WORDS]]
    verbs = frozenset(after) | (_ENGLISH if _ENGLISH.intersection(after) else _ENGLISH | _OTHERS)
    place = _verb(words, 0, _FIRST_WORDS, verbs, _AUXILIARIES)
    if place is not None:
        return "own" if place == 1 else "possible"
    stop = next((i for i, word in enumerate(words) if not word[0].isalnum() or word in _JOINTS | _RELATIVE), 0)
    if words and words[0] in _OPENING and "," in words:
        stop = words.index(",")
    if stop and words[stop] in _RELATIVE:
        return "possible" if _has_matrix_verb(words, stop, verbs) else "none"
    behind = bool(stop) and words[stop] == "," and _verb(words, stop + 1, _CLAUSE_WORDS, verbs) is not None
    return "possible" if behind else "none"


def _verb(words: list[str], begin: int, end: int, verbs: Collection[str], close: Collection[str] = ()) -> int | None:
    """Where the first verb is that has a subject since `begin`, before the clause ends; those in `close` count among
    the first words alone, and behind no pronoun."""
    for i, word in enumerate(words[begin:end], begin):
        near = word in close and i < begin + _CLOSE and (i == begin + 1 or words[i - 1] not in PRONOUNS)
        if i > begin and (word in verbs or near) and words[i - 1] != "to":
            return i
        if word in _JOINTS | _RELATIVE - {"that"} or not word[0].isalnum() or (word == "that" and i > begin):
            return None
    return None


def _has_matrix_verb(words: list[str], relative: int, verbs: Collection[str]) -> bool:
    """Whether a clause that a relative pronoun begins is followed by the verb of what it belongs to.

    Of two verbs the second is the other's; so may be the only one, unless it follows "who" at once, or the clause has
    another subject ("whose work …"). "That" behind anything but people begins what was said or felt as often.
    """
    if words[relative] == "that" and not _are_people(words[relative - 1]):
        return False
    first = words[relative] in ("whose", "whom")
    for i in range(relative + 1, len(words)):
        if words[i] in _JOINTS | _RELATIVE | PRONOUNS or not words[i][0].isalnum():
            return False
        if words[i] in verbs:
            if not first and i > relative + 1:
                return True
            first = False
    return False


def _are_people(word: str) -> bool:
    return word.endswith("s") or word in {"people", "men", "women", "person", "man", "woman", "anyone", "someone"}
