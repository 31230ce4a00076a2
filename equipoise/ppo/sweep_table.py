"""The table of a sweep: means and ranges over seeds."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.protocol.task import Task
from equipoise.runs.records import flatten

MEASURES: dict[str, tuple[str, str, float]] = {
    "reward_last": ("reward, mean of the last steps", "{:z.3f}", 1),
    "good_step": ("first step with 10-step reward 0.9", "{:z.0f}", 1),
    "final.both": ("every class %", "{:z.2f}", 100),
    "final.strict": ("strict success %", "{:z.2f}", 100),
    "final.pairs": ("unique pairs", "{:z.1f}", 1),
    "final.effective_pairs": ("effective pairs", "{:z.1f}", 1),
    "final.unique": ("different texts %", "{:z.1f}", 100),
    "groups.trained.strict": ("strict %, trained occupations", "{:z.2f}", 100),
    "groups.held_out.strict": ("strict %, held-out occupations", "{:z.2f}", 100),
    "final.nll": ("median NLL under the base, plain", "{:z.3f}", 1),
    "base.nll": ("the same of the base's sentences", "{:z.3f}", 1),
    "kl_ref": ("KL to the reference, training", "{:z.2f}", 1),
    "final.kl": ("KL to the reference, generation", "{:z.2f}", 1),
    "kl_bound": ("bound for every class", "{:z.2f}", 1),
    "kl_excess": ("excess over the bound", "{:z.2f}", 1),
    "kl_excess_strict": ("excess, strict success", "{:z.2f}", 1),
    "alerts": ("alerts", "{:z.1f}", 1),
    "exported_step": ("exported step", "{:z.0f}", 1),
    "train_seconds": ("training, s", "{:z.0f}", 1),
    "final_seconds": ("final sentences, s", "{:z.0f}", 1),
    "wall_seconds": ("all of it, s", "{:z.0f}", 1),
}
"""Where in a summary each measure is, its name in the table, how it is written, and its factor there."""


TABLES = {"runs.csv": "setting,seed,", "table.csv": "setting,measure,mean,"}
"""The tables of a sweep as files, and what each begins with."""


def values_of(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """One number for each of `MEASURES`; None for what the run did not measure."""
    flat = flatten({**summary, "alerts": sum(summary["alerts"].values())})
    return {key: flat.get(key) for key in MEASURES}


def statistics_of(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """setting → measure → mean, low, high and the number of runs that have it."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for setting in dict.fromkeys(r["setting"] for r in results):
        out[setting] = {}
        for key in MEASURES:
            values = [v for r in results if r["setting"] == setting and (v := r["values"].get(key)) is not None]
            if values:
                mean = math.fsum(values) / len(values)
                out[setting][key] = {"mean": mean, "low": min(values), "high": max(values), "runs": len(values)}
    return out


def table(results: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> str:
    """One column a setting, one line a measure: mean over the seeds, and the range in brackets. `tasks`: those trained
    on, which say what their pairs are called."""
    nouns = {task.pair_noun for task in tasks}
    noun = nouns.pop() if len(nouns) == 1 else "combinations"
    settings = statistics_of(results)
    seeds = {s: sum(r["setting"] == s for r in results) for s in settings}
    rows = [["", *settings], ["runs", *(str(seeds[s]) for s in settings)]]
    for key, (title, form, factor) in MEASURES.items():
        cells = [_cell(settings[s].get(key), form, factor, seeds[s]) for s in settings]
        if any(cells):
            rows.append([title.replace("pairs", noun), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


def _cell(found: Mapping[str, float] | None, form: str, factor: float, runs: int) -> str:
    if found is None:
        return ""
    mean, low, high = (form.format(factor * found[k]) for k in ("mean", "low", "high"))
    # Not every run need have it: a reward that was never reached has no step.
    missing = f" of {found['runs']:.0f}" if found["runs"] < runs else ""
    return (mean if runs == 1 else f"{mean} [{low}–{high}]") + missing


def as_files(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, Any]]:
    """`runs.csv` (a row a run) and `table.csv` (a row a setting and measure) by their names, and what `sweep.json`
    holds of both."""
    settings = statistics_of(results)
    columns = ("setting", "seed")
    runs = [[*columns, *MEASURES]]
    runs += [[*(r[c] for c in columns), *(r["values"].get(k) for k in MEASURES)] for r in results]
    rows: list[list[Any]] = [["setting", "measure", "mean", "low", "high", "runs"]]
    rows += [[s, key, *v.values()] for s, measures in settings.items() for key, v in measures.items()]
    files = {}
    for name, content in zip(TABLES, (runs, rows), strict=True):
        text = io.StringIO(newline="")
        csv.writer(text).writerows(content)
        files[name] = text.getvalue()
    return files, {"settings": settings, "runs": list(results)}
