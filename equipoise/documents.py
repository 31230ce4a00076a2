"""The one reader for YAML and the one for JSON: plain data only, bounded in size and depth, faults told in one line.

A few hundred bytes of YAML can stand for gigabytes, a thousand brackets exhaust a parser, and of a key that stands
twice a library silently takes the last. A file that does any of it is refused before anything is made of it.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from equipoise.errors import UserError, brief

LARGEST_YAML = 1 << 20
"""Bytes of a file that people write."""
LARGEST_JSON = 1 << 30
"""Bytes of a file that programs write."""
DEEPEST_YAML = 16
"""Lists and mappings in one another."""
DEEPEST_JSON = 100
MOST_REPEATED = 1000
"""Values that aliases (`*name`) may repeat."""
LONGEST_NUMBER = 64
"""Characters of a number: the time that Python needs for one grows faster than its length."""

TAG = "tag:yaml.org,2002:"
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TRUE, _FALSE = ("yes", "true", "on"), ("no", "false", "off")
_PLAIN_TAGS = ("str", "null", "bool", "int", "float", "timestamp", "merge", "value")


# YAML


def read_text(path: Path, what: str, largest: int = LARGEST_YAML) -> str:
    """A UTF-8 file. `what` is what it should be, "the task file". Raises UserError."""
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {what} {brief(path)} ({reason}): give an existing file") from None
    if len(content) > largest:
        raise UserError(f"{path} has more than {largest:,} bytes, too many for {what}: give a smaller file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: a byte is not UTF-8; save the file as UTF-8") from None


def compose_yaml(text: str, where: str) -> yaml.Node | None:
    """The nodes of the one document in `text`; None where it holds nothing.

    They are of YAML's own kinds, no deeper than `DEEPEST_YAML`, aliases repeat no more than `MOST_REPEATED` of them,
    and no mapping has a key twice. Raises UserError, with `where` and a line, for everything else.
    """
    if unprintable := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, unprintable.start()) + 1
        raise UserError(f"{where}, line {line}: the character {unprintable[0]!r} cannot stand in YAML; remove it")
    try:
        _check_depth(text, where)
        loader = LOADER(text)
        try:
            node: yaml.Node | None = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _no_yaml(text, where, error) from None
    if node is None or node.tag == TAG + "null":
        return None
    _Check(where).node(node)
    return node


def _no_yaml(text: str, where: str, error: yaml.MarkedYAMLError) -> UserError:
    """What is wrong, on which line, and what helps."""
    problem = " ".join((error.problem or error.context or "unreadable").split())
    unclosed = "unexpected end of stream" in problem and error.context_mark is not None
    mark = error.context_mark if unclosed else error.problem_mark or error.context_mark
    lines = text.splitlines() or [""]
    number = min(mark.line, len(lines) - 1) if mark else 0
    at = f", line {number + 1}" if mark else ""
    if "single document" in problem or "single document" in str(error.context):
        return UserError(f"{where}{at}: a second document begins; a file holds one")
    if "nesting depth" in problem:  # the library's own bound, which is met first where brackets follow each other
        return _too_deep(where, number + 1)
    if "\t" in lines[number]:
        hint = "indent and separate with spaces, not tabs"
    elif unclosed:
        hint = "end the quotation that begins here"
    else:
        hint = "put text with special characters in quotation marks"
    return UserError(f"{where}{at}: this is no YAML ({problem}); {hint}")


def parse_yaml(text: str, where: str) -> Any:
    """Plain data: None, bool, int, float, str, and lists and dicts of them; dates stay text. Raises UserError."""
    node = compose_yaml(text, where)
    return None if node is None else _plain(node, where)


def read_yaml(path: Path, what: str) -> Any:
    """`parse_yaml` of a file. Raises UserError."""
    return parse_yaml(read_text(path, what), str(path))


def at_line(node: yaml.Node, where: str, message: str) -> UserError:
    """The message with file and line."""
    return UserError(f"{where}, line {node.start_mark.line + 1}: {message}")


def _check_depth(text: str, where: str) -> None:
    """Before nodes are made, which calls itself for every list inside another."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST_YAML:
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise _too_deep(where, line)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _too_deep(where: str, line: int) -> UserError:
    return UserError(f"{where}, line {line}: nested more than {DEEPEST_YAML} deep; write it flatter")


