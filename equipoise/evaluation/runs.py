"""A training run as a report shows it: its curves, its alerts, and how it was made."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.documents import parse_json, read_json
from equipoise.errors import UserError
from equipoise.protocol.task import Task
from equipoise.runs.records import task_on_record

CURVES, RECORD, SUMMARY = "training_metrics.csv", "run.json", "summary.json"


class Alert(NamedTuple):
    """One event of kind `alert`: what was noticed at which step, by which numbers, and what helps."""

    step: int
    name: str
    evidence: str
    remedy: str
    sentences: tuple[str, ...] = ()
    """Of the batch, as examples."""


@dataclass(frozen=True)
class TrainingRun:
    """The records of one run folder. `docs/METRICS.md` defines the keys of `curves`."""

    name: str
    steps: tuple[int, ...]
    curves: Mapping[str, tuple[float | None, ...]]
    """One value for each of `steps`; None where it was not finite."""
    alerts: tuple[Alert, ...]
    events: tuple[tuple[int, str], ...]
    """(step, kind) of what else was out of the ordinary: resume, nonfinite, rollback …"""
    record: Mapping[str, Any]
    """run.json: the whole configuration, the command, versions, machine, commit. Empty where there is none."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """summary.json: which step was exported and why, among others. Empty where the run has not ended."""

    @cached_property
    def task(self) -> Task:
        """What it was trained on; the default task where the record does not say. Raises UserError for no task."""
        config = self.record.get("config")
        return task_on_record(config if isinstance(config, Mapping) else {}, f"{self.name}/{RECORD}")

    @property
    def signs(self) -> list[tuple[Alert, int, int]]:
        """Of the alerts of one name the first, how many there are, and the step of the last; in order of the first."""
        named: dict[str, list[Alert]] = {}
        for alert in sorted(self.alerts, key=lambda alert: alert.step):
            named.setdefault(alert.name, []).append(alert)
        return [(own[0], len(own), own[-1].step) for own in named.values()]

    def path(self, compliance: str) -> list[tuple[int, float, float]]:
        """(step, KL to the reference in nats, the curve `compliance`) of every step that has both."""
        nothing = (None,) * len(self.steps)
        shares, kl = (self.curves.get(key, nothing) for key in (compliance, "kl/ref"))
        return [(s, k, c) for s, k, c in zip(self.steps, kl, shares, strict=True) if k is not None and c is not None]


def read_run(folder: Path) -> TrainingRun:
    """The run in `folder` (the one training was told to write to). Raises UserError where it has no curves."""
    path = folder / CURVES
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8", errors="replace").splitlines()))
    except OSError as error:
        raise UserError(
            f"{folder} is no run folder: {CURVES} in it cannot be read ({error.strerror}); name the folder that "
            "equipoise train wrote (--output-dir)"
        ) from None
    header = rows[0] if rows else []
    if header[:1] != ["step"]:
        raise UserError(f"{path} is not the log of a training run: its first column is not `step`")
    complete = [row for row in rows[1:] if len(row) == len(header) and row[0].isdigit()]
    events = _events(folder / "events.jsonl")
    return TrainingRun(
        name=folder.resolve().name,
        steps=tuple(int(row[0]) for row in complete),
        curves={key: tuple(_number(row[i]) for row in complete) for i, key in enumerate(header) if i},
        alerts=tuple(_alert(event) for event in events if event.get("kind") == "alert"),
        events=tuple((_step(e), str(e.get("kind"))) for e in events if e.get("kind") != "alert"),
        record=_object(folder / RECORD),
        summary=_object(folder / SUMMARY),
    )


def read_runs(folders: Sequence[Path]) -> list[TrainingRun]:
    """The runs of several folders, each once, with names that differ. Raises UserError."""
    places = list(dict.fromkeys(folder.resolve() for folder in folders))
    names = [place.name for place in places]
    runs: list[TrainingRun] = []
    for place in places:
        alone = names.count(place.name) == 1
        name = place.name if alone else str(Path(place.parent.name) / place.name)
        while name in {run.name for run in runs}:
            name += "′"
        runs.append(replace(read_run(place), name=name))
    return runs


def smoothed(values: Sequence[float | None], window: int) -> list[float | None]:
    """Centred mean over `window` values (fewer at the ends), missing ones left out; None where all are missing."""
    half = window // 2
    out: list[float | None] = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if v is not None]
        out.append(sum(near) / len(near) if near else None)
    return out


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _events(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            event = parse_json(line)
        except ValueError:
            continue  # a line cut short
        if isinstance(event, dict):
            events.append(event)
    return events


def _alert(event: Mapping[str, Any]) -> Alert:
    evidence = event.get("evidence")
    sentences: tuple[str, ...] = ()
    if isinstance(evidence, Mapping) and isinstance(evidence.get("sentences"), list):
        sentences = tuple(map(str, evidence["sentences"]))
        evidence = {key: value for key, value in evidence.items() if key != "sentences"}
    return Alert(_step(event), _words(event.get("name")), _words(evidence), _words(event.get("remedy")), sentences)


def _step(event: Mapping[str, Any]) -> int:
    step = event.get("step")
    return step if isinstance(step, int) else 0


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value if value is not None else "")


def _object(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path)
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
