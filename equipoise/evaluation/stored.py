"""`evaluation.json` and `rows.csv` as texts: written, and read back as what they were."""

import csv
import dataclasses
import io
import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from equipoise.documents import parse_json
from equipoise.errors import UserError
from equipoise.evaluation.results import VERSION, Evaluation
from equipoise.runs.ownership import marked
from equipoise.tables.read import LONGEST_FIELD


def to_json(evaluation: Evaluation) -> str:
    """The text of evaluation.json, in ASCII, so that any text survives any reader."""
    return json.dumps(marked(dataclasses.asdict(evaluation)), indent=1, allow_nan=False) + "\n"


def is_evaluation(document: Mapping[str, Any]) -> bool:
    """The shape of an evaluation.json, of any version, before records were marked."""
    made = document.get("provenance")
    parts = {"version", "settings", "files", "lexicon", "judges", "metrics", "methods", "frontier"}
    return parts <= set(document) and isinstance(made, dict) and "equipoise" in made


def from_json(text: str | bytes) -> Evaluation:
    """Raises UserError for a text that is no evaluation of this version."""
    try:
        document = parse_json(text)
        version = document["version"]
    except (ValueError, KeyError, TypeError):
        raise UserError("that is no evaluation.json: give one that `equipoise evaluate` wrote") from None
    if version != VERSION:
        raise UserError(f"evaluation.json is of version {version}, expected {VERSION}: run `equipoise evaluate` again")
    try:
        document.pop("written_by", None)
        evaluation: Evaluation = _build(Evaluation, document)
        task = evaluation.task
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"evaluation.json is damaged ({type(error).__name__}: {error}): run `equipoise evaluate` again"
        ) from None
    if evaluation.lexicon != {name: terms for name, terms in task.classes}:
        raise UserError(
            "evaluation.json is of other terms than its task's (an earlier version took them from --lexicon): write a "
            "task file and run `equipoise evaluate` again with --task"
        )
    return evaluation


def read(folder: Path) -> Evaluation:
    """The evaluation in `folder`. Raises UserError."""
    path = folder / "evaluation.json"
    try:
        return from_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give the --output of `equipoise evaluate`") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _build(kind: Any, value: Any) -> Any:
    """`value`, of JSON's types, as the annotated type `kind`. Raises KeyError, TypeError or ValueError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        (inner,) = (a for a in arguments if a is not types.NoneType)
        return _build(inner, value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{value!r} is none of {arguments}")
        return value
    if origin is dict:
        return {str(name): _build(arguments[1], item) for name, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"expected a list, not {value!r:.40}")
        inner_kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return tuple(_build(inner, item) for inner, item in zip(inner_kinds, value, strict=True))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"expected {kind.__name__}, not {value!r:.40}")
    return value


def to_csv(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> bytes:
    """RFC 4180 in UTF-8. None is an empty field, a whole or true-or-false number has no point."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(list(columns))
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(float(value))
    return value


def read_rows(path: Path) -> Iterator[Mapping[str, str]]:
    """The rows of a CSV that `to_csv` made, by column, every text as it was. Raises UserError."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogatepass")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): run `equipoise evaluate` again") from None
    csv.field_size_limit(LONGEST_FIELD)
    yield from csv.DictReader(io.StringIO(text, newline=""))