class _Check:
    """One walk over nodes as if every alias were written out, ended as soon as that gets too much."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.met: set[int] = set()
        self.open: set[int] = set()
        self.repeated = 0

    def node(self, node: yaml.Node) -> None:
        self.repeated += id(node) in self.met
        self.met.add(id(node))
        if id(node) in self.open or self.repeated > MOST_REPEATED:
            raise at_line(node, self.where, "aliases (*name) repeat too much here; write out what they stand for")
        kinds = {yaml.SequenceNode: ("seq",), yaml.MappingNode: ("map",), yaml.ScalarNode: _PLAIN_TAGS}[type(node)]
        if node.tag.removeprefix(TAG) not in kinds or not node.tag.startswith(TAG):
            raise at_line(node, self.where, f"the tag {node.tag!r} has no place here; leave it out")
        if isinstance(node, yaml.ScalarNode):
            return
        self.open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self.keys(node)
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                self.node(part)
        self.open.remove(id(node))

    def keys(self, node: yaml.MappingNode) -> None:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = (key.tag, key.value)
                if name in lines:
                    message = f"the key {key.value!r} stands on line {lines[name]} already; remove one of the two"
                    raise at_line(key, self.where, message)
                lines[name] = key.start_mark.line + 1


def _plain(node: yaml.Node, where: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, where)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, where) for child in node.value]
    merged: dict[Any, Any] = {}
    own: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise at_line(key_node, where, "a key is a list or mapping; expected text")
        if key_node.tag == TAG + "merge":
            for part in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                if not isinstance(part, yaml.MappingNode):
                    raise at_line(part, where, "`<<` merges mappings, and this is none")
                merged = _plain(part, where) | merged
        else:
            own[_scalar(key_node, where)] = _plain(value_node, where)
    return merged | own


def _scalar(node: yaml.ScalarNode, where: str) -> Any:
    kind, text = node.tag.removeprefix(TAG), node.value
    if kind == "null":
        return None
    if kind == "bool":
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
    elif kind == "int":
        # YAML reads 010 as eight and 1:30 as ninety.
        if len(text) <= LONGEST_NUMBER and re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", text):
            return int(text)
    elif kind == "float":
        special = {".inf": "inf", ".nan": "nan"}.get(text.lower().lstrip("+-"))
        sign = "-" if text.startswith("-") else ""
        if special:
            return float(sign + special)
        if len(text) <= LONGEST_NUMBER and re.fullmatch(r"[-+]?[0-9._]*[0-9._]([eE][-+]?[0-9]+)?", text):
            try:
                return float(text)
            except ValueError:
                pass
    else:
        return str(text)
    named = {"bool": "yes or no", "int": "a whole number", "float": "a number"}[kind]
    raise at_line(node, where, f"{text[:40]} is no plain way to write {named}; write it plainly, or quote it as text")


# JSON


def parse_json(
    data: bytes | str, *, unique: bool = False, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The data of a JSON text; `unique`: a key may not stand twice in an object; `pairs`: makes an object of its keys
    and values.

    Raises ValueError, in one line, for what is no JSON, or deeper than `DEEPEST_JSON`.
    """
    try:
        document = json.loads(data, object_pairs_hook=_once if unique else pairs)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST_JSON} deep") from None
    # Whatever is made of it will call itself for every level.
    level: list[Any] = [document]
    for _ in range(DEEPEST_JSON):
        level = list(_within(level))
        if not level:
            return document
    raise ValueError(f"nested more than {DEEPEST_JSON} deep")


def read_json(path: Path, *, largest: int = LARGEST_JSON, unique: bool = False) -> Any:
    """`parse_json` of a file. Raises OSError where it cannot be read, ValueError where it is none or too large."""
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"more than {largest:,} bytes")
    return parse_json(data, unique=unique)


def _within(level: list[Any]) -> Iterator[Any]:
    """The lists and objects in those of `level`."""
    for container in level:
        values = container.values() if isinstance(container, dict) else container if isinstance(container, list) else ()
        yield from (value for value in values if isinstance(value, (dict, list)))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.60} stands twice in one object")
        found[key] = value
    return found
