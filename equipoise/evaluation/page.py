"""The report as one HTML file that asks the network for nothing and runs nothing but its own script."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from equipoise.evaluation import fairness_tables, findings, paper, spent, tables
from equipoise.evaluation.plots import Drawn
from equipoise.evaluation.results import Evaluation
from equipoise.evaluation.runs import TrainingRun
from equipoise.evaluation.samples import Sample, embedded, kinds
from equipoise.evaluation.sources import unfinished
from equipoise.evaluation.tables import Cell, Table
from equipoise.evaluation.visible import visible
from equipoise.evaluation.wording import capital, term_pairs
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task

CONTENTS = (
    ("summary", "Summary"),
    ("results", "Results"),
    ("front", "Adherence and fluency"),
    ("optimum", "Distance from the optimum"),
    ("occupations", "Occupations"),
    ("pairs", ""),
    ("fairness", "Gendered words and associations"),
    ("training", "Training"),
    ("reward", "Reward and length"),
    ("differences", "Differences"),
    ("cost", "Cost"),
    ("samples", "Sentences"),
    ("metrics", "All metrics"),
    ("made", "How it was made"),
)
"""Anchors and headings; the one of pairs is the task's word for them."""
LOOKS = ("bold on blue", "underlined on orange", "italic on green", "italic and dotted on purple")
"""How the terms of each class look, as the style sheet has it."""
FIRST = 3
"""Sentences of each method that the page shows without its script."""


@dataclass(frozen=True)
class Content:
    """Everything that a page is made of."""

    evaluation: Evaluation
    samples: Sequence[Sample]
    runs: Sequence[TrainingRun]
    figures: Mapping[str, Drawn]
    """By name, in the order drawn."""
    folder: str
    """The name of the folder beside the page with the figures' files."""
    study: Mapping[str, Any]
    """study.json, or nothing."""
    file_records: Mapping[str, Any]
    """By the path of a completions file: how it was made, by its own record."""


