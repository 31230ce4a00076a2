"""Texts and names that try to run, to break out, or cannot be written; and evaluations made of them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equipoise.evaluation import results, stored
from equipoise.evaluation.results import Evaluation

EXAMPLE = Path(__file__).parent / "example"
TEXTS = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    '=HYPERLINK("http://example.com","x")',
    "@SUM(1+1)|cmd",
    "a\x00b\x07c",
    "caring 🙂 and 👩‍⚕️ bold",
    "\u202ereversed\u202c שלום bold مرحبا caring",
    "lone \ud800 surrogate \udfff bold and caring",
    "x" * 10_000,
    "line one\nline two\r\nthree\u2028four",
    "{{ 7 * 7 }} {% raw %} <!-- ]]> & &lt; ' \" `",
    "$x_1$ \\input{/etc/passwd} \\end{table} & 5 % # ~ ^ [1] | a | **b** <!--",
)


def example() -> Evaluation:
    return stored.read(EXAMPLE)


def renamed(evaluation: Evaluation, name: Callable[[str], str]) -> Evaluation:
    """The evaluation with every method's name changed, wherever it stands."""
    frontier = evaluation.frontier
    return dataclasses.replace(
        evaluation,
        methods={name(old): method for old, method in evaluation.methods.items()},
        comparisons=tuple(dataclasses.replace(c, a=name(c.a), b=name(c.b)) for c in evaluation.comparisons),
        frontier=dataclasses.replace(
            frontier,
            points=tuple(dataclasses.replace(p, method=name(p.method)) for p in frontier.points),
            pareto=tuple(dataclasses.replace(p, method=name(p.method)) for p in frontier.pareto),
        ),
    )


def hostile(folder: Path) -> Path:
    """An evaluation folder whose names, notes and sentences are all of `TEXTS`."""
    evaluation = example()
    names = dict(zip(evaluation.methods, TEXTS[1:], strict=False))
    bad = "</style></script><script>alert(4)</script>\x00\ud800 $a$ \\b & % _ |"
    evaluation = renamed(evaluation, lambda old: names[old])
    evaluation = dataclasses.replace(
        evaluation,
        notices=(bad,),
        provenance=evaluation.provenance | {"command": bad},
        judges=tuple(dataclasses.replace(j, caveat=bad, source=bad) for j in evaluation.judges),
        metrics={key: dataclasses.replace(m, title=m.title + bad, note=bad) for key, m in evaluation.metrics.items()},
        comparisons=tuple(dataclasses.replace(c, note=bad) for c in evaluation.comparisons),
        methods={n: dataclasses.replace(m, model=bad, problems=(bad,)) for n, m in evaluation.methods.items()},
        files=tuple(
            dataclasses.replace(f, path=bad, problems=(results.Problem(bad, 1, (1,), bad),)) for f in evaluation.files
        ),
    )
    rows: list[dict[str, Any]] = [dict(row) for row in stored.read_rows(EXAMPLE / "rows.csv")]
    for i, row in enumerate(rows):
        row["Method"] = names[row["Method"]]
        row["Text"] = TEXTS[i % len(TEXTS)]
    return written(folder, evaluation, rows)


def written(folder: Path, evaluation: Evaluation, rows: list[dict[str, Any]]) -> Path:
    """An evaluation folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(stored.to_json(evaluation), encoding="utf-8")
    columns = list(rows[0]) if rows else list(results.row_columns(list(evaluation.lexicon)))
    (folder / "rows.csv").write_bytes(stored.to_csv(columns, ([row[column] for column in columns] for row in rows)))
    return folder


def training_run(folder: Path) -> Path:
    """A run folder of 40 steps with two alerts; one value is not finite and the last line is cut short."""
    folder.mkdir(parents=True)
    keys = ("reward/mean", "compliance/both", "compliance/strict", "kl/ref", "ppo/entropy")
    lines = ["step," + ",".join(keys)]
    for step in range(1, 41):
        done = step / 40
        values = [done, 0.9 * done, 0.8 * done, 10 * done, float("nan") if step == 7 else 2 - done]
        lines.append(",".join([str(step), *map(repr, values)]))
    (folder / "training_metrics.csv").write_text("\n".join([*lines, "41,0.5"]))
    (folder / "events.jsonl").write_text(
        '{"step": 9, "kind": "alert", "name": "one-class plateau", "evidence": {"compliance/one": 0.61,'
        ' "sentences": ["<i>x</i>"]}, "remedy": "warm start <b>now</b>"}\n'
        '{"step": 20, "kind": "resume", "checkpoint": "checkpoint-20"}\n'
        '{"step": 30, "kind": "alert", "name": "term collapse", "evidence": "4 pairs", "remedy": "a bonus"}\n'
        '{"step": 31, "kind"'
    )
    (folder / "run.json").write_text('{"config": {"prompt": "describe", "seed": 3, "ppo": {"learning_rate": 1e-05}}}')
    return folder
