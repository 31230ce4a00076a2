"""MLflow: where MLFLOW_TRACKING_URI says, else `mlflow.db` here. MLFLOW_EXPERIMENT_NAME names the experiment."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.documents import parse_json
from equipoise.ppo.tracking.tracker import Opened, Row, Start, cell, columns, flat

EXPERIMENT = "equipoise"
ID = "equipoise.run"
"""The tag by which a run is found again."""
_AT_ONCE = 100
"""Parameters in a request, MLflow's limit."""
_LONGEST = 500
"""Characters of a parameter that every version stores; config.json has the whole."""


class ToMlflow:
    def __init__(self) -> None:
        self._client: Any = None
        self._id = ""
        self._there: dict[str, int] = {}
        """The last step of each key that the run held when it was opened."""

    def open(self, start: Start) -> Opened:
        from mlflow import MlflowClient, get_tracking_uri

        self._client = client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else client.create_experiment(name)
        known = client.search_runs([experiment], f"tags.`{ID}` = '{start.id}'") if start.continues else []
        if known:
            self._id = known[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            for key in known[0].data.metrics:
                steps = [metric.step for metric in client.get_metric_history(self._id, key)]
                self._there[key] = max(steps, default=0)
        else:
            self._id = client.create_run(experiment, run_name=start.name, tags={ID: start.id}).info.run_id
        if start.config:
            self._log_config(start)
        last = max(self._there.values(), default=0)
        # A kill may have left the last step with some of its keys: `send` leaves those out.
        return Opened(last, f"{get_tracking_uri()}, run {self._id}", whole=max(0, last - 1))

    def _log_config(self, start: Start) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self._id).data.params  # what is logged once cannot be changed
        params = [
            Param(name, text[:_LONGEST])
            for name, value in flat(start.config).items()
            if name not in known and (text := value if isinstance(value, str) else json.dumps(value))
        ]
        for first in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._id, params=params[first : first + _AT_ONCE])
        self._client.log_dict(self._id, dict(start.config), "config.json")

    def send(self, row: Row) -> None:
        from mlflow.entities import Metric

        now = int(1000 * row.values.get("time/clock", time.time()))
        metrics = [
            Metric(key, value, now, row.step) for key, value in row.values.items() if row.step > self._there.get(key, 0)
        ]
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)
        if row.samples:
            self._log_samples(row)

    def _log_samples(self, row: Row) -> None:
        """A table as `mlflow.log_table` writes it, without the library that this would need."""
        names, path = columns(row.samples), f"samples/step-{row.step:06d}.json"
        data = [[cell(sample.get(name)) for name in names] for sample in row.samples]
        self._client.log_dict(self._id, {"columns": names, "data": data}, path)
        logged = parse_json(self._client.get_run(self._id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        if (entry := {"path": path, "type": "table"}) not in logged:
            self._client.set_tag(self._id, "mlflow.loggedArtifacts", json.dumps([*logged, entry]))

    def files(self, paths: Sequence[Path], kind: str) -> None:
        for path in paths:
            self._client.log_artifact(self._id, str(path), kind)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")
