"""Learning, variety and cost of the runs of a sweep, finished or not: a table over seeds.

    equipoise sweep benchmarks/algorithms.yaml --output-dir algorithms --jobs 24 --keep nothing
    python benchmarks/algorithms.py algorithms --output docs/algorithms.csv

prints the table of docs/FRONTIER.md, and writes a row a run with --output. Such a .csv may stand among the folders, or
in their place: of a run that is in several the longest counts, of equals one with a closing summary, then the last.
--whole 400 leaves out runs of fewer steps. "Reward" is the mean of the last 20 steps; "0.9 at step" the first whose
last 10 steps have that mean reward; the shares, pairs and KL are those of the closing summary's sentences, where a run
came to it; seconds are those of training alone, on whatever ran beside it.
"""

import argparse
import csv
import re
from pathlib import Path
from typing import Any

from equipoise.documents import read_json
from equipoise.ppo.summary import SUMMARY, objects, read_rows, training_summary

COLUMNS = {
    "steps": ("steps", "{:.0f}", 1),
    "reward": ("reward", "{:z.2f}", 1),
    "good_step": ("0.9 at step", "{:.0f}", 1),
    "both": ("both classes %", "{:.1f}", 100),
    "strict": ("strict %", "{:.1f}", 100),
    "effective_pairs": ("effective pairs", "{:.1f}", 1),
    "unique": ("different texts %", "{:.0f}", 100),
    "kl": ("KL", "{:z.1f}", 1),
    "seconds": ("s", "{:.0f}", 1),
    "peak_gb": ("GB", "{:.1f}", 1),
}
"""Of each number its title, how it is written, and its factor there."""

COUNTED = ("steps", "good_step")

FINAL = ("both", "strict", "effective_pairs", "unique", "kl")
"""Those that the closing summary measures."""

Row = dict[str, Any]


def read_runs(folders: list[Path]) -> list[Row]:
    """A row for each run that has logged a step; what is not known of it yet is None."""
    rows: list[Row] = []
    for path in sorted(path for folder in folders for path in folder.glob("*/metrics.jsonl")):
        named, steps = re.fullmatch(r"(.+)-(\d+)", path.parent.name), read_rows(path.parent)
        if not named or not steps:
            continue
        summary: dict[str, Any] = {}
        if (path.parent / SUMMARY).exists():
            summary = read_json(path.parent / SUMMARY)
        final, learnt = summary.get("final") or {}, training_summary(steps, len(steps))
        peaks = [row.get("memory/peak_gb", 0.0) for row in objects(path)]
        rows.append(
            {
                "setting": named[1],
                "seed": named[2],
                "steps": steps[-1]["step"],
                "reward": round(learnt["reward_last"], 5),
                "good_step": learnt["good_step"],
                **{key: round(final[key], 5) if key in final else None for key in FINAL},
                "seconds": round(learnt["train_seconds"], 5),
                "peak_gb": round(max(peaks), 5),
            }
        )
    return rows


def read_csv(path: Path) -> list[Row]:
    def read(key: str, text: str) -> Any:
        if key in ("setting", "seed"):
            return text
        return None if not text else int(float(text)) if key in COUNTED else float(text)

    with path.open(newline="") as file:
        return [{key: read(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def joined(sources: list[Path], whole: int = 0) -> list[Row]:
    """The runs of folders and .csv files, each once: the longest, of equals one with a closing summary, then the last;
    without those of fewer steps than `whole`. In the order of their settings' first appearance and their seeds."""
    found: dict[tuple[str, str], Row] = {}
    for source in sources:
        for row in read_csv(source) if source.suffix == ".csv" else read_runs([source]):
            before = found.setdefault((row["setting"], row["seed"]), row)
            if _goes_further(row) >= _goes_further(before):
                found[row["setting"], row["seed"]] = row
    settings = list(dict.fromkeys(setting for setting, _ in found))
    kept = [row for row in found.values() if row["steps"] >= whole]
    return sorted(kept, key=lambda row: (settings.index(row["setting"]), int(row["seed"])))


def _goes_further(row: Row) -> tuple[int, bool]:
    return row["steps"], row["strict"] is not None


def cell(rows: list[Row], key: str) -> str:
    """Mean and range over the runs that have the number; how many, where not all do."""
    _, form, factor = COLUMNS[key]
    values = [factor * row[key] for row in rows if row[key] is not None]
    if not values:
        return "–"
    mean, low, high = (form.format(x) for x in (sum(values) / len(values), min(values), max(values)))
    told = mean if low == high else f"{mean} ({low}–{high})"
    return told + (f" in {len(values)}" if len(values) < len(rows) else "")


def table(rows: list[Row]) -> str:
    """Markdown: a line a setting, in the order in which they are found."""
    lines = [
        "| setting | runs | " + " | ".join(title for title, *_ in COLUMNS.values()) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        lines.append(f"| {setting} | {len(own)} | " + " | ".join(cell(own, key) for key in COLUMNS) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sweeps", nargs="+", type=Path, help="folders of sweeps, and .csv files written before")
    parser.add_argument("--output", type=Path, help="where a row a run is written, as .csv")
    parser.add_argument("--whole", type=int, default=0, help="leave out runs of fewer steps")
    given = parser.parse_args()
    rows = joined(given.sweeps, given.whole)
    if given.output and rows:
        with given.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
