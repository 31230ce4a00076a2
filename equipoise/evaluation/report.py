"""`equipoise report`: everything that was measured, as one HTML file with its figures and tables beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from equipoise.errors import UserError
from equipoise.evaluation import formats, modelcard, results, tables
from equipoise.evaluation.curves import frontier_plot, training_plots
from equipoise.evaluation.evaluate import EvaluateConfig
from equipoise.evaluation.figures import ends, figures
from equipoise.evaluation.page import Content, render
from equipoise.evaluation.plots import as_csv, write
from equipoise.evaluation.runs import read_run
from equipoise.evaluation.samples import Sample, sample
from equipoise.evaluation.sources import measured, recognise
from equipoise.options import parse
from equipoise.ppo.console import printable
from equipoise.protocol.lexicon import Lexicon


@dataclass(frozen=True)
class ReportConfig:
    """What to report on, and where to write it."""

    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    """An evaluation folder (of `equipoise evaluate`), a study folder (of `equipoise study`), or completions files; the
    last two are evaluated first, into `report_files/evaluation`. NAME=FILE names a file's method."""
    output: Path = Path("report.html")
    """The page. Figures and tables go into a folder beside it, named after it: `report_files`."""
    run: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Folders of training runs, as training was told with --output-dir: their curves and alerts are shown. May be
    repeated."""
    card: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Folders of exported models whose model card gets the results. May be repeated."""
    card_method: str | None = None
    """The method of the report that `--card` is about, where the model's name does not tell."""
    judge: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Where files are evaluated first: a model that measures fluency; may be repeated. Default: bundled. For further
    choices run `equipoise evaluate` and give its folder."""
    fluency: bool = True
    """Where files are evaluated first: measure fluency; without it no model is loaded."""
    base: str | None = None
    """Where files are evaluated first: the method that is the untrained model under the training prompt."""
    event: Literal["strict", "both"] = "both"
    """Where files are evaluated first: what the trade-off calls compliance."""
    device: str = "auto"
    """Where files are evaluated first: `auto`, `cpu`, `cuda` or `cuda:1`."""


def main(argv: list[str]) -> int:
    """Write the report and say where it is. Returns the exit code; raises UserError."""
    config = parse(
        ReportConfig,
        argv,
        ReportConfig(),
        prog="equipoise report",
        description="Write what was measured as one HTML file, with its figures and tables in a folder beside it.",
    )
    for line in report(config, lambda text: print(printable(text), flush=True)):
        print(printable(line))
    return 0


def report(config: ReportConfig, say: Callable[[str], None] = print) -> list[str]:
    """Write the page, the figures, the tables, and the model cards. Returns lines that say what was written.

    `say` gets a line before anything that takes long. Raises UserError.
    """
    given = recognise(config.paths)
    runs = [read_run(folder) for folder in config.run]
    folder = config.output.with_name(config.output.stem + "_files")
    choices = EvaluateConfig(
        given.files, folder / "evaluation", judge=config.judge, fluency=config.fluency, base=config.base,
        event=config.event, device=config.device,
    )  # fmt: skip
    evaluation, rows, study = measured(given, choices, say)
    carded = [(card, modelcard.method_of(card, evaluation, config.card_method)) for card in config.card]
    samples = read_samples(rows, evaluation)
    plots = [*figures(evaluation), frontier_plot(evaluation, runs), *training_plots(runs)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = {plot.name: write(plot, folder) for plot in plots}
        _write_tables(evaluation, folder)
        page = render(Content(evaluation, samples, runs, drawn, folder.name, study))
        _replace(config.output, page)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or config.output} ({error.strerror}): make room, or choose another --output"
        ) from None
    cards = [modelcard.update(folder, evaluation, name) for folder, name in carded]
    return [
        f"{config.output}: {len(evaluation.methods)} methods, {len(samples):,} sentences",
        f"{folder}: {len(drawn)} figures as PNG, SVG and CSV, the headline table as Markdown, LaTeX and CSV",
        *(f"{path}: results of {name}" for path, (_, name) in zip(cards, carded, strict=True)),
    ]


def read_samples(rows: Path, evaluation: results.Evaluation) -> list[Sample]:
    """The sentences of rows.csv, in its order. Raises UserError."""
    lexicon = Lexicon(evaluation.lexicon["agentic"], evaluation.lexicon["communal"])
    column = f"NLL@{evaluation.judges[0].name}" if evaluation.judges else None
    several = {name for name, method in evaluation.methods.items() if len(method.seeds) > 1}
    try:
        return [sample(row, lexicon, column, row["Method"] in several) for row in results.read_rows(rows)]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{rows} is not as `equipoise evaluate` writes it ({error!r}): run it again") from None


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


def _replace(path: Path, text: str) -> None:
    """Write aside, then rename: a reader never sees half a page."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
