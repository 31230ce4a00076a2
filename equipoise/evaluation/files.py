"""The five files of an evaluation."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from equipoise.errors import UserError
from equipoise.evaluation.inputs import Judged
from equipoise.evaluation.measure import Measured
from equipoise.evaluation.results import Estimate, Evaluation, row_columns
from equipoise.evaluation.stored import is_evaluation, to_csv, to_json
from equipoise.runs.files import write_together
from equipoise.runs.locks import locked_folder
from equipoise.runs.ownership import look

FILES = ("evaluation.json", "rows.csv", "methods.csv", "occupations.csv", "comparisons.csv")


def check(folder: Path) -> None:
    """Raises UserError where anything but an evaluation's files lies where they would be written. Writes nothing."""
    found = look(folder / "evaluation.json", is_evaluation, b'{"version":')
    foreign = ["evaluation.json"] if found.state == "foreign" else []
    for name, columns in _FIRST_COLUMNS.items():
        if os.path.lexists(folder / name) and (found.state == "absent" or not _begins(folder / name, columns)):
            foreign.append(name)
    if foreign:
        raise UserError(
            f"{folder / foreign[0]} is there and equipoise evaluate did not write it (there is no evaluation.json of "
            "its own, or the file begins otherwise), so it is not this program's to replace: move it away, or choose "
            "another --output"
        )


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[None]:
    """`check`, make sure that the folder can be written, and keep other processes out of it meanwhile. Raises
    UserError."""
    check(folder)
    with locked_folder(folder, f"writing to {folder}: wait for it, or choose another --output", "--output"):
        check(folder)
        yield


def _begins(path: Path, columns: str) -> bool:
    """Whether it is a file, no link, with a first line that begins so."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(columns)) == columns.encode()


def write(folder: Path, evaluation: Evaluation, rows: Sequence[Measured], judged: Judged) -> None:
    """The five files, replaced when all of them are written. Raises UserError if they cannot be written."""
    contents: dict[str, str | bytes] = {"evaluation.json": to_json(evaluation)}
    for name, (columns, cells) in tables(evaluation, rows, judged).items():
        contents[f"{name}.csv"] = to_csv(columns, cells)
    try:
        write_together({folder / name: contents[name] for name in FILES})
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): free some space or choose another --output"
        ) from None


def tables(
    evaluation: Evaluation, rows: Sequence[Measured], judged: Judged
) -> dict[str, tuple[Sequence[str], Iterator[list[Any]]]]:
    """The columns and rows of each table, by the name of its file without the ending."""
    extra = [f"{what}@{name}" for name in judged.scores or {} for what in ("NLL", "Tokens")]
    extra += [f"Acceptable@{c}" for c in judged.acceptable or {}]
    columns = [*row_columns(list(evaluation.lexicon)), *extra, *(f"Acceptability@{c}" for c in judged.probed or {})]
    return {
        "rows": (columns, _row_cells(evaluation, rows, judged)),
        "methods": (_METHOD_COLUMNS, _method_cells(evaluation)),
        "occupations": (("Occupation", *_METHOD_COLUMNS), _occupation_cells(evaluation)),
        "comparisons": (_COMPARISON_COLUMNS, _comparison_cells(evaluation)),
    }


def _row_cells(evaluation: Evaluation, rows: Sequence[Measured], judged: Judged) -> Iterator[list[Any]]:
    scores, acceptable = judged.scores or {}, judged.acceptable or {}
    for i, m in enumerate(rows):
        row, found, reward = m.row, m.found, m.found.reward
        cells = [
            evaluation.files[row.file].path, row.line, row.method, row.model, row.seed, row.occupation, row.run_id,
            row.text, reward.words, *map(";".join, reward.terms), found.outcome, found.strict, found.complete,
            found.in_length, reward.base, reward.bonus, reward.length_penalty,
            reward.repetition_penalty, reward.reward, m.duplicate,
            ";".join(word for kind in m.language.gendered for word in kind), ";".join(m.language.negated),
        ]  # fmt: skip
        for judge in scores.values():
            cells += [float(judge.nll_N[i]), int(judge.tokens_N[i])]
        cells += [int(values[i]) for values in acceptable.values()]
        cells += [float(values[i]) if math.isfinite(values[i]) else "" for values in (judged.probed or {}).values()]
        yield cells


_METHOD_COLUMNS = ("Method", "Metric", "Tier", "Unit", "Value", "Low", "High", "N", "Interval", "WilsonLow",
                   "WilsonHigh", "EqualN", "ValueAtEqualN", "Note")  # fmt: skip


_COMPARISON_COLUMNS = ("Metric", "Family", "A", "B", "Difference", "Low", "High", "PSignFlip", "PWilcoxon", "PHolm",
                       "CohensH", "CliffsDelta", "Margin", "PNonInferior", "PEquivalent", "NOccupations",
                       "LogOdds", "LogOddsLow", "LogOddsHigh", "PMixed", "SDOccupation", "SDDifference",
                       "Note")  # fmt: skip

_FIRST_COLUMNS = {
    "rows.csv": "File,Line,Method,Model,",
    "methods.csv": ",".join(_METHOD_COLUMNS[:4]),
    "occupations.csv": ",".join(("Occupation", *_METHOD_COLUMNS[:4])),
    "comparisons.csv": ",".join(_COMPARISON_COLUMNS[:4]),
}


def _estimate_cells(evaluation: Evaluation, name: str, key: str, e: Estimate, equal: Estimate | None) -> list[Any]:
    metric = evaluation.metrics[key]
    wilson = e.wilson or (None, None)
    at = (None, None) if equal is None else (evaluation.equal_n, equal.value)
    return [name, key, metric.tier, metric.unit, e.value, e.low, e.high, e.n, e.interval, *wilson, *at, e.note]


def _method_cells(evaluation: Evaluation) -> Iterator[list[Any]]:
    for name, method in evaluation.methods.items():
        for key, estimate in method.metrics.items():
            yield _estimate_cells(evaluation, name, key, estimate, method.equal_n.get(key))


def _occupation_cells(evaluation: Evaluation) -> Iterator[list[Any]]:
    for name, method in evaluation.methods.items():
        for occupation, found in method.occupations.items():
            for key, estimate in found.items():
                yield [occupation, *_estimate_cells(evaluation, name, key, estimate, None)]


def _comparison_cells(evaluation: Evaluation) -> Iterator[list[Any]]:
    for c in evaluation.comparisons:
        tost = [None] * 3 if c.tost is None else [c.tost.margin, c.tost.p_noninferior, c.tost.p_equivalent]
        m = c.mixed
        mixed = [None] * 6 if m is None else [m.log_odds, m.low, m.high, m.p, m.sd_occupation, m.sd_difference]
        note = "; ".join(filter(None, (c.note, c.tost.note if c.tost else "", m.note if m else "")))
        yield [
            c.metric, c.family, c.a, c.b, c.difference, c.low, c.high, c.p_sign_flip, c.p_wilcoxon, c.p_holm,
            c.cohens_h, c.cliffs_delta, *tost, c.n_occupations, *mixed, note,
        ]  # fmt: skip
