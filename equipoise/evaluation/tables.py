"""The tables of a report, worked out once; `formats` writes them as Markdown and LaTeX, the page as HTML."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

from equipoise.evaluation.results import Estimate, Evaluation, Metric, Reference
from equipoise.evaluation.visible import visible
from equipoise.evaluation.wording import listed
from equipoise.protocol.plural import plural


class Cell(NamedTuple):
    """What a table shows in one place."""

    text: str
    interval: str = ""
    """Such as "[87.5, 100]"; empty where there is none."""
    sort: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    published: tuple[tuple[Cell, ...], ...] = ()
    """Rows of numbers that others published, shorter than `heads`: the rest of a row's width is for its reason."""
    sources: tuple[str, ...] = ()
    """Where each published row is from."""
    reasons: tuple[str, ...] = ()
    """Why each published row cannot be compared, or under which conditions."""
    notes: tuple[str, ...] = ()


# Which of our columns a published number is shown under, where there is one that means nearly the same.
_NEAREST = {"study/and": "both", "study/both": "both", "study/or": "either", "study/either": "either",
            "study/pairs": "pairs/unique", "study/unique_pairs": "pairs/unique"}  # fmt: skip
_MORE = ("both", "either")
"""Diagnostics that stand in the headline table too: what earlier work reports."""


_FURTHER = ("KL to base, nats per sentence", "KL above the bound, nats", "generations per accepted sentence")


def headline(evaluation: Evaluation) -> Table:
    """One row a method: the headline metrics, both classes, KL with its excess, cost; published rows below."""
    keys = [key for key, metric in evaluation.metrics.items() if metric.tier == "headline"]
    keys[1:1] = [key for key in _MORE if key in evaluation.metrics and key not in keys]
    excess = {point.method: point.excess for point in evaluation.frontier.points}
    rows, further = [], []
    for name, method in evaluation.methods.items():
        cells = [_name(name), Cell(f"{method.n:,}", sort=method.n)]
        rows.append(cells + [estimate_cell(method.metrics.get(key), evaluation.metrics[key].unit) for key in keys])
        cost = method.cost.generations_per_accepted if method.cost else None
        further.append((estimate_cell(method.kl, "nats"), number_cell(excess.get(name), 2), number_cell(cost, 1)))
    heads = ["method", "sentences", *(head(evaluation.metrics[key]) for key in keys)]
    for i, title in enumerate(_FURTHER):
        if any(own[i].sort is not None for own in further):  # what no method has is named among the gaps
            heads.append(title)
            for row, own in zip(rows, further, strict=True):
                row.append(own[i])
    published, sources, reasons = _published(evaluation.reference, keys)
    if published and len(published[0]) == len(heads):  # the reason needs a place
        heads.append("remark")
        rows = [[*row, Cell("")] for row in rows]
    return Table(
        caption="Headline results with 95 % intervals over occupations.",
        heads=tuple(heads),
        rows=tuple(map(tuple, rows)),
        published=published,
        sources=sources,
        reasons=reasons,
        notes=(*_notes([evaluation.metrics[key] for key in keys]), *_without_interval(evaluation)),
    )


def in_short(evaluation: Evaluation) -> Table:
    """The headline metrics alone, for one column of a page: strict success, effective combinations, fluency."""
    fluency = [key for key in evaluation.metrics if key.startswith("nll/median@")]
    keys = [key for key in ("strict", "pairs/effective", *fluency[:1]) if key in evaluation.metrics]
    metrics = [evaluation.metrics[key] for key in keys]
    rows = tuple(
        (_name(name), *(estimate_cell(method.metrics.get(key), evaluation.metrics[key].unit) for key in keys))
        for name, method in evaluation.methods.items()
    )
    sizes = sorted({method.n for method in evaluation.methods.values()}) or [0]
    of = plural(sizes[0], "sentence") if len(sizes) == 1 else f"{sizes[0]:,} to {plural(sizes[-1], 'sentence')}"
    return Table(
        caption=f"Headline results of {of} a method, with 95 % intervals over occupations.",
        heads=("method", *map(head, metrics)),
        rows=rows,
        notes=(*_notes(metrics), *_without_interval(evaluation)),
    )


