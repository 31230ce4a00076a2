"""From completion files to one `Evaluation` and its rows: read, measure, judge, summarise, compare."""

import datetime
import importlib.metadata
import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
import yaml

from equipoise import __version__
from equipoise.errors import UserError
from equipoise.evaluation import results
from equipoise.evaluation.catalogue import titled
from equipoise.evaluation.compare import compare
from equipoise.evaluation.frontier import frontier
from equipoise.evaluation.intervals import Array
from equipoise.evaluation.layout import Columns, Form, Row, arrange, settle_names
from equipoise.evaluation.measure import Measured, measure
from equipoise.evaluation.read import read_table
from equipoise.evaluation.reference import STUDY_ROWS, read_reference
from equipoise.evaluation.results import Evaluation, File, Judge, Method
from equipoise.evaluation.side import Side, cost, distance, read_side
from equipoise.evaluation.summary import (
    SELF_BLEU_TEXTS,
    Fluency,
    Sample,
    at_equal_n,
    duplicates,
    estimates,
    occupation_estimates,
    parts,
)
from equipoise.protocol.lexicon import LEXICON, Lexicon
from equipoise.protocol.prompts import MAX_WORDS, MIN_WORDS


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, how, and where the numbers go."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE ...")] = ()
    """Files of completions: CSV, TSV, JSON or JSONL with a column of texts and one of occupations. NAME=FILE names the
    method; otherwise the column Method, Label or Model does, or else the file's name."""
    output: Path = Path("evaluation")
    """Folder for evaluation.json, rows.csv, methods.csv, occupations.csv and comparisons.csv."""
    text_column: str | None = None
    """The column of texts, where its name is none of the usual."""
    occupation_column: str | None = None
    """The column of occupations, likewise. Where there is none, occupations are read from `The X was …`."""
    method_column: str | None = None
    """The column that names the method."""
    form: Form = "auto"
    """Whether texts are whole sentences or continue `The X was`. `auto`: as they begin."""
    encoding: str | None = None
    """Of the files, where they are not UTF-8: for instance cp1252."""
    lexicon: Path | None = None
    """YAML or JSON file with lists `agentic` and `communal`, in place of the protocol's terms."""
    min_words: int = MIN_WORDS
    """Fewest words of a strict success; the prefix counts."""
    max_words: int = MAX_WORDS
    """Most words of a strict success."""
    judge: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A model whose negative log-likelihood measures fluency: `bundled`, a folder or a Hub id; may be repeated. The
    first one counts in the trade-off. Default: bundled."""
    fluency: bool = True
    """Measure fluency; without it no model is loaded."""
    acceptability: str | None = None
    """A classifier of acceptable sentences: folder or Hub id."""
    acceptable_label: str | None = None
    """Its label for acceptable sentences, by name or number. Default: recognised by name."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What judges compute in. `auto`: bfloat16 where the hardware has it."""
    margin: float = 0.3
    """How much worse in NLL, nats per token, still counts as not inferior. To be chosen before looking."""
    event: Literal["strict", "both"] = "both"
    """What the trade-off calls compliance."""
    base: str | None = None
    """The method that is the untrained model under the training prompt: its rows give p0. Default: a costs file's
    p0, or the method called Prompt-Only."""
    reference: Path | None = None
    """YAML or JSON list of published numbers, besides the built-in ones of the public study."""
    bootstrap_draws: int = 2000
    """Draws of the two-level bootstrap."""
    seed: int = 0
    """Of every draw: the same seed gives the same numbers."""

    def __post_init__(self) -> None:
        if not 100 <= self.bootstrap_draws <= 100_000:
            raise UserError(f"--bootstrap-draws {self.bootstrap_draws} must lie between 100 and 100000; 2000 is usual")
        if not self.margin > 0:
            raise UserError(f"--margin {self.margin} must be positive, in nats per token; 0.3 is the default")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} must be 0 or more")
        if not 0 <= self.min_words <= self.max_words:
            raise UserError(f"--min-words {self.min_words} and --max-words {self.max_words} leave no length between")

    @property
    def judges(self) -> tuple[str, ...]:
        return (self.judge or ("bundled",)) if self.fluency else ()


