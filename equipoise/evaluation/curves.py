"""The figures that need training runs or the base model: compliance against KL, and the training curves."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from equipoise.evaluation.figures import dot, ends, handle
from equipoise.evaluation.plots import (
    GREY,
    OKABE_ITO,
    Look,
    Plot,
    empty,
    legend_below,
    looks,
    new_figure,
    slugs,
    widen,
)
from equipoise.evaluation.results import FEWEST, Evaluation, Frontier, FrontierPoint
from equipoise.evaluation.runs import TrainingRun, smoothed
from equipoise.evaluation.visible import shortened
from equipoise.evaluation.wording import event, term_pairs
from equipoise.measures.shares import kl_bound
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task

CURVES = {"both": "compliance/both", "strict": "compliance/strict"}
"""Which curve of a run is the compliance that a frontier is about."""
PAIRS = "{pairs} in a batch"
PANELS = (
    ("reward", ("reward/mean", "reward/training")),
    ("compliance", ("compliance/both", "compliance/strict", "compliance/one")),
    ("KL to the base model, nats per sentence", ("kl/ref", "kl/bound")),
    ("KL of one update, nats per token", ("ppo/update_kl",)),
    ("entropy, nats per token", ("ppo/entropy",)),
    ("clip fraction", ("ppo/clip_fraction",)),
    ("words in a sentence", ("text/words",)),
    (PAIRS, ("text/pairs",)),
    ("parts of the reward", ("reward/bonus", "reward/length_penalty", "reward/repetition_penalty")),
    ("different texts in a batch", ("text/unique",)),
)


def frontier_plot(evaluation: Evaluation, runs: Sequence[TrainingRun]) -> Plot:
    """Compliance against KL to the base model, with the bound, the methods, and every run's path."""
    frontier = evaluation.frontier
    look = looks(list(evaluation.methods))
    points = [p for p in frontier.points if p.kl is not None and p.kl.value is not None]
    paths = {run.name: run.path(CURVES[frontier.event]) for run in runs}
    bound = _bound_rows(frontier)
    compliance, drawn = event(evaluation.task, frontier.event), bool(points) or any(paths.values())
    excess = ", ".join(f"{p.method} {p.excess:z.2f}" for p in points if p.excess is not None)
    return Plot(
        name="compliance-kl",
        title="Compliance and distance from the base model",
        caption=f"Share of sentences with {compliance}"
        " against KL to the base model. "
        + (
            "No method can be left of the curve kl(c‖p₀), the least KL that compliance c needs; its band is the "
            f"interval of p₀. p₀ is from {frontier.p0_source}. "
            if drawn and bound
            else "" if bound else f"No curve: {frontier.p0_source}. "
        )
        + (f"With fewer than {FEWEST} sentences a marker is hollow. " if any(p.compliance.n < FEWEST for p in points)
           else "")
        + _of_paths(runs, paths)
        + ("Distances to the left of the curve are sampling error, or rows cut by top-p." if drawn and bound else ""),
        alt=f"Scatter of compliance over KL. Nats above the bound: {excess or 'not known'}.",
        columns=("series", "step", "compliance", "compliance_low", "compliance_high", "kl", "kl_low", "kl_high",
                 "bound", "bound_low", "bound_high", "excess"),
        rows=[
            *((p.method, "", *ends(p.compliance), *ends(p.kl), *ends(p.bound), p.excess) for p in frontier.points),
            *(("bound", "", c, "", "", *map(_finite, kls)) for c, *kls in bound),
            *((f"run {name}", step, c, "", "", kl) for name, path in paths.items() for step, kl, c in path),
        ],
        draw=partial(_draw_frontier, compliance, points, paths, look, bound),
    )  # fmt: skip


def _of_paths(runs: Sequence[TrainingRun], paths: Mapping[str, Sequence[object]]) -> str:
    """What the lines of training runs are of, whose KL is another estimate than the methods'."""
    drawn = [path for path in paths.values() if path]
    if not drawn:
        return ""
    smooth = ", smoothed" if any(_window(path) > 1 for path in drawn) else ""
    sizes = sorted({size for run in runs if (size := _batch(run))})
    of = f" of {' or '.join(f'{size:,}' for size in sizes)} sentences" if sizes else ""
    return (
        f"Lines with small dots are training runs{smooth}, from their batches{of} as training samples them; a method's "
        "KL is of its own sentences, as the note below says. "
    )


