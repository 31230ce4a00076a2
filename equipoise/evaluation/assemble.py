"""A report put together: the evaluation, its figures and tables, the page, the model cards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equipoise.errors import UserError
from equipoise.evaluation import formats, modelcard, results, stored, tables
from equipoise.evaluation.config import EvaluateConfig, ReportConfig
from equipoise.evaluation.curves import frontier_plot, training_plots
from equipoise.evaluation.figures import ends, figures
from equipoise.evaluation.page import Content, render
from equipoise.evaluation.plots import as_csv, write
from equipoise.evaluation.runs import read_runs
from equipoise.evaluation.samples import Sample, sample
from equipoise.evaluation.sources import measured, recognise
from equipoise.protocol.plural import plural
from equipoise.runs.files import write_whole


def report(config: ReportConfig, say: Callable[[str], None] = print) -> list[str]:
    """Write the page, the figures, the tables, and the model cards. Returns lines that say what was written.

    `say` gets a line before anything that takes long. Raises UserError.
    """
    given = recognise(config.paths)
    _check_output(config.output)
    runs = read_runs(config.run or given.runs)
    folder = config.output.with_name(config.output.stem + "_files")
    choices = EvaluateConfig(
        given.files, folder / "evaluation", judge=config.judge, fluency=config.fluency, base=config.base,
        event=config.event, device=config.device, task=config.task,
    )  # fmt: skip
    evaluation, rows, study = measured(given, choices, say)
    carded = [(card, modelcard.method_of(card, evaluation, config.card_method)) for card in config.card]
    samples = read_samples(rows, evaluation)
    plots = [*figures(evaluation), frontier_plot(evaluation, runs), *training_plots(runs)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = {plot.name: write(plot, folder) for plot in plots}
        _write_tables(evaluation, folder)
        page = render(Content(evaluation, samples, runs, drawn, folder.name, study, file_records(evaluation)))
        write_whole(config.output, page)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or config.output} ({error.strerror}): make room, or choose another --output"
        ) from None
    cards = [modelcard.update(folder, evaluation, name) for folder, name in carded]
    return [
        f"{config.output}: {plural(len(evaluation.methods), 'method')}, {plural(len(samples), 'sentence')}",
        f"{folder}: {len(drawn)} figures as PNG, SVG and CSV, the headline table as Markdown, LaTeX and CSV",
        *(f"{path}: results of {name}" for path, (_, name) in zip(cards, carded, strict=True)),
    ]


MARK = b'<meta name="generator" content="equipoise report">'


def _check_output(path: Path) -> None:
    """Raises UserError for what is no page, and for a file that no report was written to before."""
    if path.suffix.lower() not in {".html", ".htm"}:
        raise UserError(f"--output {path} is no page: give a name that ends in .html")
    try:
        with path.open("rb") as file:
            if MARK not in file.read(4096):
                raise UserError(f"{path} is there and no report of equipoise: move it away, or choose another --output")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --output") from None


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
            out[file.path] = json.loads(Path(f"{file.path}.json").read_bytes())
        except (OSError, ValueError):
            continue  # made by another program, or moved since
    return out


def _write_tables(evaluation: results.Evaluation, folder: Path) -> None:
    table = tables.headline(evaluation)
    (folder / "headline.md").write_text(formats.markdown(table), encoding="utf-8")
    (folder / "headline.tex").write_text(formats.latex(table), encoding="utf-8")
    columns = ("method", "n", "metric", "value", "low", "high")
    rows = [
        (name, method.n, key, *estimate)
        for name, method in evaluation.methods.items()
        for key, estimate in [
            *((key, ends(method.metrics[key])) for key in evaluation.metrics if key in method.metrics),
            ("kl", ends(method.kl)),
        ]
    ]
    (folder / "headline.csv").write_text(as_csv(columns, rows), encoding="utf-8", newline="")