@dataclass(frozen=True)
class Inputs:
    """Every row of every file, measured, and what lay beside the files."""

    files: tuple[File, ...]
    rows: list[Measured]
    sides: list[Side | None]


@dataclass(frozen=True)
class Judged:
    """What the judges and the classifier say of every row, in order."""

    judges: tuple[Judge, ...] = ()
    scores: Mapping[str, Fluency] | None = None
    acceptable: Mapping[str, Array] | None = None
    notices: tuple[str, ...] = ()


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


def evaluate(
    config: EvaluateConfig,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Evaluation, list[Measured], Judged]:
    """Everything that is in evaluation.json, the measured rows, and the judges' scores. Raises UserError."""
    lexicon = LEXICON if config.lexicon is None else read_lexicon(config.lexicon)
    reference = STUDY_ROWS + (() if config.reference is None else read_reference(config.reference))
    inputs = read_inputs(config, lexicon)
    judged = Judged()
    if config.judges or config.acceptability:
        # Only here: everything else does without torch.
        from equipoise.evaluation.fluency import judge

        judged = judge(config, [m.row.measured for m in inputs.rows], say, progress)
    return summarise(config, lexicon, inputs, judged, reference), inputs.rows, judged


def summarise(
    config: EvaluateConfig,
    lexicon: Lexicon,
    inputs: Inputs,
    judged: Judged,
    reference: tuple[results.Reference, ...] = STUDY_ROWS,
) -> Evaluation:
    """The evaluation of rows that have been read and judged. Raises UserError for a base that is no method."""
    places: dict[str, list[int]] = {}
    for i, m in enumerate(inputs.rows):
        places.setdefault(m.row.method, []).append(i)
    if config.base is not None and config.base not in places:
        raise UserError(f"--base {config.base!r} is no method: there are {', '.join(map(repr, places))}")
    samples = {
        name: Sample(
            [inputs.rows[i] for i in own],
            lexicon,
            {j: Fluency(f.nll_N[own], f.tokens_N[own]) for j, f in (judged.scores or {}).items()},
            {c: values[own] for c, values in (judged.acceptable or {}).items()},
            config.bootstrap_draws,
            config.seed,
            name,
        )
        for name, own in places.items()
    }
    sizes = {len(sample.rows) for sample in samples.values()}
    equal_n = min(sizes) if len(sizes) > 1 else None
    self_bleu_texts = min(SELF_BLEU_TEXTS, *sizes)
    metrics = {name: estimates(sample, self_bleu_texts) for name, sample in samples.items()}
    catalogue = titled([j.name for j in judged.judges], next(iter(judged.acceptable or {}), None))
    metrics = {name: {key: own[key] for key in catalogue} for name, own in metrics.items()}
    occupations = {name: occupation_estimates(sample) for name, sample in samples.items()}
    files_of = {name: sorted({m.row.file for m in sample.rows}) for name, sample in samples.items()}
    sides = {name: [s for f in files if (s := _side_of(inputs, f, name))] for name, files in files_of.items()}
    kl = {name: distance(own) for name, own in sides.items()}
    methods = {}
    for name, sample in samples.items():
        rows = [m.row for m in sample.rows]
        methods[name] = Method(
            n=len(rows),
            model=", ".join(dict.fromkeys(row.model for row in rows if row.model)),
            seeds=tuple(dict.fromkeys(row.seed for row in rows if row.seed)),
            files=tuple(inputs.files[f].path for f in files_of[name]),
            metrics=metrics[name],
            occupations=occupations[name],
            equal_n={} if equal_n is None else at_equal_n(sample, equal_n),
            pairs=_pairs(sample),
            terms=dict(zip(lexicon.terms, (int(x) for x in sample.terms_NT.sum(0)), strict=True)),
            lengths=_lengths(sample),
            parts=parts(sample.rows),
            duplicates=duplicates(sample.rows),
            cost=cost(sides[name]),
            kl=kl[name],
            problems=tuple(_problems(sample)),
        )
    return Evaluation(
        version=results.VERSION,
        settings=_settings(config, self_bleu_texts),
        provenance=_provenance(),
        files=inputs.files,
        lexicon={"agentic": lexicon.agentic, "communal": lexicon.communal},
        judges=judged.judges,
        metrics=catalogue,
        methods=methods,
        equal_n=equal_n,
        comparisons=compare(samples, occupations, config.margin),
        frontier=frontier(
            config.event, samples, metrics, sides, kl, config.base, judged.judges[0].name if judged.judges else None
        ),
        reference=reference,
        notices=(*judged.notices, *_notices(inputs, methods, equal_n)),
    )


