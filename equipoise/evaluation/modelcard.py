"""Results in an exported model's card: a section of README.md, and `model-index` in its front matter, as the Hub reads.

Only README.md is written, whole, beside its old version and then over it, and its hash in export.json. Doing it again
replaces what was there.
"""

import json
import re
from pathlib import Path
from typing import Any

from equipoise.errors import UserError
from equipoise.evaluation import tables
from equipoise.evaluation.formats import markdown_text
from equipoise.evaluation.results import Evaluation, Method
from equipoise.evaluation.visible import visible
from equipoise.evaluation.wording import judge_named, strict
from equipoise.protocol.plural import plural
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.exported import note_rewritten
from equipoise.runs.files import write_whole

BEGIN = "<!-- results of equipoise report: begin -->"
END = "<!-- results of equipoise report: end -->"
TRAINED = ("PPO", "RLHF")
"""What the method of a model trained here is called."""


def method_of(folder: Path, evaluation: Evaluation, wanted: str | None) -> str:
    """The method of `evaluation` whose sentences the model in `folder` wrote. Raises UserError where that is not sure.

    `wanted` if given; else the one method whose model has the folder's name; else the one called PPO or RLHF.
    """
    names = list(evaluation.methods)
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"there is no method {wanted!r} in this evaluation; it has {', '.join(names)}")
        return wanted
    own = [name for name, method in evaluation.methods.items() if method.model == folder.resolve().name]
    trained = [name for name in names if name.upper() in TRAINED]
    for found in (own, trained):
        if len(found) == 1:
            return found[0]
    raise UserError(
        f"which method's sentences did the model in {folder} write? Name it with --card-method, one of "
        f"{', '.join(names)}"
    )


def update(folder: Path, evaluation: Evaluation, name: str) -> Path:
    """Write the results of the method `name` into the card in `folder`; returns its path. Raises UserError."""
    from equipoise.policy.card import is_card  # only here: it needs torch, which a report may do without

    path = folder / "README.md"
    try:
        old = path.read_text(encoding="utf-8")
        if path.is_symlink() or not is_card(old):
            raise UserError(f"{path} is no model card that equipoise wrote: name a folder that training exported to")
        text = with_results(old, evaluation, name, folder.resolve().name)
        if text != old:
            note_rewritten(folder, path.name, old.encode(), text.encode())
            write_whole(path, text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot put results into {path} ({getattr(error, 'strerror', None) or error}): name a folder that "
            "training exported a model to"
        ) from None
    return path


def with_results(card: str, evaluation: Evaluation, name: str, model: str) -> str:
    """The text of a card with the results of the method `name` in place of earlier ones."""
    matter, body = _parted(card)
    index = f"model-index: {json.dumps(model_index(evaluation, name, model), ensure_ascii=False)}"
    matter = [*_without(matter, "model-index"), index]
    section = f"{BEGIN}\n{_section(evaluation, name)}\n{END}"
    before, begin, rest = body.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        body = before + section + after
    else:
        # Before the limits of use, where the card has them: results are read first.
        place = re.search(r"^## Intended use", body, re.MULTILINE)
        at = place.start() if place else len(body)
        gap = "" if body[:at].endswith("\n\n") or not body[:at] else "\n" if body[:at].endswith("\n") else "\n\n"
        body = f"{body[:at]}{gap}{section}\n{chr(10) if place else ''}{body[at:]}"
    return "\n".join(["---", *matter, "---", body])


def model_index(evaluation: Evaluation, name: str, model: str) -> list[dict[str, Any]]:
    """The Hub's `model-index`: the headline metrics of one method. Shares are 0 to 1, as in evaluation.json."""
    method = evaluation.methods[name]
    metrics = [
        {
            "type": re.sub(r"[^a-z0-9]+", "_", key.lower()),
            "name": visible(metric.title),
            "value": round(estimate.value, 6),
        }
        for key, metric in evaluation.metrics.items()
        if metric.tier == "headline"
        and (estimate := method.metrics.get(key)) is not None
        and estimate.value is not None
    ]
    if not metrics:
        return []
    return [
        {
            "name": visible(model),
            "results": [
                {
                    "task": {"type": "text-generation", "name": "One-sentence descriptions of occupations"},
                    "dataset": {"type": "equipoise", "name": plural(len(method.occupations), "occupation")},
                    "metrics": metrics,
                }
            ],
        }
    ]


def _section(evaluation: Evaluation, name: str) -> str:
    method = evaluation.methods[name]
    lines = ["## Results", ""]
    lines.append(
        f"{plural(method.n, 'sentence')} about {plural(len(method.occupations), 'occupation')}, measured with "
        f"equipoise {markdown_text(str(evaluation.provenance.get('equipoise', '')))} as the method "
        f"{markdown_text(name)}. 95 % intervals over occupations."
    )
    task = evaluation.task
    if task != PROTOCOL:
        lines[-1] += f" Measured by the task {markdown_text(task.name)}; strict success: {markdown_text(strict(task))}."
    lines += ["", "| metric | value | 95 % interval |", "|---|---:|---:|"]
    for key, metric in evaluation.metrics.items():
        if metric.tier == "headline" or key == "both":
            cell = tables.estimate_cell(method.metrics.get(key), metric.unit)
            lines.append(_line(tables.head(metric), cell))
    point = next((p for p in evaluation.frontier.points if p.method == name), None)
    lines.append(_line("KL to the base model, nats per sentence", tables.estimate_cell(method.kl, "nats")))
    how = method.kl.note if method.kl is not None else ""
    if point is not None and point.bound is not None:
        lines.append(_line("least KL that this compliance needs", tables.estimate_cell(point.bound, "nats")))
    lines.append(_line("sentences that repeat an earlier one", tables.Cell(f"{method.duplicates.rows:,}")))
    if how:
        lines += ["", f"That KL to the base model is {markdown_text(how)}."]
    others = [n for n in evaluation.methods if n != name]
    if others and "strict" in evaluation.metrics:
        told = (
            f"{markdown_text(n)} {_strict(evaluation.methods[n])} (n = {evaluation.methods[n].n:,})" for n in others
        )
        lines += ["", f"Strict success of the methods it was compared with, in percent: {'; '.join(told)}."]
    for judge in evaluation.judges:
        caveat = f", {markdown_text(judge.caveat)}" if judge.caveat else ""
        lines += ["", f"Judge of fluency: {markdown_text(judge_named(judge))}{caveat}."]
    return "\n".join(lines)


def _strict(method: Method) -> str:
    return markdown_text(tables.whole(tables.estimate_cell(method.metrics.get("strict"), "share")))


def _line(title: str, cell: tables.Cell) -> str:
    return f"| {markdown_text(title)} | {markdown_text(cell.text)} | {markdown_text(cell.interval)} |"


def _parted(card: str) -> tuple[list[str], str]:
    """The lines of the front matter, and what follows it."""
    lines = card.split("\n")
    if lines[0].rstrip() == "---":
        for i, line in enumerate(lines[1:], start=1):
            if line.rstrip() == "---":
                return lines[1:i], "\n".join(lines[i + 1 :])
    return [], card


def _without(matter: list[str], key: str) -> list[str]:
    """The front matter without `key` and the lines of its value."""
    kept, inside = [], False
    for line in matter:
        if line.startswith(f"{key}:"):
            inside = True
        elif inside and (not line.strip() or line[0] in " -\t"):
            continue
        else:
            inside = False
            kept.append(line)
    return kept
