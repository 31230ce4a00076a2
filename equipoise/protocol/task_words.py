"""The word lists of a task file, `gendered` and `negations`, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping

from equipoise.protocol.lexicon import TermClass, TermError, checked
from equipoise.protocol.task_values import Values, nearest
from equipoise.protocol.word_lists import Negations, WordLists


def word_lists(values: Values) -> WordLists:
    """What the file says of them. Raises UserError, with file and line, for what cannot be."""
    return WordLists(_gendered(values), _negations(values))


def _gendered(values: Values) -> tuple[TermClass, ...] | None:
    given = values.data.get("gendered")
    if given is None or given == []:
        return None if given is None else ()
    kinds: list[TermClass] = []
    for name, words in values.mapping(given, "`gendered`", "female: [she, her]", "gendered").items():
        if not re.fullmatch(r"[\w-]+", name) or not any(map(str.isalnum, name)):
            message = f"a kind of gendered words is named {name!r}; use letters or digits, and '-' and '_' between them"
            raise values.error(message, "gendered", name)
        kinds.append(TermClass(name, values.distinct(words, f"the {name} words", "gendered", name)))
    if not kinds:
        return ()
    try:
        return checked(kinds)
    except TermError as error:
        place: tuple[str | int, ...] = (*(kinds[number].name for number in error.place[:1]), *error.place[1:])
        raise values.error(f"`gendered`: {error}", "gendered", *place) from None


def _negations(values: Values) -> Negations | None:
    given = values.data.get("negations")
    if given is None:
        return None
    parts: dict[str, tuple[str, ...]] = {"cues": ()}
    if isinstance(given, Mapping):
        parts = {name: (name,) for name in values.mapping(given, "`negations`", "cues: [not]", "negations")}
    else:
        given = {"cues": given}
    for name in given:
        if name not in Negations._fields:
            known = ", ".join(Negations._fields)
            message = f"there is no {name!r} of `negations`{nearest(name, Negations._fields)}; give {known}"
            raise values.error(message, "negations", name)
    found: dict[str, tuple[str, ...]] = {}
    for name, words in given.items():
        place = ("negations", *parts[name])
        listed = values.distinct([] if words is None else words, f"the {name} of `negations`", *place)
        try:
            found[name] = checked([TermClass(name, listed)])[0].terms if listed else ()
        except TermError as error:
            raise values.error(f"`negations`: {error}", *place, *error.place[1:]) from None
    if any(found.values()) and not found.get("cues"):
        without = " and ".join(name for name, words in found.items() if words)
        message = f"`negations` has {without} and no cues, so that nothing would be looked for; give cues: [not]"
        raise values.error(message, "negations")
    return Negations(**{"cues": (), **found})
