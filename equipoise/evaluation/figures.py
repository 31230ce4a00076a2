"""The figures of a report: what each shows, in words and numbers, and how it is drawn."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from equipoise.evaluation.pair_figures import pair_plots
from equipoise.evaluation.plots import (
    OKABE_ITO,
    Look,
    Plot,
    empty,
    heat,
    legend_below,
    looks,
    new_figure,
    slugs,
)
from equipoise.evaluation.results import FEWEST, Comparison, Estimate, Evaluation, ParetoPoint
from equipoise.evaluation.visible import shortened
from equipoise.evaluation.wording import event, listed
from equipoise.protocol.plural import plural

PARTS = ("base", "bonus", "length_penalty", "repetition_penalty")
_PART_LOOKS = (("#0072B2", ""), ("#56B4E9", "//"), ("#E69F00", "\\\\"), ("#D55E00", "x"))


STRICT = "strict"
"""The key of the metric of strict success."""
MOST_PAIRS = 45
"""Rows of the forest: every pair of ten methods."""
ACROSS = 24
"""Occupations that stand side by side; more are drawn one below the other."""
MOST_OCCUPATIONS = 60
"""Of more than these, those that succeed least are drawn."""
LONGEST = 40
"""Words up to which lengths are drawn."""


def figures(evaluation: Evaluation) -> list[Plot]:
    """Every figure that the evaluation by itself has numbers for."""
    look = looks(list(evaluation.methods))
    sizes = {name: method.n for name, method in evaluation.methods.items()}
    plots = list(_adherence_fluency(evaluation, look))
    plots.append(_occupations(evaluation))
    plots += pair_plots(evaluation)
    plots.append(_parts(evaluation))
    plots.append(_lengths(evaluation, look, sizes))
    if evaluation.comparisons:
        plots.append(_differences(evaluation))
    return plots


def _adherence_fluency(evaluation: Evaluation, look: Mapping[str, Look]) -> Iterator[Plot]:
    judges = list(dict.fromkeys(point.judge for point in evaluation.frontier.pareto))
    compliance = event(evaluation.task, evaluation.frontier.event)
    for judge, slug in slugs(judges).items():
        points = [p for p in evaluation.frontier.pareto if p.judge == judge and p.fluency.value is not None]
        members = [p.method for p in points if p.member]
        few = [p.method for p in points if not p.member and min(p.adherence.n, p.fluency.n) < FEWEST]
        left_out = f" With fewer than {FEWEST} sentences, {listed(few)} cannot be on it." if few else ""
        yield Plot(
            name=f"adherence-fluency-{slug}",
            title=f"Adherence and fluency under the judge {judge}",
            caption=f"Share of sentences with {compliance} against the median negative log-likelihood of the sentences "
            "(lower is more fluent), with 95 % intervals. Filled markers are on the Pareto front: no other method is "
            f"at least as good in both and better in one.{left_out} The percentage behind a method's name is the "
            "share of bootstrap draws in which it is on the front. The best corner is the upper left one.",
            alt=f"Scatter of {compliance} over negative log-likelihood under {judge}. On the front: "
            + (", ".join(members) or "none"),
            columns=("method", "adherence", "adherence_low", "adherence_high", "nll", "nll_low", "nll_high", "member",
                     "support"),
            rows=[
                (p.method, *ends(p.adherence), *ends(p.fluency), int(p.member), p.support) for p in points
            ],
            draw=partial(_draw_adherence_fluency, points, look, compliance),
        )  # fmt: skip


def _draw_adherence_fluency(points: Sequence[ParetoPoint], look: Mapping[str, Look], compliance: str) -> Figure:
    if not points:
        return empty("No method has a fluency under this judge.")
    figure = new_figure(5.2, 3.9)
    axes = figure.add_subplot()
    front = sorted((p.fluency.value or 0.0, 100 * (p.adherence.value or 0.0)) for p in points if p.member)
    if len(front) > 1:
        axes.step(*zip(*front, strict=True), where="post", color="#999999", linewidth=1, linestyle=(0, (4, 2)))
    for p in points:
        own = look[p.method]
        dot(axes, p.fluency, p.adherence, own, filled=p.member, scale=(1, 100))
    axes.set_ylim(-4, 106)
    axes.margins(x=0.12)
    axes.set_xlabel("median negative log-likelihood, nats per token  (← more fluent)")
    axes.set_ylabel(f"{compliance}, %")
    # In the legend and not beside the markers, where the numbers of methods that are alike would lie over each other.
    support = ["" if p.support is None else f", {100 * p.support:.0f} %" for p in points]
    handles = [handle(p.method, look[p.method], p.fluency.n, more) for p, more in zip(points, support, strict=True)]
    legend_below(figure, handles)
    return figure


def _occupations(evaluation: Evaluation) -> Plot:
    methods = list(evaluation.methods)
    names = list(dict.fromkeys(o for m in evaluation.methods.values() for o in m.occupations))
    shown, told = names, ""
    if len(names) > MOST_OCCUPATIONS:
        shown = sorted(names, key=lambda o: _mean_success(evaluation, o))[:MOST_OCCUPATIONS]
        told = f" Of {len(names):,} occupations the {MOST_OCCUPATIONS} that succeed least are drawn; the CSV has all."
    table = [[_value(evaluation.methods[m].occupations.get(o, {}).get(STRICT)) for m in methods] for o in shown]
    across = len(shown) <= ACROSS
    labels = [with_n(m, evaluation.methods[m].n, 28) for m in methods]
    if across:
        table = [[row[i] for row in table] for i in range(len(methods))]
    sizes = [e.n for m in evaluation.methods.values() for own in m.occupations.values() if (e := own.get(STRICT))]
    each = f" A cell is of {_range(sizes)}." if sizes else ""
    lines = ("method", "occupation") if across else ("occupation", "method")
    return Plot(
        name="occupations",
        title="Strict success by occupation",
        caption="Percent of a method's sentences about an occupation that are strict successes; a dash where there are "
        f"no sentences.{each}{told} Wilson intervals of every cell are in the CSV.",
        alt=f"Heat map of strict success, one row for each {lines[0]}, one column for each {lines[1]}.",
        columns=("method", "occupation", "strict", "low", "high", "n"),
        rows=[
            (m, o, *ends(e), e.n)
            for m in methods
            for o, metrics in evaluation.methods[m].occupations.items()
            if (e := metrics.get(STRICT)) is not None
        ],
        draw=partial(_draw_heat, table, *((shown, labels) if across else (labels, shown)), top=1.0),
        dense=across,
    )  # fmt: skip


def _mean_success(evaluation: Evaluation, occupation: str) -> float:
    """Over the methods that have sentences about it; those that are not known count as full success."""
    values = [_value(m.occupations.get(occupation, {}).get(STRICT)) for m in evaluation.methods.values()]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 1.0


def _range(sizes: Sequence[int]) -> str:
    """ "20 sentences", "1 to 20 sentences"."""
    low, high = min(sizes), max(sizes)
    return plural(low, "sentence") if low == high else f"{low:,} to {plural(high, 'sentence')}"


def with_n(name: str, n: int, most: int = 40) -> str:
    """A method's name with how many sentences are meant."""
    return f"{shortened(name, most)} (n = {n:,})"


