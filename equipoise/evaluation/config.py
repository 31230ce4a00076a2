"""What is measured and reported: the options of `equipoise evaluate` and `equipoise report`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from equipoise.errors import UserError
from equipoise.options import OptionalTask
from equipoise.policy.config import check_device
from equipoise.policy.packaged import MPNET
from equipoise.tables.layout import Form


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
    track: bool = False
    """Give the page to the trackers too that followed the runs of `--run` (`--track` of training)."""
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
    task: OptionalTask = None
    """Where files are evaluated first: a task file, or the name of a packaged task. Default: the task that is on record
    beside the files, else the protocol's."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, how, and where the numbers go."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE ...")] = ()
    """Files of completions: CSV, TSV, JSON or JSONL with a column of texts and one of occupations. NAME=FILE names the
    method; otherwise the column Method, Label or Model does, or else the file's name."""
    output: Path = Path("evaluation")
    """Folder for evaluation.json, rows.csv, methods.csv, occupations.csv and comparisons.csv."""
    inspect_log: Path | None = None
    """Folder that gets the evaluation as logs of inspect_ai too, one for each method: `inspect view --log-dir` opens
    it."""
    text_column: str | None = None
    """The column of texts, where its name is none of the usual."""
    occupation_column: str | None = None
    """The column of occupations, likewise. Where there is none, occupations are read from the beginnings of the texts,
    such as `The X was`."""
    method_column: str | None = None
    """The column that names the method."""
    form: Form = "auto"
    """Whether texts are whole sentences or continue the task's frame, such as `The X was`. `auto`: as they begin."""
    encoding: str | None = None
    """Of the files, where they are not UTF-8: for instance cp1252."""
    task: OptionalTask = None
    """What is measured by: a task file with its own terms, occupations, frame and bounds, or the name of a packaged
    task. Default: the task that is on record beside the files, else the protocol's."""
    min_words: int | None = None
    """Fewest words of a strict success; the frame's count. Default: the task's."""
    max_words: int | None = None
    """Most words of a strict success. Default: the task's."""
    judge: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A model whose negative log-likelihood measures fluency: `bundled`, `gemma-3-270m`, a folder or a Hub id; may be
    repeated. The first one counts in the trade-off. Default: bundled."""
    fluency: bool = True
    """Measure fluency; without it no model is loaded."""
    acceptability: str | None = None
    """What tells acceptable sentences from others: `all-mpnet-base-v2`, by a probe on its hidden states, or a
    classifier, as a folder or Hub id."""
    acceptable_label: str | None = None
    """Its label for acceptable sentences, by name or number. Default: recognised by name."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What judges compute in. `auto`: bfloat16 where the hardware is faster in it."""
    margin: float = 0.3
    """How much worse in NLL, nats per token, still counts as not inferior. To be chosen before looking."""
    event: Literal["strict", "both"] = "both"
    """What the trade-off calls compliance."""
    base: str | None = None
    """The method that is the untrained model under the training prompt: its rows give p0. Default: a costs file's
    p0, or the one method called Prompt-Only or the like."""
    reference: Path | None = None
    """YAML or JSON list of published numbers, besides the built-in ones of the public study."""
    bootstrap_draws: int = 2000
    """Draws of the two-level bootstrap."""
    seed: int = 0
    """Of every draw: the same seed gives the same numbers."""

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.acceptability is not None and not self.acceptability.strip():
            raise UserError(f"--acceptability is empty: give {MPNET.alias} or a classifier, or leave it out")
        if self.acceptable_label is not None and self.acceptability is None:
            raise UserError(
                f"--acceptable-label {self.acceptable_label} is of a classifier, and there is none: give it with "
                "--acceptability, or leave the label out"
            )
        if not 100 <= self.bootstrap_draws <= 100_000:
            raise UserError(f"--bootstrap-draws {self.bootstrap_draws} must lie between 100 and 100000; 2000 is usual")
        if not self.margin > 0:
            raise UserError(f"--margin {self.margin} must be positive, in nats per token; 0.3 is the default")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} must be 0 or more")
        low, high = self.min_words, self.max_words
        if low is not None and high is not None and not 0 <= low <= high:
            raise UserError(f"--min-words {low} and --max-words {high} leave no length between")

    @property
    def judges(self) -> tuple[str, ...]:
        return (self.judge or ("bundled",)) if self.fluency else ()
