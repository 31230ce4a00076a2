"""The kinds of values that a task file holds, each checked, and refused with its line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.errors import UserError
from equipoise.protocol.folding import fold_term
from equipoise.protocol.task_file import Document


class Values:
    """A document's values. Every method raises UserError, with file and line, for a value of another kind."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.data = self.mapping(document.data, "a task file", "name: ...")

    def error(self, message: str, *place: str | int) -> UserError:
        return self.document.error(message, *place)

    def mapping(self, value: Any, what: str, example: str, *place: str | int) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.error(f"{what} is {kind(value)}; expected names and values, one a line: `{example}`", *place)
        for key in value:
            if not isinstance(key, str):
                raise self.error(f"a key of {what} is {kind(key)}; expected text", *place)
            self.text(key, f"a key of {what}", *place, key)
        return value

    def text(self, value: Any, what: str, *place: str | int) -> str:
        """One line of text, with one space where there is white space."""
        if not isinstance(value, str):
            quoted = "" if value is None or isinstance(value, list | tuple | Mapping) else "; put it in quotation marks"
            raise self.error(f"{what} is {kind(value)}; expected text{quoted}", *place)
        if not value.strip():
            raise self.error(f"{what} is empty; expected text", *place)
        return " ".join(value.split())

    def list(self, value: Any, what: str, *place: str | int) -> Sequence[Any]:
        if not isinstance(value, list | tuple):
            raise self.error(f"{what} is {kind(value)}; expected a list: `[...]`, or one `- ...` a line", *place)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """The list of texts under a key, each once; none where the key is missing or has no value."""
        value = self.data.get(key)
        return () if value is None else self.distinct(value, f"`{key}`", key)

    def distinct(self, value: Any, what: str, *place: str | int) -> tuple[str, ...]:
        found: dict[str, str] = {}
        for i, entry in enumerate(self.list(value, what, *place)):
            text = self.text(entry, f"an entry of {what}", *place, i)
            if fold_term(text) in found:
                raise self.error(f"{text!r} comes twice in {what}; remove one", *place, i)
            found[fold_term(text)] = text
        return tuple(found.values())


def kind(value: Any) -> str:
    """What a value of the wrong kind is, for a message."""
    if value is None:
        return "empty"
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"the list {list(map(_plain, value))}" if len(value) < 5 else "a list"
    return f"the text {value!r}" if isinstance(value, str) else f"{value}"


def _plain(value: Any) -> Any:
    return getattr(value, "written", value)


def nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
