"""Compliance, variety and distance of the runs of a sweep: a row a run, a table over seeds, a plot.

    equipoise sweep benchmarks/frontier.yaml --output-dir frontier --jobs 8
    python benchmarks/frontier.py frontier --output docs/frontier

writes docs/frontier.csv (a row a run) and docs/frontier.svg, and prints the table of docs/FRONTIER.md. Given a .csv in
place of folders, it draws from that. The excess is KL(π‖π_ref) of the closing summary's sentences minus the bound for
their strict success, whose base rate p₀ does not come from the runs (too rare there): --base-rate, --base-low and
--base-high are estimate and 95 % interval, by default those of Ctrl-G's importance weights (benchmarks/RESULTS.md).
The KL of runs with a target (benchmarks/targets.yaml) is split into compliance, variety and waste by their own rates of
pairs. With --pairs, a costs file of Ctrl-G or the record beside its sentences, that of every run whose summary has the
outcomes of its sentences is split by these, and a second plot, …-waste.svg, shows that and what no run can reach. Its
.csv then holds the boundary too, as rows of the setting `least`: drawing from it needs no --pairs. docs/targets.csv is
such a one, and docs/targets.svg its plot:

    python benchmarks/frontier.py docs/targets.csv --waste docs/targets.svg
"""

import argparse
import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from equipoise.measures.decomposition import PairRates, least_variety, read_outcomes, split
from equipoise.measures.shares import kl_bound
from equipoise.ppo.evaluate import read_pair_rates
from equipoise.protocol.task import PROTOCOL

MEASURES = ("both", "strict", "pairs", "effective_pairs", "unique", "nll", "kl")
BASE_RATE, BASE_LOW, BASE_HIGH = 0.000209, 0.000173, 0.000245

Row = dict[str, str | float]


SPENT = ("compliance", "variety", "waste", "waste_low", "waste_high")


def read_runs(folders: list[Path], pairs: PairRates | None) -> list[Row]:
    """The closing summaries of all runs in these sweeps."""
    rows: list[Row] = []
    for path in sorted(path for folder in folders for path in folder.glob("*/summary.json")):
        named = re.fullmatch(r"(.+)-(\d+)", path.parent.name)
        summary = json.loads(path.read_text())
        if named and "final" in summary:
            values = {key: round(float(summary["final"][key]), 5) for key in MEASURES}
            row = {"setting": named[1], "seed": named[2], "steps": summary["steps"], **values}
            rows.append(row | spent(summary, pairs))
    return rows


def spent(summary: dict[str, Any], pairs: PairRates | None) -> Row:
    """What a run's KL is spent on: by these rates of pairs, or without any by those that the run itself had; nothing
    where it had none."""
    if pairs is None:
        own = {key: summary["final"].get(f"kl_{key}") for key in SPENT[:3]}
        return {key: round(value, 4) for key, value in own.items() if value is not None}
    if "outcomes" not in summary:
        return {}
    made = split(read_outcomes(summary["outcomes"]), pairs)
    values = (made.compliance.value, made.variety.value, *made.waste)
    return {key: round(value, 4) for key, value in zip(SPENT, values, strict=True)}


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k in ("setting", "seed") else float(v) for k, v in row.items() if v} for row in rows]


def with_excess(rows: list[Row], rate: float) -> list[Row]:
    return [{**row, "excess": float(row["kl"]) - kl_bound(float(row["strict"]), rate)} for row in rows]


def by_setting(rows: list[Row]) -> dict[str, list[Row]]:
    out = defaultdict(list)
    for row in rows:
        out[str(row["setting"])].append(row)
    return dict(out)


def cell(rows: list[Row], key: str, form: str, factor: float = 1.0) -> str:
    if not all(key in row for row in rows):
        return ""
    values = [factor * float(row[key]) for row in rows]
    mean = form.format(sum(values) / len(values))
    return f"{mean} ({form.format(min(values))}–{form.format(max(values))})"


