"""What each method's KL to the base model is spent on: a table, and a figure with what no method can reach."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from equipoise.evaluation.figures import dot, ends, handle
from equipoise.evaluation.plots import Look, Plot, legend_below, looks, new_figure
from equipoise.evaluation.results import FEWEST, Estimate, Evaluation, KLParts
from equipoise.evaluation.tables import Cell, Table, estimate_cell, number_cell
from equipoise.evaluation.visible import visible
from equipoise.evaluation.wording import event


def parts_of(evaluation: Evaluation) -> dict[str, KLParts]:
    """By method, of those of which it is known."""
    return {point.method: point.parts for point in evaluation.frontier.points if point.parts is not None}


def table(evaluation: Evaluation) -> Table | None:
    """None where it is not known of any method."""
    frontier, known = evaluation.frontier, parts_of(evaluation)
    if not known:
        return None
    rows = tuple(
        (
            Cell(visible(method)),
            number_cell(parts.kl.n, 0),
            number_cell(100 * parts.share, 2),
            number_cell(parts.effective_pairs, 1),
            *(estimate_cell(e, "nats") for e in (parts.kl, parts.compliance, parts.variety, parts.waste)),
            number_cell(100 * parts.unseen, 2),
        )
        for method, parts in known.items()
    )
    noun, what = evaluation.task.pair_noun, event(evaluation.task, frontier.pairs_event)
    return Table(
        caption="What the KL is spent on, in nats per sentence, of the sentences that it was estimated from.",
        heads=("method", "sentences", f"{what}, %", f"effective {noun}", "KL to base", "for compliance", "for variety",
               "waste", "unseen, %"),
        rows=rows,
        notes=(
            f"The base model’s {noun} are from {visible(frontier.pairs_source)}.",
            "Waste is what another policy, with as much compliance and variety, would not need.",
            f"Unseen: share of the successes with {noun} that the base model was never seen to write, or too little to "
            "know how often. They are one class with an upper limit, so that the variety is the least, and the waste "
            "the most, that they can be.",
        ),
    )  # fmt: skip


def spent_plots(evaluation: Evaluation) -> Iterator[Plot]:
    """KL beyond compliance's over effective pairs, if it is known of any method: the height above the curve is at most
    waste."""
    frontier, known = evaluation.frontier, parts_of(evaluation)
    if not known:
        return
    noun = evaluation.task.pair_noun
    told = ", ".join(f"{name} {parts.waste.value or 0.0:z.2f}" for name, parts in known.items())
    yield Plot(
        name="variety-kl",
        title="Variety and what it costs",
        caption=f"KL to the base model beyond what compliance costs, against effective {noun}. Below the curve no "
        f"method can be: it is the least that so many effective {noun} cost, the base model’s own costing nothing. A "
        f"tick marks what a method’s own {noun} cost; what is above it is waste. Of the sentences that the KL was "
        "estimated from.",
        alt=f"Scatter of nats over effective {noun}. Waste: {told}.",
        columns=("series", "effective", "beyond_compliance", "variety", "waste", "waste_low", "waste_high"),
        rows=[
            *(
                (name, p.effective_pairs, _beyond(p).value, p.variety.value, *ends(p.waste))
                for name, p in known.items()
            ),
            *(("least", effective, nats, nats, 0.0, "", "") for effective, nats in frontier.least_variety),
        ],
        draw=partial(_draw, noun, known, looks(list(evaluation.methods)), frontier.least_variety),
    )


def _nats(parts: KLParts) -> tuple[float, float]:
    """(variety and waste, variety)."""
    variety = parts.variety.value or 0.0
    return variety + (parts.waste.value or 0.0), variety


def _beyond(parts: KLParts) -> Estimate:
    """Variety and waste together, with the interval of the waste."""
    (value, variety), waste = _nats(parts), parts.waste
    low, high = (None if end is None else variety + end for end in (waste.low, waste.high))
    return Estimate(value, low, high, waste.n, waste.interval)


def _draw(
    noun: str, known: Mapping[str, KLParts], look: Mapping[str, Look], curve: Sequence[tuple[float, float]]
) -> Figure:
    figure = new_figure(5.2, 4.3)
    axes = figure.add_subplot()
    handles: list[Artist] = []
    right = 1.05 * max([*(p.effective_pairs for p in known.values()), *(x for x, _ in curve)])
    if curve:
        x, y = [1.0, *(x for x, _ in curve)], [0.0, *(y for _, y in curve)]
        axes.fill_between(x, y, min(0.0, *y) - 1.0, color="#dddddd", linewidth=0)
        axes.plot(x, y, color="black", linewidth=1.3)
        handles.append(Line2D([], [], color="black", label="least for so much variety"))
        handles.append(Patch(facecolor="#dddddd", label="not reachable"))
    for name, parts in known.items():
        own = look[name]
        at = Estimate(parts.effective_pairs)
        dot(axes, at, _beyond(parts), own, filled=parts.kl.n >= FEWEST)
        axes.plot([parts.effective_pairs], [_nats(parts)[1]], marker="_", markersize=11, color=own.colour)
        handles.append(handle(name, own, parts.kl.n))
    axes.set_xlim(0.0, right)
    axes.set_ylim(bottom=-0.5)
    axes.set_xlabel(f"effective {noun}")
    axes.set_ylabel("nats beyond compliance, per sentence")
    legend_below(figure, handles)
    return figure