def render(content: Content) -> str:
    """The page's text, fit to be written as UTF-8."""
    environment = Environment(
        loader=PackageLoader("equipoise.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["markup"] = Markup
    environment.filters["code"] = _code
    style, script = (source(environment, f"report.{kind}") for kind in ("css", "js"))
    evaluation, names = content.evaluation, list(content.figures)
    judge = evaluation.judges[0].name if evaluation.judges else None
    trainings = [name for name in names if name.startswith("training-")]
    task = evaluation.task
    heading = capital(term_pairs(task))
    page = environment.get_template("report.html.j2").render(
        title=f"Constraint adherence and fluency of {plural(len(evaluation.methods), 'method')}",
        subtitle=_subtitle(evaluation),
        style=style,
        style_hash=csp_hash(style),
        script=script,
        script_hash=csp_hash(script),
        contents=[(anchor, title or heading) for anchor, title in CONTENTS],
        pairs_heading=heading,
        pairs_text=_pairs_text(task),
        marked=list(zip((capital(task.labels[0]), *task.labels[1:]), LOOKS, strict=False)),
        folder=content.folder,
        figures=content.figures,
        fronts=[name for name in names if name.startswith("adherence-fluency-")],
        pairs=[name for name in names if name.startswith("pairs-")],
        trainings=list(zip(trainings, content.runs, strict=True)),
        findings=findings.findings(evaluation),
        gaps=findings.gaps(evaluation, content.runs, unfinished(content.study)),
        notices=evaluation.notices,
        problems=[(name, m.problems) for name, m in evaluation.methods.items() if m.problems],
        headline=tables.headline(evaluation),
        excess=tables.excess(evaluation),
        spent=spent.table(evaluation),
        fairness=fairness_tables.overview(evaluation),
        gendered=fairness_tables.gendered(evaluation),
        associations=fairness_tables.associations(evaluation),
        differences=tables.differences(evaluation),
        mixed=fairness_tables.mixed(evaluation),
        costs=tables.costs(evaluation),
        diagnostics=tables.metrics_table(evaluation, "diagnostic"),
        equal=tables.equal_n(evaluation),
        study=tables.study_table(evaluation),
        judge=judge,
        first=_first(content.samples),
        outcomes=kinds(task),
        samples_json=json_block(embedded(content.samples, task, judge)),
        methods_text=paper.methods_text(evaluation, content.runs),
        bibtex=paper.bibtex(evaluation),
        inputs=_inputs(evaluation),
        file_problems=[(f.path, problem.message) for f in evaluation.files for problem in f.problems],
        records=_records(content),
    )
    return visible(page)  # names and notes come from anywhere too; style and script hold nothing that this would change


def _pairs_text(task: Task) -> str:
    """What the figures of a method's pairs show."""
    if len(task.classes) == 2:
        first, second = task.labels
        return (
            f"Percent of a method’s compliant sentences by the first {first} term (rows) and the first {second} term "
            "(columns). Each map has its own colour scale, up to its commonest pair."
        )
    what = "the first term" if len(task.classes) == 1 else "the first term of each class"
    return f"Percent of a method’s compliant sentences by {what}, the commonest first."


def _code(text: str) -> Markup:
    """Escaped, with what stands in `back quotes` as code."""
    pieces = [escape(piece) for piece in text.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(pieces))


def source(environment: Environment, name: str) -> str:
    """A template file as it is."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def csp_hash(text: str) -> str:
    """What a Content-Security-Policy names an inline style or script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_IN_HTML = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def json_block(document: Any) -> Markup:
    """JSON that no HTML parser mistakes for markup; what is replaced occurs in JSON within strings only."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(_IN_HTML))


def _subtitle(evaluation: Evaluation) -> str:
    made = evaluation.provenance
    parts = [f"equipoise {made.get('equipoise', '')}".strip(), str(made.get("date", ""))[:10]]
    commit = str(made.get("commit") or "")
    return ", ".join(part for part in [*parts, f"commit {commit[:12]}" if commit else ""] if part)


def _first(samples: Sequence[Sample]) -> list[Sample]:
    seen: dict[str, int] = {}
    out = []
    for one in samples:
        seen[one.method] = seen.get(one.method, 0) + 1
        if seen[one.method] <= FIRST:
            out.append(one)
    return out


def _inputs(evaluation: Evaluation) -> Table:
    rows = []
    for file in evaluation.files:
        layout = file.layout
        columns = ", ".join(f"{role} {name}" for role in ("text", "occupation", "method", "model", "seed", "run_id")
                            if (name := getattr(layout, role)) is not None)  # fmt: skip
        rows.append(
            (
                Cell(visible(file.path)),
                Cell(f"{file.rows:,}"),
                # Without a row nothing shows how a file is meant.
                Cell(f"{layout.form} ({layout.how})" if file.rows else "–"),
                Cell(visible(columns) if layout.text else "–"),
                Cell(file.sha256),
            )
        )
    return Table("", ("file", "rows", "texts", "columns", "sha256"), tuple(rows))


def _records(content: Content) -> list[tuple[str, str]]:
    evaluation = content.evaluation
    judges = [{"name": j.name, "source": j.source, "caveat": j.caveat} for j in evaluation.judges]
    documents: list[tuple[str, Any]] = [
        ("How the evaluation was run: command, versions, commit", evaluation.provenance),
        ("Settings of the evaluation", {**evaluation.settings, "judges": judges, "lexicon": evaluation.lexicon}),
    ]
    if content.study:
        documents.append(("The study: methods, commands, models", content.study))
    documents += [(f"How {path} was made", record) for path, record in content.file_records.items()]
    documents += [
        (f"Training run {run.name}: configuration, command, versions", run.record) for run in content.runs if run.record
    ]
    return [(name, json.dumps(document, indent=1, ensure_ascii=False)) for name, document in documents]
