"""A recorded training run, shown as if it went on: the packaged one, for `equipoise demo`. Needs no torch."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from equipoise.documents import read_json
from equipoise.ppo.closing import what_came
from equipoise.ppo.summary import FINAL, SUMMARY, objects, read_rows, sentences
from equipoise.protocol.plural import plural
from equipoise.protocol.reward import RewardWeights
from equipoise.protocol.task import Task
from equipoise.runs.console import Console
from equipoise.runs.records import task_on_record
from equipoise.runs.stage import duration

RECORDED = Path(__file__).parent / "recorded"
"""The packaged run: what training left in its folder but for the model; of the samples, those that were shown."""


@dataclass(frozen=True)
class Recorded:
    """A run's records."""

    folder: Path
    record: Mapping[str, Any]
    """run.json."""
    summary: Mapping[str, Any]
    steps: list[dict[str, Any]]
    """The rows of metrics.jsonl."""
    samples: Mapping[int, list[str]]
    """The sentences of a step that were shown."""
    final: list[tuple[str, str]]
    """(occupation, text) of the trained model's sentences."""
    task: Task

    def describe(self) -> str:
        """When, how and on what it was made: one line."""
        when = datetime.fromtimestamp(self.steps[-1]["time/clock"], UTC).date()
        seconds = self.steps[-1]["time/clock"] - self.steps[0]["time/clock"] + self.steps[0].get("time/step", 0.0)
        machine = self.record.get("gpu") or plural(int(self.record.get("threads", 1)), "CPU thread")
        return (
            f"recorded on {when}, seed {self.summary['seed']}, by `{self.record['command']}` on {machine}: "
            f"{plural(len(self.steps), 'step')} in {duration(seconds)}"
        )


def read_recorded(folder: Path = RECORDED) -> Recorded:
    """The run whose records are in `folder`."""
    record = read_json(folder / "run.json")
    samples: dict[int, list[str]] = {}
    for row in objects(folder / "samples.jsonl"):
        samples.setdefault(int(row["step"]), []).append(str(row["text"]))
    return Recorded(
        folder,
        record,
        read_json(folder / SUMMARY),
        read_rows(folder),
        samples,
        sentences(folder / FINAL),
        task_on_record(record["config"], str(folder / "run.json")),
    )


def replay(run: Recorded, stream: TextIO | None, seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show the steps in `seconds`, each as it was shown in training, by the clock of then, and what the run came to."""
    config, now = run.record["config"], [run.steps[0]["time/clock"] - run.steps[0].get("time/step", 0.0)]
    console = Console(stream, len(run.steps), task=run.task, clock=lambda: now[0], target_kl=config["ppo"]["target_kl"])
    weights = RewardWeights(**config["reward"])
    for row in run.steps:
        sleep(seconds / len(run.steps))
        now[0] = row["time/clock"]
        numbers = {key: value for key, value in row.items() if isinstance(value, float) and not key.startswith("time/")}
        console.step(int(row["step"]), numbers, {"time/step": row["time/step"]})
        if texts := run.samples.get(int(row["step"])):
            each = [str(i) for i in range(len(texts))]  # one of an occupation: that is how they were chosen
            console.samples(int(row["step"]), [run.task.score(text, weights) for text in texts], each)
    console.close()
    what_came(console, run.task, run.summary, run.folder)