def _draw_heat(table: Sequence[Sequence[float | None]], x: Sequence[str], y: Sequence[str], top: float) -> Figure:
    if not x or not y:
        return empty("There are no rows to show.")
    width = 2.2 + 0.34 * len(x)
    figure = new_figure(max(6.4, width) if len(x) > len(y) else max(4.2, width), 1.6 + 0.22 * len(y))
    labels = [[shortened(name, 38) for name in names] for names in (x, y)]
    heat(figure.add_subplot(), table, *labels, top=top, cell=lambda v: f"{100 * v:.0f}")
    return figure


def _parts(evaluation: Evaluation) -> Plot:
    methods = [name for name, method in evaluation.methods.items() if method.n]  # no rows have no reward, not one of 0
    labels = [with_n(m, evaluation.methods[m].n, 28) for m in methods]
    rows = [[getattr(evaluation.methods[m].parts, part) for part in PARTS] for m in methods]
    totals = [evaluation.methods[m].parts.reward for m in methods]
    return Plot(
        name="reward-parts",
        title="Mean reward, in parts",
        caption="Means over all sentences of the parts of the protocol's reward; penalties point to the left. "
        "The diamond is their sum.",
        alt="Stacked bars of the parts of the reward. Sums: "
        + ", ".join(f"{m} {t:.2f}" for m, t in zip(methods, totals, strict=True)),
        columns=("method", *PARTS, "reward"),
        rows=[(m, *row, total) for m, row, total in zip(methods, rows, totals, strict=True)],
        draw=partial(_draw_parts, labels, rows, totals),
    )


