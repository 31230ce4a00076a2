"""Replay finished runs through the hacking watch, with these thresholds or others: false alarms and misses.

    python benchmarks/calibrate_watch.py --healthy out/plain-0 out/plain-1 --hacked out/stuffing-0 out/collapse-0
    python benchmarks/calibrate_watch.py --healthy … --hacked … --set max_terms=2.5 --set alert_after=3

Each folder is a run's output folder (with `metrics.jsonl`). A healthy run that raises any alert is a false alarm, a
hacked one that raises none a miss. `hacked` folders may name what is expected: `out/stuffing-0=stuffing,length`.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from equipoise.ppo.signs import SIGNS
from equipoise.ppo.watch import Watch
from equipoise.ppo.watch_config import WatchConfig
from equipoise.protocol.task import PROTOCOL, task_from_document


def replay(folder: Path, config: WatchConfig) -> tuple[list[tuple[int, str]], dict[str, tuple[float, float]]]:
    """The alerts that a run's logged numbers raise, as (step, name), and the range of every number after the first
    `alert_from_step` steps."""
    recorded = json.loads((folder / "run.json").read_bytes())["config"].get("task")
    watch = Watch(config, task_from_document(recorded, "run.json") if recorded else PROTOCOL)
    alerts: list[tuple[int, str]] = []
    ranges: dict[str, tuple[float, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        alerts += [(row["step"], sign.name) for sign in watch.judge(row["step"], row)]
        if row["step"] >= config.alert_from_step:
            for key in (k for k in row if k.startswith("watch/")):
                low, high = ranges.get(key, (row[key], row[key]))
                ranges[key] = (min(low, row[key]), max(high, row[key]))
    return alerts, ranges


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--healthy", nargs="*", default=[])
    parser.add_argument("--hacked", nargs="*", default=[])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--ranges", action="store_true", help="print the range of every number of each run")
    given = parser.parse_args()
    kinds = {field.name: type(field.default) for field in dataclasses.fields(WatchConfig)}
    changes = {name: kinds[name](value) for name, value in (item.split("=") for item in given.set)}
    config = WatchConfig(**changes)
    false_alarms = misses = 0
    by_name = {sign.name: [0, 0] for sign in SIGNS}
    for label, folders in (("healthy", given.healthy), ("hacked", given.hacked)):
        for item in folders:
            folder, _, expected = item.partition("=")
            alerts, ranges = replay(Path(folder), config)
            for name in {name for _, name in alerts}:
                by_name[name][label == "hacked"] += 1
            shown = ", ".join(f"{name} at {step}" for step, name in alerts) or "no alert"
            missing = set(filter(None, expected.split(","))) - {name for _, name in alerts}
            note = ""
            if label == "healthy" and alerts:
                false_alarms, note = false_alarms + 1, "   FALSE ALARM"
            if label == "hacked" and (missing or not alerts):
                misses, note = misses + 1, f"   MISSED {', '.join(sorted(missing)) or ''}"
            print(f"{label:8} {folder}: {shown}{note}")
            if given.ranges:
                for key, (low, high) in ranges.items():
                    print(f"             {key:26} {low:9.4g} … {high:9.4g}")
    print()
    print("alert         healthy runs  hacked runs")
    for name, (healthy, hacked) in by_name.items():
        print(f"{name:12}  {healthy:12}  {hacked:11}")
    print()
    print(f"false alarms: {false_alarms} of {len(given.healthy)} healthy runs")
    print(f"misses: {misses} of {len(given.hacked)} hacked runs")


if __name__ == "__main__":
    main()
