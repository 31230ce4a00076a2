"""A report put together: the evaluation, its figures and tables, the page, the model cards."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from equipoise import __version__
from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.evaluation import fairness_tables, formats, modelcard, paper, results, stored, tables
from equipoise.evaluation.config import EvaluateConfig, ReportConfig
from equipoise.evaluation.curves import frontier_plot, training_plots
from equipoise.evaluation.figures import ends, figures
from equipoise.evaluation.files import check
from equipoise.evaluation.page import Content, render
from equipoise.evaluation.plots import as_csv, draw
from equipoise.evaluation.runs import TrainingRun, read_runs
from equipoise.evaluation.samples import Sample, sample
from equipoise.evaluation.sources import Given, Source, measured, recognise
from equipoise.evaluation.spent import spent_plots
from equipoise.protocol.plural import plural
from equipoise.runs.files import write_together, write_whole
from equipoise.runs.locks import locked_folder
from equipoise.runs.ownership import look, marked


def report(
    config: ReportConfig, say: Callable[[str], None] = print, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Write the page, the figures, the tables, and the model cards. Returns lines that say what was written.

    `say` gets a line before anything that takes long; `progress` is told how many texts are judged, of how many, and
    without it there is a bar of its own. Raises UserError.
    """
    given = recognise(config.paths)
    _check_output(config.output)
    runs = read_runs(config.run or given.runs)
    folder = config.output.with_name(config.output.stem + "_files")
    _check_folder(folder, config.output)
    if given.folder is None:
        check(folder / "evaluation")
    with locked_folder(folder, f"writing a report to {folder}: wait for it, or choose another --output", "--output"):
        return _report(config, given, runs, folder, partial(measured, say=say, progress=progress))


def _report(
    config: ReportConfig,
    given: Given,
    runs: Sequence[TrainingRun],
    folder: Path,
    measure: Callable[[Given, EvaluateConfig], Source],
) -> list[str]:
    """`report` while nothing else writes to its folder."""
    choices = EvaluateConfig(
        given.files, folder / "evaluation", judge=config.judge, fluency=config.fluency, base=config.base,
        event=config.event, device=config.device, task=config.task,
    )  # fmt: skip
    evaluation, rows, study = measure(given, choices)
    carded = [(card, modelcard.method_of(card, evaluation, config.card_method)) for card in config.card]
    samples = read_samples(rows, evaluation)
    plots = [*figures(evaluation), frontier_plot(evaluation, runs), *spent_plots(evaluation), *training_plots(runs)]
    drawn = {plot.name: draw(plot) for plot in plots}
    contents: dict[str, str | bytes] = {}
    for each in drawn.values():
        contents |= each.files
    contents |= _texts(evaluation, runs)
    page = render(Content(evaluation, samples, runs, drawn, folder.name, study, file_records(evaluation)))
    if foreign := sorted(name for name in contents if os.path.lexists(folder / name) and name not in _ours(folder)):
        raise UserError(
            f"{folder / foreign[0]} is there and no report wrote it: move it away, or choose another --output"
        )
    record = marked({"equipoise": __version__, "files": sorted({*contents, *_ours(folder)})})
    try:
        # First of all: it is what tells the other files from somebody else's.
        write_whole(folder / RECORD, json.dumps(record, indent=1) + "\n")
        write_together({folder / name: text for name, text in contents.items()} | {config.output: page})
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or config.output} ({error.strerror}): make room, or choose another --output"
        ) from None
    cards = [modelcard.update(folder, evaluation, name) for folder, name in carded]
    return [
        f"{config.output}: {plural(len(evaluation.methods), 'method')}, {plural(len(samples), 'sentence')}",
        f"{folder}: {len(drawn)} figures as PNG, SVG, PDF and CSV, the headline table as Markdown, LaTeX (one column, "
        "two columns) and CSV, the method text as LaTeX, its references as BibTeX",
        *(f"{path}: results of {name}" for path, (_, name) in zip(cards, carded, strict=True)),
    ]


HEADLINE = ("method", "n", "metric", "value", "low", "high")
RECORD = "report.json"
"""Which files of its folder a report wrote: those, and no others, a later one may replace."""
MARK = b'<meta name="generator" content="equipoise report">'