def _batch(run: TrainingRun) -> int | None:
    """Sentences of one step, where the record says."""
    config = run.record.get("config")
    ppo = config.get("ppo") if isinstance(config, Mapping) else None
    size = ppo.get("batch_size") if isinstance(ppo, Mapping) else None
    return size if isinstance(size, int) else None


def _bound_rows(frontier: Frontier) -> list[tuple[float, float, float, float]]:
    """(compliance, least KL, at the upper end of p₀, at the lower end), from p₀ upward."""
    if frontier.p0 is None or frontier.p0.value is None:
        return []
    middle, low, high = ends(frontier.p0)
    rows = []
    for i in range(201):
        c = i / 200
        kls = [kl_bound(c, p) if p is not None and c >= p else 0.0 for p in (middle, high, low)]
        rows.append((c, kls[0], kls[1], kls[2]))
    return rows


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _draw_frontier(
    compliance: str,
    points: Sequence[FrontierPoint],
    paths: Mapping[str, Sequence[tuple[int, float, float]]],
    look: Mapping[str, Look],
    bound: Sequence[tuple[float, float, float, float]],
) -> Figure:
    if not points and not any(paths.values()):
        return empty("No method has a KL to the base model, and no training run was given.")
    figure = new_figure(5.2, 4.3)
    axes = figure.add_subplot()
    farthest = [p.kl.high or p.kl.value or 0.0 for p in points if p.kl] + [k for q in paths.values() for _, k, _ in q]
    finite = [kl for row in bound for kl in row[1:] if math.isfinite(kl)]
    right = 1.08 * max([*farthest, *finite, 0.1])
    handles: list[Line2D | Patch] = []
    if bound:
        y = [100 * c for c, *_ in bound]
        axes.fill_betweenx(
            y, [min(row[2], right) for row in bound], [min(row[3], right) for row in bound],
            color="#cccccc", linewidth=0,
        )  # fmt: skip
        if math.isfinite(bound[-1][1]):
            axes.plot([kl for _, kl, *_ in bound], y, color="black", linewidth=1.3)
            handles.append(Line2D([], [], color="black", label="least KL, kl(c‖p₀)"))
        handles.append(Patch(facecolor="#cccccc", label="… for p₀ in its interval"))
    for i, (name, path) in enumerate(paths.items()):
        if path:
            kl = smoothed([k for _, k, _ in path], _window(path))
            both = smoothed([c for _, _, c in path], _window(path))
            shown = [(k, 100 * c) for k, c in zip(kl, both, strict=True) if k is not None and c is not None]
            style = (0, ((), (5, 2), (1, 1.5))[i % 3])
            axes.plot(*zip(*shown, strict=True), color=GREY, linewidth=1, linestyle=style, label=name,
                      marker=".", markevery=max(1, len(shown) // 10))  # fmt: skip
            axes.annotate(f"step {path[-1][0]}", shown[-1], xytext=(4, -10), textcoords="offset points", fontsize=7.5)
            handles.append(Line2D([], [], color=GREY, linestyle=style, marker=".", label=f"run {shortened(name, 24)}"))
    for p in points:
        assert p.kl is not None
        dot(axes, p.kl, p.compliance, look[p.method], filled=p.compliance.n >= FEWEST, scale=(1, 100))
        handles.append(handle(p.method, look[p.method], p.compliance.n))
    nearest = [p.kl.low or 0.0 for p in points if p.kl] + [k for q in paths.values() for _, k, _ in q]
    axes.set_xlim(min([-0.02 * right, *(1.1 * k for k in nearest)]), right)
    axes.set_ylim(-4, 106)
    axes.set_xlabel("KL to the base model, nats per sentence")
    axes.set_ylabel(f"{compliance}, %")
    legend_below(figure, handles)
    return figure


def training_plots(runs: Sequence[TrainingRun]) -> list[Plot]:
    """The curves of each run, with its alerts."""
    named = slugs([run.name for run in runs])
    return [_training(run, named[run.name]) for run in runs]


def _training(run: TrainingRun, slug: str) -> Plot:
    words = term_pairs(run.task)
    panels = [(title.format(pairs=words), [key for key in keys if key in run.curves]) for title, keys in PANELS]
    keys = [key for _, own in panels for key in own]
    alerts = ", ".join(f"{i + 1} {alert.name} from step {alert.step}" for i, (alert, _, _) in enumerate(run.signs))
    return Plot(
        name=f"training-{slug}",
        title=f"Training run {run.name}",
        caption=_of_batches(run)
        + "KL to the base model (k1) is of whole sentences as training samples them, that of one update is of the "
        "policy before a step to the one after it. docs/METRICS.md defines every key. "
        + (
            "Numbered lines are where alerts were first raised; they are explained below."
            if alerts
            else "The run recorded no alert."
        ),
        alt=f"Training curves over {plural(len(run.steps), 'step')}. Alerts: {alerts or 'none'}.",
        columns=("step", *keys),
        rows=[(step, *(run.curves[key][i] for key in keys)) for i, step in enumerate(run.steps)],
        draw=partial(_draw_training, run, [(title, own) for title, own in panels if own]),
        dense=True,
    )


def _of_batches(run: TrainingRun) -> str:
    size, window = _batch(run), _window(run.steps)
    of = f" of {plural(size, 'sentence')}" if size else ""
    mean = f" (pale) with a running mean over {plural(window, 'step')}" if window > 1 else ""
    return f"Each value is of one batch{of}{mean}. "


def _labels(task: Task) -> dict[str, str]:
    """What curves are called whose keys are of the default task."""
    count = len(task.classes)
    return {"compliance/both": {1: "the class", 2: "both classes"}.get(count, "all classes"),
            "compliance/one": "one class" if count == 2 else "some classes"}  # fmt: skip


def _draw_training(run: TrainingRun, panels: Sequence[tuple[str, Sequence[str]]]) -> Figure:
    if not run.steps or not panels:
        return empty("The run has no completed step yet.")
    lines = math.ceil(len(panels) / 2)
    figure = new_figure(6.6, 1.75 * lines)
    grid = figure.subplots(lines, 2, squeeze=False, sharex=True)
    window, labels = _window(run.steps), _labels(run.task)
    for axes, (title, keys) in zip(grid.flat, panels, strict=False):
        for i, key in enumerate(keys):
            colour, dashes = OKABE_ITO[i], ("-", (0, (4, 1.5)), (0, (1, 1.2)))[i % 3]
            axes.plot(run.steps, _gaps(run.curves[key]), color=colour, alpha=0.25, linewidth=0.8)
            mean, label = smoothed(run.curves[key], window), labels.get(key, key.partition("/")[2].replace("_", " "))
            marker = "." if len(run.steps) == 1 else ""
            axes.plot(run.steps, _gaps(mean), color=colour, linestyle=dashes, marker=marker, label=label)
        widen([value for key in keys for value in run.curves[key] if value is not None], axes)
        _mark_alerts(axes, run)
        axes.set_title(title, fontsize=8.5, pad=16 if len(keys) > 1 else None)
        axes.tick_params(labelsize=7.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(keys) > 1:  # above the curves, never over them
            axes.legend(
                fontsize=7, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(keys), handlelength=1.8,
                columnspacing=1.0, borderaxespad=0.2,
            )  # fmt: skip
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=8)
    return figure


def _mark_alerts(axes: Axes, run: TrainingRun) -> None:
    for i, (alert, _, _) in enumerate(run.signs):
        axes.axvline(alert.step, color=OKABE_ITO[1], linewidth=0.9, linestyle=(0, (2, 1.5)))
        axes.annotate(
            str(i + 1), (alert.step, 1), xycoords=("data", "axes fraction"), xytext=(1.5, -1),
            textcoords="offset points", va="top", fontsize=7, color=OKABE_ITO[1],
        )  # fmt: skip


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _window(steps: Sequence[object]) -> int:
    """An odd number, about a thirtieth of the steps: smooth, yet a change within a tenth of a run still shows."""
    return max(1, len(steps) // 30) | 1
