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

from equipoise.errors import UserError

Place = tuple[str | int, ...]
"""Where something stands in a document: keys, and numbers in lists."""

LARGEST = 1 << 20
"""Bytes of a task file."""
DEEPEST = 16
"""Lists and mappings in one another; a task needs three."""
MOST_REPEATED = 1000
"""Values that aliases (`*name`) may repeat."""

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"


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
    where = str(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"cannot read the task file {where} ({error.strerror}): give an existing YAML file") from None
    if len(content) > LARGEST:
        raise UserError(
            f"{where} has more than {LARGEST:,} bytes, too many for a task file: give one like the examples"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}, line {line}: a byte is not UTF-8; save the file as UTF-8") from None
    return parse_document(text, where)


def parse_document(text: str, where: str) -> Document:
    """The document that a YAML text holds. Raises UserError as `read_document` does."""
    if unprintable := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, unprintable.start()) + 1
        raise UserError(f"{where}, line {line}: the character {unprintable[0]!r} cannot stand in YAML; remove it")
    try:
        _check_depth(text, where)
        loader = _LOADER(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}" if mark else ""
        problem = " ".join((error.problem or error.context or "unreadable").split())
        if "single document" in problem or "single document" in str(error.context):
            raise UserError(f"{where}{at}: a second document begins; a task file holds one") from None
        hint = "indent with spaces" if "\\t" in problem else "put text with special characters in quotation marks"
        raise UserError(f"{where}{at}: this is no YAML ({problem}); {hint}") from None
    if node is None or node.tag == _TAG + "null":
        raise UserError(f"{where} is empty; a task file has at least a name, occupations and classes")
    reading = _Reading(where)
    return Document(reading.value(node, ()), where, reading.lines)


def _check_depth(text: str, where: str) -> None:
    """Before nodes are made, which calls itself for every list inside another."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise UserError(f"{where}, line {line}: nested more than {DEEPEST} deep; a task needs three levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Reading:
    """From YAML's nodes to plain data and the lines of its parts."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: dict[Place, int] = {}
        self.met: set[int] = set()
        self.open: set[int] = set()
        self.repeated = 0

    def error(self, node: yaml.Node, message: str) -> UserError:
        return UserError(f"{self.where}, line {node.start_mark.line + 1}: {message}")

    def value(self, node: yaml.Node, place: Place) -> Any:
        self.lines.setdefault(place, node.start_mark.line + 1)
        self.repeated += id(node) in self.met
        self.met.add(id(node))
        if id(node) in self.open or self.repeated > MOST_REPEATED:
            raise self.error(node, "aliases (*name) repeat too much here; write out what they stand for")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        self.open.add(id(node))
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            result: Any = [self.value(child, (*place, i)) for i, child in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            result = self.mapping(node, place)
        else:
            raise self.error(node, f"the tag {node.tag!r} has no place in a task file; leave it out")
        self.open.remove(id(node))
        return result

    def mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else key_node.value
            if not isinstance(key, str):
                given = "a list or mapping" if isinstance(key, list) else "nothing" if key is None else key
                raise self.error(key_node, f"the key is {given}; expected text, in quotation marks if need be")
            if key in result:
                first = self.lines[(*place, key)]
                raise self.error(key_node, f"the key {key!r} stands on line {first} already; remove one of the two")
            self.lines[(*place, key)] = key_node.start_mark.line + 1
            result[key] = self.value(value_node, (*place, key))
        return result

    def scalar(self, node: yaml.ScalarNode) -> str | int | Unquoted | None:
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return str(node.value)
        if kind == "null":
            return None
        if kind == "int" and re.fullmatch(r"[-+]?(0|[1-9][0-9]{0,8})", node.value):
            return int(node.value)
        if kind in _MEANINGS:
            return Unquoted(node.value, _MEANINGS[kind])
        raise self.error(node, f"the tag {node.tag!r} has no place in a task file; leave it out")
