"""An evaluation as logs of inspect_ai, one for each method, for `inspect view`. Written without that library."""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equipoise import __version__
from equipoise.errors import UserError
from equipoise.evaluation.inputs import Judged
from equipoise.evaluation.measure import Measured
from equipoise.evaluation.results import Estimate, Evaluation
from equipoise.runs.files import unwritable, write_together
from equipoise.runs.ownership import WRITTEN_BY, look

SCORER = "equipoise"
_FORMAT = 2
"""Of EvalLog, as inspect_ai 0.3 reads and writes it."""


def check(folder: Path) -> None:
    """Raises UserError where the folder is a file. Writes nothing."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--inspect-log {folder} is a file: name a folder, which gets one log for each method")


def write(folder: Path, evaluation: Evaluation, rows: Sequence[Measured], judged: Judged) -> list[Path]:
    """The logs, one for each method, all or none, beside what the folder holds. Raises UserError where they cannot be
    written."""
    # The viewer lists files whose names begin with a time, in this form.
    time = datetime.datetime.fromisoformat(str(evaluation.provenance["date"])).strftime("%Y-%m-%dT%H-%M-%S-00-00")
    texts = {
        folder / f"{time}_{_file_name(evaluation.task.name)}_{_file_name(name)}.json": json.dumps(
            document(evaluation, name, rows, judged)
        )
        + "\n"
        for name in evaluation.methods
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in texts:
            if look(path, _is_ours).state == "foreign":
                raise UserError(f"{path} is there and equipoise evaluate did not write it: name another --inspect-log")
        write_together(texts)
    except OSError as error:
        raise unwritable(folder, error) from None
    return list(texts)


def document(evaluation: Evaluation, name: str, rows: Sequence[Measured], judged: Judged) -> dict[str, Any]:
    """One method's EvalLog: a sample for each sentence, its numbers by the keys of `equipoise evaluate`; and the
    method's metrics, each with the ends of its 95 % interval where it has one."""
    method, made = evaluation.methods[name], str(evaluation.provenance["date"])
    model = plain(method.model or name)
    samples = [
        _sample(evaluation, m, model, _numbers(m, judged, i)) for i, m in enumerate(rows) if m.row.method == name
    ]
    identity = hashlib.sha256(json.dumps([name, made, sorted(f.sha256 for f in evaluation.files)]).encode()).hexdigest()
    return {
        "version": _FORMAT,
        "status": "success",
        "eval": {
            "eval_id": identity[:22],
            "run_id": identity[:22],
            "created": made,
            "task": evaluation.task.name,
            "task_id": identity[22:44],
            "task_version": 0,
            "task_args": {"method": plain(name)},
            "dataset": {
                "name": plain(", ".join(method.files)),
                "samples": len(samples),
                "sample_ids": [sample["id"] for sample in samples],
                "shuffled": False,
            },
            "model": model,
            "config": {"epochs": 1},
            "packages": {"equipoise": __version__},
            "metadata": {"task": evaluation.task.document()},
        },
        "plan": {"name": "plan", "steps": [], "config": {}},
        "results": {
            "total_samples": len(samples),
            "completed_samples": len(samples),
            "scores": [
                {"name": plain(key), "scorer": SCORER, "params": {}, "metrics": _metrics(estimate)}
                for key, estimate in method.metrics.items()
                if estimate.value is not None
            ],
        },
        "stats": {"started_at": made, "completed_at": made, "model_usage": {}},
        "metadata": {**WRITTEN_BY, "settings": _plain_values(evaluation.settings)},
        "samples": samples,
    }


def _sample(evaluation: Evaluation, m: Measured, model: str, numbers: Mapping[str, float]) -> dict[str, Any]:
    task, row, reward = evaluation.task, m.row, m.found.reward
    asked = task.prefix(row.occupation) if row.occupation in task.names else plain(row.occupation)
    answer = {"role": "assistant", "content": plain(row.measured), "source": "generate"}
    terms = {name: list(found) for name, found in zip(reward.classes, reward.terms, strict=True)}
    return {
        "id": f"{row.file + 1}-{row.line}",
        "epoch": 1,
        "input": asked,
        "target": "",
        "messages": [{"role": "user", "content": asked, "source": "input"}, answer],
        "output": {
            "model": model,
            "choices": [{"message": answer, "stop_reason": "stop"}],
            "completion": answer["content"],
        },
        "scores": {
            SCORER: {
                "value": dict(numbers),
                "answer": answer["content"],
                "explanation": f"{m.found.outcome}: " + "; ".join(f"{n}: {', '.join(t)}" for n, t in terms.items()),
                "metadata": {"terms": terms, "duplicate": m.duplicate},
            }
        },
        "metadata": {"occupation": plain(row.occupation), "run": plain(row.run_id), "file": row.file + 1},
    }


def _numbers(m: Measured, judged: Judged, i: int) -> dict[str, float]:
    found, reward = m.found, m.found.reward
    numbers: dict[str, float] = {
        "strict": float(found.strict),
        "both": float(all(reward.terms)),
        "either": float(any(reward.terms)),
        "in_length": float(found.in_length),
        "complete": float(found.complete),
        "reward": float(reward.reward),
        "words": float(reward.words),
        "terms": float(sum(map(len, reward.terms))),
    }
    for name, scores in (judged.scores or {}).items():
        if np.isfinite(scores.nll_N[i]):
            numbers[plain(f"nll@{name}")] = float(scores.nll_N[i])
    for name, values in (judged.acceptable or {}).items():
        numbers[plain(f"acceptable@{name}")] = float(values[i])
    return numbers


def _metrics(estimate: Estimate) -> dict[str, Any]:
    ends = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: {"name": name, "value": v, "params": {}} for name, v in ends.items() if v is not None}


def plain(text: str) -> str:
    """`text` with half characters, which UTF-8 has no bytes for, as replacement marks."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _plain_values(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {plain(str(key)): _plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_values(item) for item in value]
    return plain(value) if isinstance(value, str) else value


def _is_ours(found: Mapping[str, Any]) -> bool:
    made = found.get("metadata")
    return isinstance(made, Mapping) and WRITTEN_BY.items() <= made.items()


def _file_name(method: str) -> str:
    """A name for a method's file that every system takes, and no two methods share."""
    safe = re.sub(r"[^A-Za-z0-9.-]+", "-", plain(method)).strip(".-")[:60]
    return safe if safe == method else f"{safe or 'method'}-{hashlib.sha256(plain(method).encode()).hexdigest()[:8]}"
