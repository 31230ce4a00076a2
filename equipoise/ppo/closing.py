"""The screen at the end of a run: what changed, the reward's curve, the sentences before and after, what to do next."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equipoise.ppo.run_config import RunConfig
from equipoise.ppo.summary import FINAL, UNTRAINED, describe, read_rows, sentences
from equipoise.protocol.lexicon import Piece
from equipoise.protocol.marking import legend, pieces
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task
from equipoise.runs.calling import program
from equipoise.runs.console import LABEL, Console, Row
from equipoise.runs.sparkline import sparkline

SHOWN = 3
"""Sentences before, and sentences after, of one occupation."""
CURVE = 60
"""Columns of the reward's curve at most."""


def show(console: Console, task: Task, summary: Mapping[str, Any], run: RunConfig) -> None:
    """All of it, from the records in the run's folder: about one screen of 80 columns and 24 lines."""
    output = Path(run.output_dir)
    what_came(console, task, summary, output)
    console.table([*before_and_after(task, output), ("files", [Piece(files(run))])])
    for i, command in enumerate(next_steps(run)):
        console.say(f"  {'next' if i == 0 else '':<{LABEL + 2}}{command}")  # not folded, so that it can be copied


def what_came(console: Console, task: Task, summary: Mapping[str, Any], output: Path) -> None:
    """The summary, with the reward's curve."""
    algorithm = f" of {summary['algorithm']}" if "algorithm" in summary else ""  # records of before it was chosen
    console.say(f"summary of {plural(summary['steps'], 'step')}{algorithm}")
    rows: list[Row] = []
    for label, text in describe(summary, task):
        rows.append((label, [Piece(text)]))
        if label == "reward":
            rows.append(("", [Piece(curve(output, console.encoding))]))
    console.table(rows)


def curve(output: Path, encoding: str) -> str:
    """The rewards of the run's steps as one line, from the first to the last, with the lowest and the highest."""
    steps = read_rows(output)
    key = "reward/function" if all("reward/function" in row for row in steps) else "reward/mean"
    rewards = [row[key] for row in steps]
    line = sparkline(rewards, CURVE, encoding)
    return f"{line} {min(rewards):z.2f} to {max(rewards):z.2f}" if rewards else ""


def before_and_after(task: Task, output: Path) -> list[Row]:
    """The first sentences about one occupation, of the untrained model and of the trained one; nothing where either is
    not on record."""
    before, after = sentences(output / UNTRAINED), sentences(output / FINAL)
    occupation = before[0][0] if before else ""
    sides = [
        (label, [text for about, text in found if about == occupation][:SHOWN])
        for label, found in (("before", before), ("after", after))
    ]
    if not all(texts for _, texts in sides):
        return []
    rows: list[Row] = [("terms", [*legend(task.labels), Piece(f" in the first sentences about: {occupation}")])]
    for label, texts in sides:
        rows += [(label if i == 0 else "", pieces(text, task.lexicon)) for i, text in enumerate(texts)]
    return rows


def next_steps(run: RunConfig) -> list[str]:
    """Three commands that go on from here, as a shell takes them."""
    own = run.output_dir == RunConfig().output_dir
    table = "rlhf_llama3_completions.csv" if own else f"{run.output_dir.rstrip('/')}_completions.csv"
    generate = ["generate"] if own else ["generate", "--model", run.output_dir, "--output", table]
    return [
        f"{program()} {shlex.join(generate)}",
        f"{program()} {shlex.join(['report', table, '--run', run.output_dir])}",
        shlex.join(["tensorboard", "--logdir", run.tensorboard_dir]),
    ]


def files(run: RunConfig) -> str:
    """What lies where."""
    return (
        f"{run.output_dir}/ (the model, training_metrics.csv, summary.json), {run.checkpoint_dir}/, "
        f"{run.tensorboard_dir}/"
    )
