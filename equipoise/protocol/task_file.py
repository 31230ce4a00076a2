"""A task file's YAML as plain Python that remembers its line numbers. What it means is for `task_checks`.

Only what a task file needs is read as more than text: lists, mappings and whole numbers. Everything else that YAML has
a meaning for (yes and no, dates, fractions) becomes `Unquoted`, so that the message can say what was written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from equipoise.documents import TAG, at_line, compose_yaml, read_text
from equipoise.errors import UserError

Place = tuple[str | int, ...]
"""Where something stands in a document: keys, and numbers in lists."""


@dataclass(frozen=True)
class Unquoted:
    """A value that YAML reads as something else than text or a whole number."""

    written: str
    meaning: str
    """What YAML takes it for: "true or false"."""

    def __str__(self) -> str:
        return f"{self.written} (which YAML reads as {self.meaning}; in quotation marks it is text)"


_MEANINGS = {
    "bool": "true or false",
    "float": "a number",
    "int": "a number",
    "timestamp": "a date",
    "merge": "a merge key",
    "value": "a default value",
}


@dataclass(frozen=True)
class Document:
    """Plain data, and what an error message says of where in a file it stands."""

    data: Any
    """None, str, int, Unquoted, and lists and dicts of them; of a document made in Python, whatever was given."""
    where: str
    """The file."""
    lines: Mapping[Place, int] = field(default_factory=dict)
    """Line numbers from 1; empty for a document made in Python."""

    def error(self, message: str, *place: str | int) -> UserError:
        """The message with file and line; what is missing in the file gets the line at which the document begins."""
        line = self.lines.get(place, self.lines.get(()))
        return UserError(f"{self.where}{f', line {line}' if line else ''}: {message}")


def read_document(path: Path) -> Document:
    """Raises UserError, with a line number wherever there is one, for what cannot be read or is no plain YAML."""
    return parse_document(read_text(path, "a task file"), str(path))


def parse_document(text: str, where: str) -> Document:
    """The document that a YAML text holds. Raises UserError as `read_document` does."""
    node = compose_yaml(text, where)
    if node is None:
        raise UserError(f"{where} is empty; a task file has at least a name, occupations and classes")
    reading = _Reading(where)
    return Document(reading.value(node, ()), where, reading.lines)


class _Reading:
    """From YAML's nodes to plain data and the lines of its parts."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: dict[Place, int] = {}

    def value(self, node: yaml.Node, place: Place) -> Any:
        self.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, place)
        return [self.value(child, (*place, i)) for i, child in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else key_node.value
            if not isinstance(key, str):
                given = "a list or mapping" if isinstance(key, list) else "nothing" if key is None else key
                raise at_line(key_node, self.where, f"the key is {given}; expected text, in quotation marks if need be")
            self.lines[(*place, key)] = key_node.start_mark.line + 1
            result[key] = self.value(value_node, (*place, key))
        return result

    def scalar(self, node: yaml.ScalarNode) -> str | int | Unquoted | None:
        kind = node.tag.removeprefix(TAG)
        if kind == "str":
            return str(node.value)
        if kind == "null":
            return None
        if kind == "int" and re.fullmatch(r"[-+]?(0|[1-9][0-9]{0,8})", node.value):
            return int(node.value)
        return Unquoted(node.value, _MEANINGS[kind])