def _without_interval(evaluation: Evaluation) -> list[str]:
    """Why a number of effective pairs has no interval, where it has none: methods with the same reason together."""
    key = "pairs/effective"
    why: dict[str, list[str]] = {}
    for name, method in evaluation.methods.items():
        found = method.metrics.get(key)
        if found is not None and found.value is not None and found.low is None and found.note:
            why.setdefault(found.note, []).append(name)
    title = visible(evaluation.metrics[key].title) if why else ""
    return [f"{title} of {listed(names)}: {visible(note)}" for note, names in why.items()]


def _notes(metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Each caveat once, behind the metrics that it belongs to."""
    notes = dict.fromkeys(metric.note for metric in metrics if metric.note)
    return tuple(f"{', '.join(visible(m.title) for m in metrics if m.note == n)}: {visible(n)}" for n in notes)


def _published(
    reference: Sequence[Reference], keys: Sequence[str]
) -> tuple[tuple[tuple[Cell, ...], ...], tuple[str, ...], tuple[str, ...]]:
    rows, sources, reasons = [], [], []
    width = 2 + max((keys.index(key) + 1 for key in _NEAREST.values() if key in keys), default=0)
    for source, method in dict.fromkeys((r.source, r.method) for r in reference):
        own = [r for r in reference if (r.source, r.method) == (source, method)]
        cells = [Cell("")] * width
        cells[0] = _name(method)
        sizes = list(dict.fromkeys(r.n for r in own if r.n is not None))
        cells[1] = Cell(f"{sizes[0]:,}", sort=sizes[0]) if len(sizes) == 1 else Cell("")
        shown = [r for r in own if _NEAREST.get(r.metric) in keys]
        for r in shown:
            key = _NEAREST[r.metric]
            cells[2 + keys.index(key)] = _range_cell(r, "share" if key in _MORE else "count")
        if any(cell.text for cell in cells[2:]):
            rows.append(tuple(cells))
            sources.append(visible(source))
            reasons.append(_reason(shown))
    return tuple(rows), tuple(sources), tuple(reasons)


def _reason(references: Sequence[Reference]) -> str:
    why = "; ".join(dict.fromkeys(clause for r in references for clause in visible(r.why).split("; ") if clause))
    if all(r.comparable for r in references):
        return f"comparable with our study-compatible numbers only: {why}"
    return f"{'partly ' if any(r.comparable for r in references) else ''}not comparable: {why}"


def _range_cell(reference: Reference, unit: str) -> Cell:
    if reference.value is None:
        return Cell("–")
    text = published(reference.value, unit)
    if reference.high is not None:
        text += f"–{published(reference.high, unit)}"
    return Cell(text, sort=reference.value, note=reference.why)


def metrics_table(evaluation: Evaluation, tier: str) -> Table:
    """One row a metric of the tier, one column a method; for the tier `study`, published values in further rows."""
    keys = [key for key, metric in evaluation.metrics.items() if metric.tier == tier]
    rows = []
    for key in keys:
        metric = evaluation.metrics[key]
        cells = [Cell(head(metric), note=metric.note)]
        cells += [estimate_cell(method.metrics.get(key), metric.unit) for method in evaluation.methods.values()]
        rows.append(tuple(cells))
    return Table("", ("metric", *map(visible, evaluation.methods)), tuple(rows))


def study_table(evaluation: Evaluation) -> Table:
    """The study-compatible metrics: our methods, then what was published, one column a metric."""
    keys = [key for key, metric in evaluation.metrics.items() if metric.tier == "study"]
    keys += [key for key in dict.fromkeys(r.metric for r in evaluation.reference) if key not in keys]
    rows = []
    for name, method in evaluation.methods.items():
        cells = [_name(name), Cell(f"{method.n:,}", sort=method.n)]
        cells += [estimate_cell(method.metrics.get(key), _metric(evaluation, key).unit) for key in keys]
        rows.append((*cells, Cell("")))
    published, sources, reasons = [], [], []
    for source, method_name in dict.fromkeys((r.source, r.method) for r in evaluation.reference):
        own = {r.metric: r for r in evaluation.reference if (r.source, r.method) == (source, method_name)}
        n = next((r.n for r in own.values() if r.n is not None), None)
        cells = [_name(method_name), Cell("" if n is None else f"{n:,}")]
        cells += [_range_cell(own[key], _metric(evaluation, key).unit) if key in own else Cell("") for key in keys]
        published.append(tuple(cells))
        sources.append(visible(source))
        reasons.append(_reason(list(own.values())))
    titles = [head(_metric(evaluation, key)) for key in keys]
    return Table(
        caption="The public study's own formulas on our sentences"
        + (", and what it and others published." if published else "; no published number is of the same task."),
        heads=("method", "sentences", *titles, "remark"),
        rows=tuple(rows),
        published=tuple(published),
        sources=tuple(sources),
        reasons=tuple(reasons),
        notes=_notes([evaluation.metrics[key] for key in keys if key in evaluation.metrics]),
    )


def _metric(evaluation: Evaluation, key: str) -> Metric:
    """What a key stands for. A published number of a judge that was not asked here is of the same metric."""
    own = evaluation.metrics.get(key)
    if own is not None:
        return own
    stem, _, judge = key.partition("@")
    alike = next((m for k, m in evaluation.metrics.items() if judge and k.partition("@")[0] == stem), None)
    if alike is not None:
        return dataclasses.replace(alike, title=f"{alike.title.rpartition(',')[0] or alike.title}, {judge}")
    shares = {"both", "either", "and", "or"}
    return Metric(key, "share" if key.rpartition("/")[2] in shares else "ratio", "study", "neither")


def costs(evaluation: Evaluation) -> Table:
    """What each method spent, where a side file says."""
    rows = []
    for name, method in evaluation.methods.items():
        cost = method.cost
        if cost is None:
            continue
        accepted = cost.accepted if cost.accepted is not None else None
        each = 1000 * cost.seconds / accepted if cost.seconds is not None and accepted else None
        rows.append(
            (
                _name(name),
                number_cell(cost.seconds, 1),
                number_cell(cost.load_seconds, 1),
                number_cell(cost.generations, 0),
                number_cell(cost.accepted, 0),
                number_cell(cost.generations_per_accepted, 1),
                number_cell(each, 1),
                number_cell(cost.tokens, 0),
                number_cell(cost.ess, 1),
            )
        )
    return Table(
        caption="Cost of generation, summed over a method's files; training is not in it.",
        heads=("method", "seconds", "seconds to load", "generations", "accepted", "generations per accepted sentence",
               "seconds per 1,000 accepted", "tokens", "effective sample size"),
        rows=tuple(rows),
    )  # fmt: skip


def differences(evaluation: Evaluation) -> Table:
    """Every comparison with its tests."""
    rows = []
    for c in evaluation.comparisons:
        metric = evaluation.metrics[c.metric]
        scale, unit = (100, " pp") if metric.unit == "share" else (1, "")
        digits = 1 if metric.unit in {"share", "points", "count", "ppl"} else 3
        value = None if c.difference is None else scale * c.difference
        interval = ""
        if c.low is not None and c.high is not None:
            interval = f"[{fixed(scale * c.low, digits, True)}, {fixed(scale * c.high, digits, True)}]"
        tost = "" if c.tost is None else _tost(c.tost.noninferior, c.tost.equivalent, c.tost.margin)
        rows.append(
            (
                Cell(visible(f"{c.a} − {c.b}")),
                Cell(visible(metric.title)),
                Cell("–" if value is None else f"{fixed(value, digits, True)}{unit}", interval, value),
                p_cell(c.p_sign_flip),
                p_cell(c.p_holm),
                p_cell(c.p_wilcoxon),
                number_cell(c.cohens_h, 2),
                number_cell(c.cliffs_delta, 2),
                Cell(tost, note="" if c.tost is None else c.tost.note),
                Cell(str(c.n_occupations), sort=c.n_occupations),
                Cell(visible(c.note)),
            )
        )
    return Table(
        caption="Paired differences over occupations; p by exact or sampled sign-flips, Holm within each metric.",
        heads=("difference of", "metric", "mean and 95 % interval", "p, sign-flip", "p, Holm", "p, Wilcoxon",
               "Cohen’s h", "Cliff’s δ", "non-inferiority of the first", "occupations", "remark"),
        rows=tuple(rows),
    )  # fmt: skip


def _tost(noninferior: bool | None, equivalent: bool | None, margin: float) -> str:
    if noninferior is None:
        return "not tested"
    word = "equivalent" if equivalent else "non-inferior" if noninferior else "not shown"
    return f"{word} (margin {margin:g})"


def head(metric: Metric) -> str:
    """A column's heading with its unit and the direction that is wanted."""
    unit = {"share": "%", "count": "", "ratio": "", "ppl": "", "log-odds": "nats"}.get(metric.unit, metric.unit)
    arrow = {"higher": " ↑", "lower": " ↓", "neither": ""}[metric.better]
    return visible(metric.title) + (f", {unit}" if unit else "") + arrow


def estimate_cell(estimate: Estimate | None, unit: str) -> Cell:
    """A value with its interval; a dash, and why, where there is no value."""
    if estimate is None or estimate.value is None:
        return Cell("–", note="" if estimate is None else visible(estimate.note))
    interval = ""
    if estimate.low is not None and estimate.high is not None:
        interval = f"[{formatted(estimate.low, unit)}, {formatted(estimate.high, unit)}]"
    return Cell(formatted(estimate.value, unit), interval, estimate.value, visible(estimate.note))


def number_cell(value: float | None, digits: int) -> Cell:
    """A number with so many decimals; a dash for None."""
    return Cell("–") if value is None else Cell(fixed(value, digits), sort=value)


def fixed(value: float, digits: int, sign: bool = False) -> str:
    """`value` with so many decimals, a proper minus, and no minus before zero; `sign`: with a plus too."""
    text = f"{value:+,.{digits}f}" if sign else f"{value:,.{digits}f}"
    if not text.strip("+-0.,"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def p_cell(p: float | None) -> Cell:
    """A p-value with three digits, small ones as "< 0.001"."""
    return Cell("–") if p is None else Cell("<\u00a00.001" if p < 0.001 else f"{p:.3f}", sort=p)


def formatted(value: float, unit: str) -> str:
    """`value` as a reader wants it: shares in percent, counts whole where they are."""
    if unit == "share":
        percent = 100 * value
        near_end = 0 < percent < 1 or 99 < percent < 100
        return f"{percent:.2f}" if near_end else f"{percent:.1f}" if 0 < percent < 100 else f"{percent:.0f}"
    if unit == "count":
        return fixed(value, 0 if value == int(value) else 1)
    return fixed(value, 1 if unit in {"points", "ppl", "words"} else 2)


def published(value: float, unit: str) -> str:
    """A number of someone else's with the digits that it has; shares in percent."""
    digits = Decimal(repr(value)) * (100 if unit == "share" else 1)
    return f"{digits.normalize():,f}".replace("-", "−")


def _name(name: str) -> Cell:
    return Cell(visible(name))


def whole(cell: Cell) -> str:
    """The value with its interval, in one line."""
    return f"{cell.text} {cell.interval}".strip()


def excess(evaluation: Evaluation) -> Table:
    """Compliance, KL, the bound and the distance above it of each method."""
    frontier = evaluation.frontier
    rows = tuple(
        (
            _name(p.method),
            number_cell(p.compliance.n, 0),
            estimate_cell(p.compliance, "share"),
            estimate_cell(p.kl, "nats"),
            estimate_cell(p.bound, "nats"),
            number_cell(p.excess, 2),
        )
        for p in frontier.points
    )
    event = evaluation.task.all_classes if frontier.event == "both" else "strict success"
    how = [f"KL to base of {visible(p.method)}: {visible(p.kl.note)}" for p in frontier.points if p.kl and p.kl.note]
    p0 = "unknown" if frontier.p0 is None else whole(estimate_cell(frontier.p0, "share"))
    return Table(
        caption="KL to the base model in nats per sentence, and the least that the compliance needs.",
        heads=("method", "sentences", f"{event}, %", "KL to base",
               "least KL, kl(c‖p₀)", "excess"),
        rows=rows,
        notes=(f"p₀, the base model's compliance in percent: {p0}; {visible(frontier.p0_source)}", *how),
    )  # fmt: skip


def equal_n(evaluation: Evaluation) -> Table:
    """What grows or shrinks with n, at as many sentences as the smallest method has."""
    keys = [key for key in evaluation.metrics if any(key in m.equal_n for m in evaluation.methods.values())]
    rows = tuple(
        (
            Cell(head(evaluation.metrics[key])),
            *(estimate_cell(m.equal_n.get(key), evaluation.metrics[key].unit) for m in evaluation.methods.values()),
        )
        for key in keys
    )
    whose = "each method" if all(m.n for m in evaluation.methods.values()) else "each method that has any"
    caption = f"At {plural(evaluation.equal_n, 'sentence')} of {whose}." if evaluation.equal_n else ""
    return Table(caption, ("metric", *map(visible, evaluation.methods)), rows)