def _draw_parts(methods: Sequence[str], rows: Sequence[Sequence[float]], totals: Sequence[float]) -> Figure:
    if not methods:
        return empty("There are no rows to show.")
    figure = new_figure(5.2, 1.3 + 0.36 * len(methods))
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        ends = {True: 0.0, False: 0.0}
        for value, (colour, hatch) in zip(row, _PART_LOOKS, strict=True):
            sign = value >= 0
            axes.barh(y, value, 0.62, left=ends[sign], color=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
            ends[sign] += value
    axes.plot(totals, range(len(rows)), linestyle="none", marker="D", color="black", markeredgecolor="white")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.margins(x=0.03)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("reward")
    named = zip(PARTS, _PART_LOOKS, strict=True)
    handles = [Patch(facecolor=c, hatch=h, edgecolor="white", label=p.replace("_", " ")) for p, (c, h) in named]
    sums = Line2D([], [], linestyle="none", marker="D", color="black", label="sum")
    legend_below(figure, [*handles, sums], 3)
    return figure


def _lengths(evaluation: Evaluation, look: Mapping[str, Look], sizes: Mapping[str, int]) -> Plot:
    low, high = evaluation.task.min_words, evaluation.task.max_words
    shares = {name: _length_shares(m.lengths) for name, m in evaluation.methods.items()}
    return Plot(
        name="lengths",
        title="Words in a sentence",
        caption=f"Share of a method's sentences by number of words, the prefix counted; the grey band is the wanted "
        f"{low} to {high}. What is longer than {LONGEST} words is counted at {LONGEST}.",
        alt="Lines of the share of sentences by length, one for each method.",
        columns=("method", "words", "rows"),
        rows=[(name, words, n) for name, m in evaluation.methods.items() for words, n in m.lengths],
        draw=partial(_draw_lengths, shares, look, (low, high), sizes),
    )


def _length_shares(lengths: Sequence[tuple[int, int]]) -> dict[int, float]:
    total = sum(n for _, n in lengths)
    counts: dict[int, int] = {}
    for words, n in lengths:
        counts[min(words, LONGEST)] = counts.get(min(words, LONGEST), 0) + n
    return {words: 100 * n / total for words, n in counts.items()}


def _draw_lengths(
    shares: Mapping[str, Mapping[int, float]],
    look: Mapping[str, Look],
    wanted: tuple[int, int],
    sizes: Mapping[str, int],
) -> Figure:
    if not any(shares.values()):
        return empty("There are no rows to show.")
    figure = new_figure(5.2, 3.3)
    axes = figure.add_subplot()
    axes.axvspan(wanted[0] - 0.5, wanted[1] + 0.5, color="#eeeeee", linewidth=0)
    for name, own in shares.items():
        if own:
            x = list(range(min(own), max(own) + 1))
            style = look[name]
            axes.plot(x, [own.get(words, 0.0) for words in x], color=style.colour, marker=style.marker, markersize=4)
    axes.set_xlabel("words")
    axes.set_ylabel("share of sentences, %")
    axes.set_ylim(bottom=0)
    legend_below(figure, [handle(name, look[name], sizes[name]) for name in shares])
    return figure


def _differences(evaluation: Evaluation) -> Plot:
    shown = [c for c in evaluation.comparisons if evaluation.metrics[c.metric].tier == "headline"]
    columns = ("metric", "family", "a", "b", "difference", "low", "high", "p_sign_flip", "p_wilcoxon", "p_holm",
               "cohens_h", "cliffs_delta", "n_occupations")  # fmt: skip
    pairs = len({(c.a, c.b) for c in shown})
    return Plot(
        name="differences",
        title="Paired differences between methods",
        caption="Mean over occupations of the first method's value minus the second's, with its 95 % "
        "interval. Filled: p < 0.05 in the sign-flip test after Holm's correction; hollow: not so, or not "
        "tested. The line at 0 is no difference. "
        + (f"Methods have {_range([m.n for m in evaluation.methods.values()])}. ")
        + (
            f"Of {pairs:,} pairs of methods the first {MOST_PAIRS} are drawn; the table below has all."
            if pairs > MOST_PAIRS
            else ""
        ),
        alt="Forest plot of the paired differences; the table below it has the same numbers.",
        columns=columns,
        rows=[tuple(getattr(c, column) for column in columns) for c in evaluation.comparisons],
        draw=partial(_draw_differences, shown, {key: (m.title, m.unit) for key, m in evaluation.metrics.items()}),
        dense=True,
    )


def _draw_differences(comparisons: Sequence[Comparison], metrics: Mapping[str, tuple[str, str]]) -> Figure:
    known = [c for c in comparisons if c.difference is not None]
    if not known:
        return empty("No difference could be computed.")
    keys = list(dict.fromkeys(c.metric for c in known))
    pairs = list(dict.fromkeys((c.a, c.b) for c in known))[:MOST_PAIRS]
    columns = min(3, len(keys))
    lines = math.ceil(len(keys) / columns)
    figure = new_figure(2.2 + 2.0 * columns, lines * (0.9 + 0.2 * len(pairs)))
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, key in zip(grid.flat, keys, strict=False):
        title, unit = metrics[key]
        scale = 100 if unit == "share" else 1
        axes.axvline(0, color="black", linewidth=0.8)
        for c in known:
            if c.metric == key and (c.a, c.b) in pairs:
                y, x = pairs.index((c.a, c.b)), scale * (c.difference or 0.0)
                if c.low is not None and c.high is not None:
                    axes.plot([scale * c.low, scale * c.high], [y, y], color=OKABE_ITO[0])
                sure = c.p_holm is not None and c.p_holm < 0.05
                axes.plot(x, y, marker="o", color=OKABE_ITO[0], markerfacecolor=OKABE_ITO[0] if sure else "white")
        axes.set_title(shortened(title, 30), fontsize=8.5)
        axes.set_xlabel("percentage points" if unit == "share" else unit, fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="y", visible=False)
    for axes in grid.flat[len(keys) :]:
        axes.set_axis_off()
    grid[0, 0].set_yticks(
        range(len(pairs)), [f"{shortened(a, 18)} − {shortened(b, 18)}" for a, b in pairs], fontsize=7.5
    )
    grid[0, 0].set_ylim(len(pairs) - 0.5, -0.5)
    return figure


def dot(
    axes: Axes, x: Estimate, y: Estimate, own: Look, *, filled: bool, scale: tuple[float, float] = (1.0, 1.0)
) -> None:
    """A marker with an interval in each direction that has one."""
    values = []
    for estimate, factor in ((x, scale[0]), (y, scale[1])):
        assert estimate.value is not None
        low = estimate.value if estimate.low is None else estimate.low
        high = estimate.value if estimate.high is None else estimate.high
        values.append((factor * estimate.value, factor * low, factor * high))
    (at_x, left, right), (at_y, lower, upper) = values
    axes.plot([left, right], [at_y, at_y], color=own.colour, linewidth=1.1)
    axes.plot([at_x, at_x], [lower, upper], color=own.colour, linewidth=1.1)
    axes.plot(
        at_x, at_y, marker=own.marker, markersize=7, color=own.colour, markeredgewidth=1.4,
        markerfacecolor=own.colour if filled else "white",
    )  # fmt: skip


def handle(name: str, own: Look, n: int, more: str = "") -> Line2D:
    """A method's entry in a legend, with its number of sentences and `more`."""
    return Line2D([], [], color=own.colour, marker=own.marker, linestyle="none", label=with_n(name, n) + more)


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def ends(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    """(value, low, high), all None where there is no estimate."""
    return (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