def _side_of(inputs: Inputs, file: int, method: str) -> Side | None:
    """A file with several methods cannot share its costs out, unless the side file names one of them."""
    side = inputs.sides[file]
    within = {m.row.method for m in inputs.rows if m.row.file == file}
    return side if side is not None and (len(within) == 1 or side.method == method) else None


def _pairs(sample: Sample) -> tuple[tuple[int, ...], ...]:
    counts = np.bincount(sample.pair_of[sample.pair_of >= 0], minlength=sample.cells)
    return tuple(tuple(int(x) for x in row) for row in counts.reshape(len(sample.lexicon.agentic), -1))


def _lengths(sample: Sample) -> tuple[tuple[int, int], ...]:
    words, counts = np.unique([m.found.reward.words for m in sample.rows], return_counts=True)
    return tuple((int(w), int(c)) for w, c in zip(words, counts, strict=True))


def _problems(sample: Sample) -> list[str]:
    out = []
    repeated = duplicates(sample.rows)
    if repeated.rows:
        out.append(f"{repeated.rows} of {len(sample.rows)} rows repeat an earlier text of the same occupation")
    if empty := sum(not m.row.measured for m in sample.rows):
        out.append(f"{empty} of {len(sample.rows)} rows have no text; they count as failures")
    models = {m.row.model for m in sample.rows if m.row.model}
    if len(models) > 1:
        out.append(f"rows of {len(models)} models are pooled; --method-column Model would part them")
    if len(set(sample.n_O)) > 1:
        out.append(f"{int(sample.n_O.min())} to {int(sample.n_O.max())} rows per occupation: not balanced")
    return out


def _notices(inputs: Inputs, methods: Mapping[str, Method], equal_n: int | None) -> list[str]:
    out = []
    for file in inputs.files:
        how = "as an option says" if file.layout.how == "given" else "detected"
        out.append(f"{file.path}: {file.rows} rows, texts in {file.layout.text!r} read as {file.layout.form} ({how})")
        out += [f"{file.path}: {problem.message}" for problem in file.problems]
    out += [f"{name}: {line}" for name, method in methods.items() for line in method.problems]
    if equal_n is not None:
        out.append(f"methods differ in n: what depends on n is also given at n = {equal_n}, the smallest")
    shared: dict[str, set[str]] = {}
    for m in inputs.rows:
        if m.row.measured:
            shared.setdefault(m.row.measured, set()).add(m.row.method)
    common = sum(len(names) > 1 for names in shared.values())
    if common:
        out.append(f"{common} texts occur with more than one method")
    return out


def _settings(config: EvaluateConfig, self_bleu_texts: int) -> dict[str, Any]:
    out: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in vars(config).items()
    }
    out["judge"] = list(config.judges)
    return out | {"self_bleu_texts": self_bleu_texts}


def _provenance() -> dict[str, Any]:
    packages: Sequence[str] = ("numpy", "scipy", "statsmodels", "sacrebleu", "torch", "transformers")
    out: dict[str, Any] = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "equipoise": __version__,
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in packages},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    package = Path(__file__).resolve().parents[2]
    if (package / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(package)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
        out |= {"commit": commit.stdout.strip(), "uncommitted_changes": bool(dirty.stdout.strip())}
    return out
