"""From completion files to measured rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from equipoise.errors import UserError
from equipoise.evaluation.config import EvaluateConfig
from equipoise.evaluation.intervals import Array
from equipoise.evaluation.layout import Columns, Row, arrange, settle_names
from equipoise.evaluation.measure import Measured, measure
from equipoise.evaluation.read import read_table
from equipoise.evaluation.results import File, Judge
from equipoise.evaluation.side import Side, read_side
from equipoise.evaluation.summary import (
    Fluency,
)
from equipoise.protocol.lexicon import Lexicon


@dataclass(frozen=True)
class Inputs:
    """Every row of every file, measured, and what lay beside the files."""

    files: tuple[File, ...]
    rows: list[Measured]
    sides: list[Side | None]


def read_lexicon(path: Path) -> Lexicon:
    """Raises UserError for a file that has not exactly the lists `agentic` and `communal` of good terms."""
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the lexicon {path} ({error.strerror}): give a YAML or JSON file") from None
    except (ValueError, yaml.YAMLError):
        raise UserError(f"the lexicon {path} is neither YAML nor JSON: write two lists, agentic and communal") from None
    lists = [document.get(name) for name in ("agentic", "communal")] if isinstance(document, Mapping) else [None]
    if not all(isinstance(terms, list) for terms in lists):
        raise UserError(f"the lexicon {path} must have the lists agentic and communal")
    return Lexicon(tuple(lists[0]), tuple(lists[1]))  # type: ignore[arg-type]


def read_inputs(config: EvaluateConfig, lexicon: Lexicon) -> Inputs:
    """Every file read and measured. Raises UserError."""
    if not config.files:
        raise UserError("no files given: name one or more files of completions; equipoise evaluate --help says more")
    columns = Columns(config.text_column, config.occupation_column, config.method_column)
    files: list[File] = []
    rows: list[list[Row]] = []
    sides: list[Side | None] = []
    for given in config.files:
        method, path = _named(given)
        if any(path == file.path for file in files):
            raise UserError(f"{path} is given twice: name each file once")
        table = read_table(path, config.encoding)
        own, layout, problems = arrange(
            table, len(files), columns=columns, form=config.form, method=method, seed=_recorded_seed(path)
        )
        files.append(File(path, table.sha256, len(own), layout, tuple(problems)))
        rows.append(own)
        sides.append(read_side(path))
    spelling = settle_names(rows)
    flat = [replace(row, occupation=spelling[row.occupation]) for own in rows for row in own]
    return Inputs(tuple(files), measure(flat, lexicon, config.min_words, config.max_words), sides)


def _named(given: str) -> tuple[str | None, str]:
    name, separator, path = given.partition("=")
    if separator and name.strip() and not Path(given).exists():
        return name.strip(), path
    return None, given


def _recorded_seed(path: str) -> str:
    """The seed in the record that `equipoise generate` leaves beside its file; empty if there is none."""
    try:
        return str(json.loads(Path(f"{path}.json").read_bytes())["settings"]["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@dataclass(frozen=True)
class Judged:
    """What the judges and the classifier say of every row, in order."""

    judges: tuple[Judge, ...] = ()
    scores: Mapping[str, Fluency] | None = None
    acceptable: Mapping[str, Array] | None = None
    notices: tuple[str, ...] = ()