def _check_output(path: Path) -> None:
    """Raises UserError for what is no page, and for a file that no report was written to before."""
    if path.suffix.lower() not in {".html", ".htm"}:
        raise UserError(f"--output {path} is no page: give a name that ends in .html")
    if path.is_symlink():
        raise UserError(f"{path} is a link, and nothing is written through one: choose another --output")
    try:
        with path.open("rb") as file:
            if MARK not in file.read(4096):
                raise UserError(f"{path} is there and no report of equipoise: move it away, or choose another --output")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --output") from None


def _check_folder(folder: Path, page: Path) -> None:
    """Raises UserError where anything but a report's figures and tables lies where they would be written."""
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        raise UserError(f"{folder} is there and no folder of a report: move it away, or choose another --output")
    if (inner := folder / "evaluation").is_symlink():
        raise UserError(f"{inner} is a link, and nothing is written through one: choose another --output")
    names = (*TEXTS, *FAIRNESS, "evaluation")
    there = [folder / name for name in names if os.path.lexists(folder / name)]
    record = look(folder / RECORD, lambda _: False)
    if record.state == "foreign" or (there and not page.exists() and record.state == "absent"):
        raise UserError(
            f"{there[0] if there else folder / RECORD} is there and no report wrote it: move it away, or choose "
            "another --output"
        )


def _ours(folder: Path) -> set[str]:
    """The files in the folder that a report wrote: those on record; all of a figure's and a table's kind where an
    earlier version, which kept no record, wrote one of its own beside the page."""
    found = look(folder / RECORD, lambda _: False)
    files = found.document.get("files")
    if isinstance(files, list):
        return {name for name in files if isinstance(name, str) and not (folder / name).is_symlink()}
    table = folder / "headline.csv"
    if found.state != "absent" or table.is_symlink() or not table.is_file():
        return set()
    with table.open("rb") as file:
        earlier = file.readline().rstrip() == ",".join(HEADLINE).encode()
    kinds = (".png", ".svg", ".csv", ".md", ".tex")
    return {p.name for p in folder.iterdir() if p.suffix in kinds and not p.is_symlink()} if earlier else set()


def read_samples(rows: Path, evaluation: results.Evaluation) -> list[Sample]:
    """The sentences of rows.csv, in its order. Raises UserError."""
    column = f"NLL@{evaluation.judges[0].name}" if evaluation.judges else None
    several = {name for name, method in evaluation.methods.items() if len(method.seeds) > 1}
    try:
        return [sample(row, evaluation.task, column, row["Method"] in several) for row in stored.read_rows(rows)]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{rows} is not as `equipoise evaluate` writes it ({error!r}): run it again") from None


def file_records(evaluation: results.Evaluation) -> dict[str, Any]:
    """What `equipoise generate` and its kin recorded beside each completions file, where it still lies there."""
    out = {}
    for file in evaluation.files:
        try:
            out[file.path] = read_json(Path(f"{file.path}.json"))
        except (OSError, ValueError):
            continue  # made by another program, or moved since
    return out


TEXTS = ("headline.md", "headline.tex", "headline-wide.tex", "headline.csv", "methods.tex", "references.bib")
FAIRNESS = ("fairness.md", "fairness.tex")
"""Not there where an earlier version measured."""


def _texts(evaluation: results.Evaluation, runs: Sequence[TrainingRun]) -> dict[str, str]:
    """`TEXTS`: the headline table as Markdown, for one column of a page, for both, and as CSV; the method text and what
    it cites. Beside them `FAIRNESS`: gendered words and associations in short."""
    table = tables.headline(evaluation)
    rows = [
        (name, method.n, key, *estimate)
        for name, method in evaluation.methods.items()
        for key, estimate in [
            *((key, ends(method.metrics[key])) for key in evaluation.metrics if key in method.metrics),
            ("kl", ends(method.kl)),
        ]
    ]
    texts = (
        formats.markdown(table),
        formats.latex(tables.in_short(evaluation), "tab:headline", wide=False),
        formats.latex(table, "tab:headline-wide", wide=True),
        as_csv(HEADLINE, rows),
        paper.methods_latex(evaluation, runs),
        paper.bibtex(evaluation),
    )
    out = dict(zip(TEXTS, texts, strict=True))
    if (fair := fairness_tables.in_short(evaluation)) is not None:
        pages = formats.markdown(fair), formats.latex(fair, "tab:fairness", wide=True)
        out |= zip(FAIRNESS, pages, strict=True)
    return out
