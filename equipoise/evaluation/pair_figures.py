"""The figures of a method's pairs, terms or combinations: heat maps of two classes, else bars."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product

from matplotlib.figure import Figure

from equipoise.evaluation.pairs import Table, counted
from equipoise.evaluation.plots import OKABE_ITO, Plot, empty, heat, new_figure, slugs
from equipoise.evaluation.results import Evaluation
from equipoise.evaluation.visible import shortened
from equipoise.evaluation.wording import constraint, listed, pair, term_pairs
from equipoise.protocol.plural import plural

MOST_BARS = 25
"""Bars of a figure of terms or combinations."""


def pair_plots(evaluation: Evaluation) -> Iterator[Plot]:
    """One figure for each method: a heat map of two classes, else bars."""
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
            alike = sum(other == n for _, other in found) - 1
            told = f"The commonest {one} is {listed(most)}, {n:,} of {plural(sum_of, 'compliant sentence')}."
            if alike:
                told = f"{told[:-1]}; {plural(alike, 'other')} occur{'s' * (alike == 1)} as often."
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
    figure = new_figure(4.4, 0.9 + 0.21 * len(shown))
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
