"""Run by `test_trackers` with an interpreter that has the trackers: a run of a few steps that they follow, and what
they then hold.

Arguments: the model's folder, the folder of the run, the steps, the step before which the process is killed (0: none),
then the trackers. With `read` in place of a model it prints, as JSON, what each holds of the run: rows of [step, key,
value], the keys of the configuration, the sentences of the tables, and the names of the artifacts' files.
"""

import json
import os
import signal
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from equipoise.ppo.log import RunLog
from equipoise.ppo.train import train
from tests.ppo.small import small_config


def run(model: str, where: str, steps: str, kill: str, *trackers: str) -> int:
    plain = RunLog.step

    def step(self: RunLog, number: int, *given: Any) -> None:
        if number == int(kill):
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, number, *given)

    RunLog.step = step
    config = small_config(Path(model), Path(where), steps=int(steps), final_sentences=8, eval_sentences=8)
    config = replace(config, run=replace(config.run, track=trackers))
    return train(config).exit_code


def read(where: str) -> None:
    ids = json.loads((Path(where) / "out/trackers.json").read_text())["runs"]
    found = {name: globals()[f"read_{name}"](identity) for name, identity in ids.items()}
    print("HELD", json.dumps(found))


def read_wandb(identity: str) -> dict[str, Any]:
    from wandb.proto import wandb_internal_pb2

    from equipoise.ppo.tracking.to_wandb import _records

    held: dict[str, Any] = {"rows": [], "config": [], "sentences": [], "files": []}
    for path in sorted(Path("wandb").glob(f"offline-run-*-{identity}/*.wandb")):
        for data in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                for item in record.history.item:
                    key, value = item.key or "/".join(item.nested_key), json.loads(item.value_json)
                    if key == "samples/path":
                        table = json.loads((path.parent / "files" / value).read_text())
                        held["sentences"] += [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
                    elif not key.startswith(("_", "samples/")):
                        held["rows"].append([record.history.step.num, key, value])
            elif kind == "run":
                held["config"] += [item.key for item in record.run.config.update]
            elif kind == "artifact":
                held["files"] += [entry.path for entry in record.artifact.manifest.contents]
            elif kind == "request" and record.request.HasField("log_artifact"):
                held["files"] += [e.path for e in record.request.log_artifact.artifact.manifest.contents]
    return held


def read_mlflow(identity: str) -> dict[str, Any]:
    from mlflow import MlflowClient, artifacts

    client = MlflowClient()
    experiment = client.get_experiment_by_name("equipoise").experiment_id
    (one,) = client.search_runs([experiment], f"tags.`equipoise.run` = '{identity}'")
    rows = [
        [metric.step, key, metric.value]
        for key in one.data.metrics
        for metric in client.get_metric_history(one.info.run_id, key)
    ]
    sentences = []
    for entry in client.list_artifacts(one.info.run_id, "samples"):
        table = json.loads(artifacts.load_text(f"runs:/{one.info.run_id}/{entry.path}"))
        sentences += [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    files = [Path(each.path).name for each in client.list_artifacts(one.info.run_id, "summary")]
    return {"rows": rows, "config": list(one.data.params), "sentences": sentences, "files": files}


def read_trackio(identity: str) -> dict[str, Any]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (one,) = [each for each in trackio.Api().runs("equipoise") if each.name.endswith(identity)]
    held: dict[str, Any] = {"rows": [], "config": list(one.config or {}), "sentences": [], "files": []}
    for row in SQLiteStorage.get_logs("equipoise", one.name):
        step = row["step"]
        for key, value in row.items():
            if key == "samples":
                held["sentences"] += value["_value"]
            elif key not in ("step", "timestamp"):
                held["rows"].append([step, key, value])
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "equipoise.db") as stored:
        held["files"] = [name for (name,) in stored.execute("select name from artifacts")]
    return held


if __name__ == "__main__":
    if sys.argv[1] == "read":
        read(sys.argv[2])
    else:
        sys.exit(run(*sys.argv[1:]))
