"""`equipoise report`: everything that was measured, as one HTML file with its figures and tables beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from equipoise.options import parse
from equipoise.ppo.console import printable


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
    repeated. Default: the run that a study names."""
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
    # Only here: `--help` and a mistyped option need not wait for it.
    from equipoise.evaluation.assemble import report

    for line in report(config, lambda text: print(printable(text), flush=True)):
        print(printable(line))
    return 0
