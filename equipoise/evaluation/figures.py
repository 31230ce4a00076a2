"""The figures of a report: what each shows, in words and numbers, and how it is drawn."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from equipoise.evaluation.pairs import Table, counted
from equipoise.evaluation.plots import OKABE_ITO, Look, Plot, empty, heat, looks, new_figure, shortened
from equipoise.evaluation.results import Comparison, Estimate, Evaluation, ParetoPoint
from equipoise.evaluation.wording import constraint, event, listed, pair, term_pairs

PARTS = ("base", "bonus", "length_penalty", "repetition_penalty")
_PART_LOOKS = (("#0072B2", ""), ("#56B4E9", "//"), ("#E69F00", "\\\\"), ("#D55E00", "x"))


STRICT = "strict"
"""The key of the metric of strict success."""
MOST_PAIRS = 45
"""Rows of the forest: every pair of ten methods."""
MOST_BARS = 25
"""Bars of a figure of terms or combinations."""
LONGEST = 40
"""Words up to which lengths are drawn."""


def figures(evaluation: Evaluation) -> list[Plot]:
    """Every figure that the evaluation by itself has numbers for."""
    look = looks(list(evaluation.methods))
    plots = list(_adherence_fluency(evaluation, look))
    plots.append(_occupations(evaluation))
    plots += _pairs(evaluation)
    plots.append(_parts(evaluation))
    plots.append(_lengths(evaluation, look))
    if evaluation.comparisons:
        plots.append(_differences(evaluation))
    return plots


def slugs(names: Sequence[str]) -> dict[str, str]:
    """A name for files for each method: its letters and digits, with a number where two would be alike."""
    out: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "method"
        slug, i = stem, 1
        while slug in out.values():
            i += 1
            slug = f"{stem}-{i}"
        out[name] = slug
    return out


def _adherence_fluency(evaluation: Evaluation, look: Mapping[str, Look]) -> Iterator[Plot]:
    judges = list(dict.fromkeys(point.judge for point in evaluation.frontier.pareto))
    compliance = event(evaluation.task, evaluation.frontier.event)
    for judge, slug in slugs(judges).items():
        points = [p for p in evaluation.frontier.pareto if p.judge == judge and p.fluency.value is not None]
        members = [p.method for p in points if p.member]
        yield Plot(
            name=f"adherence-fluency-{slug}",
            title=f"Adherence and fluency under the judge {judge}",
            caption=f"Share of sentences with {compliance} against the median negative log-likelihood of the sentences "
            "(lower is more fluent), with 95 % intervals. Filled markers are on the Pareto front: no other method is "
            "at least as good in both and better in one. The number beside a marker is the share of bootstrap draws "
            "in which its method is on the front. The best corner is the upper left one.",
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
        if p.support is not None:
            x, y = p.fluency.value or 0.0, 100 * (p.adherence.value or 0.0)
            axes.annotate(f"{100 * p.support:.0f} %", (x, y), xytext=(7, 5), textcoords="offset points", size=7.5)
    axes.set_ylim(-4, 106)
    axes.margins(x=0.12)
    axes.set_xlabel("median negative log-likelihood, nats per token  (← more fluent)")
    axes.set_ylabel(f"{compliance}, %")
    handles = [handle(name, look[name]) for name in dict.fromkeys(p.method for p in points)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2, len(handles)))
    return figure


def _occupations(evaluation: Evaluation) -> Plot:
    methods = list(evaluation.methods)
    names = list(dict.fromkeys(o for m in evaluation.methods.values() for o in m.occupations))
    table = [[_value(evaluation.methods[m].occupations.get(o, {}).get(STRICT)) for o in names] for m in methods]
    return Plot(
        name="occupations",
        title="Strict success by occupation",
        caption="Percent of a method's sentences about an occupation that are strict successes; a dash where there are "
        "no sentences. Wilson intervals of every cell are in the CSV.",
        alt="Heat map of strict success, one row for each method, one column for each occupation.",
        columns=("method", "occupation", "strict", "low", "high", "n"),
        rows=[
            (m, o, *ends(e), e.n)
            for m in methods
            for o, metrics in evaluation.methods[m].occupations.items()
            if (e := metrics.get(STRICT)) is not None
        ],
        draw=partial(_draw_heat, table, names, methods, top=1.0),
        dense=True,
    )  # fmt: skip


def _draw_heat(table: Sequence[Sequence[float | None]], x: Sequence[str], y: Sequence[str], top: float) -> Figure:
    if not x or not y:
        return empty("There are no rows to show.")
    figure = new_figure(max(6.4, 2.2 + 0.34 * len(x)), 1.0 + 0.3 * len(y))
    heat(figure.add_subplot(), table, x, [shortened(name, 28) for name in y], top=top, cell=lambda v: f"{100 * v:.0f}")
    return figure


def _pairs(evaluation: Evaluation) -> Iterator[Plot]:
    task, classes = evaluation.task, evaluation.lexicon
    noun, one = task.pair_noun, pair(task)
    kind = "Heat map" if len(classes) == 2 else "Bars"
    for name, slug in slugs(list(evaluation.methods)).items():
        counts = evaluation.methods[name].pairs
        found = counted(counts, classes)
        sum_of = sum(n for _, n in found)
        told = f"No sentence of this method holds {constraint(task)}."
        if found:
            most, n = found[0]
            told = f"The commonest {one} is {listed(most)}, {n:,} of {sum_of:,}."
        more = f" Of {len(found):,} {noun} the first {MOST_BARS} are drawn; the CSV has all."
        bars = len(classes) != 2
        yield Plot(
            name=f"pairs-{slug}",
            title=name,
            caption=told + (more if bars and len(found) > MOST_BARS else ""),
            alt=f"{kind} of the {term_pairs(task)} of {name}. {told if found else 'It is empty.'}",
            columns=(*classes, "rows"),
            rows=_pair_rows(counts, classes),
            draw=partial(_draw_bars, found, sum_of) if bars else partial(_draw_pairs, counts, *classes.values()),
        )


def _pair_rows(counts: Table, classes: Mapping[str, Sequence[str]]) -> list[tuple[object, ...]]:
    """Every pair with its sentences, zeros included; of three or four classes those that occur."""
    if len(classes) > 2:
        return [(*terms, n) for terms, n in counted(counts, classes)]
    numbers = [n for row in counts for n in row]
    return [(*terms, n) for terms, n in zip(product(*classes.values()), numbers, strict=True)]


def _draw_bars(found: Sequence[tuple[tuple[str, ...], int]], sum_of: int) -> Figure:
    if not found:
        return empty("There is nothing to show.")
    shown = [(", ".join(terms), 100 * n / sum_of) for terms, n in found[:MOST_BARS]]
    figure = new_figure(5.2, 0.9 + 0.21 * len(shown))
    axes = figure.add_subplot()
    axes.barh(range(len(shown)), [share for _, share in shown], 0.7, color=OKABE_ITO[0])
    axes.set_yticks(range(len(shown)), [shortened(name, 44) for name, _ in shown], fontsize=7.5)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("share of compliant sentences, %")
    return figure


def _draw_pairs(counts: Sequence[Sequence[int]], first: Sequence[str], second: Sequence[str]) -> Figure:
    sum_of = sum(map(sum, counts))
    figure = new_figure(1.5 + 0.33 * len(second), 1.3 + 0.27 * len(first))
    axes = figure.add_subplot()
    shares = [[n / sum_of if sum_of else 0.0 for n in row] for row in counts]
    top = max(map(max, shares))

    def percent(share: float) -> str:
        return "" if share == 0 else "<1" if share < 0.01 else f"{100 * share:.0f}"

    heat(axes, shares, second, first, top=top, cell=percent)
    return figure


def _parts(evaluation: Evaluation) -> Plot:
    methods = list(evaluation.methods)
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
        draw=partial(_draw_parts, methods, rows, totals),
    )


def _draw_parts(methods: Sequence[str], rows: Sequence[Sequence[float]], totals: Sequence[float]) -> Figure:
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
    axes.set_yticks(range(len(methods)), [shortened(name, 28) for name in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.margins(x=0.03)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("reward")
    named = zip(PARTS, _PART_LOOKS, strict=True)
    handles = [Patch(facecolor=c, hatch=h, edgecolor="white", label=p.replace("_", " ")) for p, (c, h) in named]
    sums = Line2D([], [], linestyle="none", marker="D", color="black", label="sum")
    figure.legend(handles=[*handles, sums], loc="outside lower center", ncols=3)
    return figure


def _lengths(evaluation: Evaluation, look: Mapping[str, Look]) -> Plot:
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
        draw=partial(_draw_lengths, shares, look, (low, high)),
    )


def _length_shares(lengths: Sequence[tuple[int, int]]) -> dict[int, float]:
    total = sum(n for _, n in lengths)
    counts: dict[int, int] = {}
    for words, n in lengths:
        counts[min(words, LONGEST)] = counts.get(min(words, LONGEST), 0) + n
    return {words: 100 * n / total for words, n in counts.items()}


def _draw_lengths(
    shares: Mapping[str, Mapping[int, float]], look: Mapping[str, Look], wanted: tuple[int, int]
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
    handles = [handle(name, look[name]) for name in shares]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2, len(handles)))
    return figure


def _differences(evaluation: Evaluation) -> Plot:
    shown = [c for c in evaluation.comparisons if evaluation.metrics[c.metric].tier == "headline"]
    columns = ("metric", "family", "a", "b", "difference", "low", "high", "p_sign_flip", "p_wilcoxon", "p_holm",
               "cohens_h", "cliffs_delta", "n_occupations")  # fmt: skip
    return Plot(
        name="differences",
        title="Paired differences between methods",
        caption="Mean over occupations of the first method's value minus the second's, with its 95 % "
        "interval. Filled: p < 0.05 in the sign-flip test after Holm's correction; hollow: not so, or not "
        f"tested. The line at 0 is no difference. Of more than {MOST_PAIRS} pairs of methods the first are drawn; the "
        "table below has all.",
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


def handle(name: str, own: Look) -> Line2D:
    """A method's entry in a legend."""
    return Line2D([], [], color=own.colour, marker=own.marker, linestyle="none", label=shortened(name))


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def ends(estimate: Estimate | None) -> tuple[float | None, float | None, float | None]:
    """(value, low, high), all None where there is no estimate."""
    return (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