def table(rows: list[Row]) -> str:
    """Markdown: mean over seeds, and the range."""
    columns = [
        ("both classes %", "both", "{:.2f}", 100),
        ("strict %", "strict", "{:.2f}", 100),
        ("pairs", "pairs", "{:.0f}", 1),
        ("effective pairs", "effective_pairs", "{:.1f}", 1),
        ("different texts %", "unique", "{:.1f}", 100),
        ("nats per token", "nll", "{:.2f}", 1),
        ("KL", "kl", "{:.1f}", 1),
        ("excess, strict", "excess", "{:.2f}", 1),
        *((name, name, "{:.2f}", 1) for name in ("compliance", "variety", "waste") if any(name in row for row in rows)),
    ]
    lines = [
        "| setting | runs | " + " | ".join(title for title, *_ in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for setting, own in by_setting(rows).items():
        cells = [cell(own, key, form, factor) for _, key, form, factor in columns]
        lines.append(f"| {setting} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


LEAST = "least"
"""The setting of rows that say what so much variety costs at the least."""


def boundary(pairs: PairRates) -> list[Row]:
    """What no policy can be below, from one pair to all of them alike, as rows."""
    curve = [(1.0, 0.0), *least_variety(pairs)]
    return [
        {"setting": LEAST, "seed": str(i), "effective_pairs": round(x, 3), "variety": round(y, 4)}
        for i, (x, y) in enumerate(curve)
    ]


def plot_spent(rows: list[Row], least: list[Row], path: Path) -> None:
    """KL beyond compliance's over effective pairs, and waste over them; what no policy can reach is grey."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2)
    curve = [(float(row["effective_pairs"]), float(row["variety"])) for row in least]
    left.fill_between(*zip(*curve, strict=True), -1, color="0.88", linewidth=0, label="not reachable")
    left.plot(*zip(*curve, strict=True), color="black", linewidth=1.2)
    for number, (setting, own) in enumerate(by_setting([row for row in rows if "waste" in row]).items()):
        colour, mark, x = f"C{number % 10}", "os^vDP*X<>"[number % 10], [float(row["effective_pairs"]) for row in own]
        named = setting.replace("`", "")
        beyond = [float(row["variety"]) + float(row["waste"]) for row in own]
        left.scatter(x, beyond, s=28, color=colour, marker=mark, label=named, linewidths=0)
        wasted = [float(row["waste"]) for row in own]
        # A run that was split by rates of its own has no interval.
        low, high = ([float(r.get(f"waste_{end}", r["waste"])) for r in own] for end in ("low", "high"))
        right.vlines(x, low, high, color=colour)
        right.scatter(x, wasted, s=28, color=colour, marker=mark, linewidths=0)
    left.set(xlabel="effective pairs of 100", ylabel="nats beyond compliance, per sentence", ylim=(-0.5, None))
    right.set(xlabel="effective pairs of 100", ylabel="waste, nats per sentence", ylim=(-0.5, None))
    right.axhline(0, color="black", linewidth=1.2)
    right.axhspan(-0.5, 0, color="0.88", linewidth=0)
    for axes in (left, right):
        axes.set(xlim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize="small"
    )
    figure.savefig(path, metadata={"Date": None})


def plot(rows: list[Row], path: Path) -> None:
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2)
    for number, (setting, own) in enumerate(by_setting(rows).items()):
        colour, mark = f"C{number % 10}", "os^vDP*X<>"[number % 10]
        for axes, key, factor in ((left, "strict", 100.0), (right, "effective_pairs", 1.0)):
            x = [float(row["excess"]) for row in own]
            y = [factor * float(row[key]) for row in own]
            axes.scatter(
                x, y, s=28, color=colour, marker=mark, label=setting.replace("`", ""), alpha=0.85, linewidths=0
            )
    left.set(xlabel="excess KL, nats per sentence", ylabel="strict success, %")
    left.axhline(97, color="0.8", linewidth=0.8, zorder=0)
    right.set(xlabel="excess KL, nats per sentence", ylabel="effective pairs of 100", yscale="log")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.axvline(2, color="0.8", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize="small"
    )
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sweeps", nargs="+", type=Path, help="folders of sweeps, or one .csv written before")
    parser.add_argument("--output", type=Path, help="where the .csv and the .svg go, without ending")
    parser.add_argument("--base-rate", type=float, default=BASE_RATE)
    parser.add_argument("--base-low", type=float, default=BASE_LOW)
    parser.add_argument("--base-high", type=float, default=BASE_HIGH)
    parser.add_argument("--pairs", default="", help="how often the untrained model succeeds with each pair")
    parser.add_argument("--waste", type=Path, help="where the second plot goes; by default beside the first")
    given = parser.parse_args()
    if missing := [str(path) for path in given.sweeps if not path.exists()]:
        parser.error(f"there is no {missing[0]}: give folders of sweeps, or one .csv written before")
    rcParams["svg.hashsalt"] = "equipoise"  # so that equal data make equal files
    pairs = read_pair_rates(given.pairs, PROTOCOL)
    is_csv = given.sweeps[0].suffix == ".csv"
    found = read_csv(given.sweeps[0]) if is_csv else read_runs(given.sweeps, pairs)
    runs = [row for row in found if row["setting"] != LEAST]
    if not runs:
        parser.error(f"no run in {given.sweeps[0]} has a closing summary: give a folder of finished runs")
    least = [row for row in found if row["setting"] == LEAST] if pairs is None else boundary(pairs)
    rows = with_excess(runs, given.base_rate)
    waste = given.waste or (given.output and given.output.with_name(given.output.name + "-waste.svg"))
    if waste and least and any("waste" in row for row in rows):
        plot_spent(rows, least, waste)
    elif given.waste:
        parser.error(f"nothing of waste is known of {given.sweeps[0]}: give --pairs, or a .csv that has it")
    if given.output:
        if not is_csv:
            with given.output.with_suffix(".csv").open("w", newline="") as file:
                written = [*sorted(runs, key=len, reverse=True), *least]
                columns = list(dict.fromkeys(key for row in written for key in row))
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows([*runs, *least])
        plot(rows, given.output.with_suffix(".svg"))
    print(table(rows))
    print()
    ends = [with_excess(runs, rate) for rate in (given.base_low, given.base_high)]
    for setting, own in by_setting(rows).items():
        low, high = sorted(sum(float(r["excess"]) for r in by_setting(end)[setting]) / len(own) for end in ends)
        print(f"{setting}: excess with p0 at the ends of its interval {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
