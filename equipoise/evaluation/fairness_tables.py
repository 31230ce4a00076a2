"""The report's tables of what a reader looks for who asks whether a method is fair."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from equipoise.evaluation.language import Reader
from equipoise.evaluation.results import Estimate, Evaluation, Method
from equipoise.evaluation.tables import Cell, Table, estimate_cell, fixed, formatted, head, metrics_table, p_cell
from equipoise.evaluation.visible import visible
from equipoise.protocol.plural import plural
from equipoise.protocol.word_lists import WINDOW

MOST = 30
"""Occupations in a table; occupations.csv has all."""
IN_SHORT = ("first/", "negated/strict", "association/spread", "association/kept", "association/correlation")
"""Beginnings of the keys, beside those of gendered words, that a paper's table has."""


def keys_of(evaluation: Evaluation) -> list[str]:
    """The metrics of the tier; none where an earlier version measured."""
    return [key for key, metric in evaluation.metrics.items() if metric.tier == "fairness"]


def overview(evaluation: Evaluation) -> Table | None:
    """Every metric of the tier, one column a method; None without any."""
    if not keys_of(evaluation):
        return None
    table = metrics_table(evaluation, "fairness")
    return Table(_caption(evaluation), table.heads, table.rows, notes=tuple(_notes(evaluation)))


def in_short(evaluation: Evaluation) -> Table | None:
    """Few of them, one row a method: for a paper."""
    keys = [
        key
        for key in keys_of(evaluation)
        if key.startswith(("gendered/", *IN_SHORT)) and not key.startswith("first/spread")
    ]
    if not keys:
        return None
    rows = tuple(
        (
            Cell(visible(name)),
            *(estimate_cell(method.metrics.get(key), evaluation.metrics[key].unit) for key in keys),
        )
        for name, method in evaluation.methods.items()
    )
    heads = ("method", *(head(evaluation.metrics[key]) for key in keys))
    return Table(_caption(evaluation), heads, rows, notes=tuple(_notes(evaluation)))


def _caption(evaluation: Evaluation) -> str:
    sizes = sorted({method.n for method in evaluation.methods.values()}) or [0]
    of = plural(sizes[0], "sentence") if len(sizes) == 1 else f"{sizes[0]:,} to {plural(sizes[-1], 'sentence')}"
    return f"Gendered words, order and negation of terms, associations: {of} a method, 95 % intervals over occupations."


def _notes(evaluation: Evaluation) -> list[str]:
    reader, out = Reader(evaluation.task), []
    if reader.gendered:
        out.append(
            "Gendered words: share of sentences with a word of the kind behind the frame, which may hold several."
        )
    else:
        out.append(
            "No gendered words were looked for: the task file names none, and its frame is not known as English."
        )
    if reader.negations.cues:
        out.append(
            f"Negated: a cue such as “not”, “never” or “lacks” among the {WINDOW} words before the term, no "
            "punctuation and no “but” between. It is a rule, which errs."
            if evaluation.task.lists.negations is None
            else f"Negated: one of the task’s cues among the {WINDOW} words before the term, in the same clause."
        )
    out.append(
        "Association: log-odds of a mention of the class in an occupation’s sentences; its spread over occupations, "
        "and how much of the untrained model’s spread is left once what chance gives is taken off each."
    )
    return out


def gendered(evaluation: Evaluation) -> Table | None:
    """Gendered words by occupation and method; None where no such words are known."""
    keys = [key for key in keys_of(evaluation) if key.startswith("gendered/")]
    if not keys:
        return None
    kinds = [evaluation.metrics[key].title for key in keys]
    shown, more = _shown(evaluation, lambda m, o: sum(_value(m, o, key=key) or 0.0 for key in keys))
    rows = []
    for occupation in shown:
        cells = [Cell(visible(occupation))]
        for method in evaluation.methods.values():
            values = [_value(method, occupation, key=key) for key in keys]
            known = [v for v in values if v is not None]
            n = next((e.n for key in keys if (e := method.occupations.get(occupation, {}).get(key))), 0)
            text = " · ".join("–" if v is None else formatted(v, "share") for v in values) if known else "–"
            cells.append(Cell(text, sort=sum(known) if known else None, note=plural(n, "sentence") if known else ""))
        rows.append(tuple(cells))
    return Table(
        f"Percent of an occupation’s sentences with a gendered word: {' · '.join(map(visible, kinds))}.{more}",
        ("occupation", *map(visible, evaluation.methods)),
        tuple(rows),
    )


def associations(evaluation: Evaluation) -> list[Table]:
    """The log-odds by occupation and method, those of the greatest first by the first method: one table a contrast."""
    out = []
    for key in keys_of(evaluation):
        if not key.startswith("association/log_odds"):
            continue
        shown, more = _shown(evaluation, partial(_value, key=key))
        rows = tuple(
            (
                Cell(visible(occupation)),
                *(_signed(method.occupations.get(occupation, {}).get(key)) for method in evaluation.methods.values()),
            )
            for occupation in shown
        )
        title = visible(evaluation.metrics[key].title)
        out.append(
            Table(
                f"{title[:1].upper()}{title[1:]}, by occupation, with 95 % intervals. Where a method leaves no "
                f"association, a column’s numbers are alike.{more}",
                ("occupation", *map(visible, evaluation.methods)),
                rows,
            )
        )
    return out


def mixed(evaluation: Evaluation) -> Table | None:
    """The mixed logits beside the paired tests; None without any."""
    rows = []
    for c in evaluation.comparisons:
        if (m := c.mixed) is None:
            continue
        odds = "–" if m.log_odds is None else _odds(m.log_odds)
        interval = "" if m.low is None or m.high is None else f"[{_odds(m.low)}, {_odds(m.high)}]"
        rows.append(
            (
                Cell(visible(f"{c.a} against {c.b}")),
                Cell(visible(evaluation.metrics[c.metric].title)),
                Cell(odds, interval, m.log_odds),
                p_cell(m.p),
                p_cell(c.p_sign_flip),
                Cell(fixed(m.sd_occupation, 2), sort=m.sd_occupation),
                Cell(fixed(m.sd_difference, 2), sort=m.sd_difference),
                Cell(visible(m.note)),
            )
        )
    if not rows:
        return None
    return Table(
        "Odds ratios by a mixed logit with random intercepts and slopes of occupations, beside the paired test.",
        ("methods", "metric", "odds ratio and 95 % interval", "p, mixed logit", "p, sign-flip", "SD of occupations",
         "SD of the difference", "remark"),
        tuple(rows),
    )  # fmt: skip


def _odds(log_odds: float) -> str:
    """An odds ratio with three digits that count."""
    if abs(log_odds) > math.log(1e6):
        return "> 1,000,000" if log_odds > 0 else "< 0.000001"
    value = math.exp(log_odds)
    return fixed(value, 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4)


def _value(method: Method, occupation: str, *, key: str) -> float | None:
    found = method.occupations.get(occupation, {}).get(key)
    return None if found is None else found.value


def _signed(estimate: Estimate | None) -> Cell:
    """With its sign."""
    cell = estimate_cell(estimate, "log-odds")
    if estimate is None or estimate.value is None:
        return cell
    ends = (estimate.low, estimate.high)
    interval = "" if None in ends else "[" + ", ".join(fixed(end or 0.0, 2, True) for end in ends) + "]"
    return cell._replace(text=fixed(estimate.value, 2, True), interval=interval)


def _shown(evaluation: Evaluation, weight: Callable[[Method, str], float | None]) -> tuple[Sequence[str], str]:
    """The occupations in the order of `weight` under the first method that has a number, the greatest first, at most
    `MOST`; and what is to be said of the others."""
    names = list(dict.fromkeys(o for m in evaluation.methods.values() for o in m.occupations))

    def of(occupation: str) -> float:
        values = (weight(m, occupation) for m in evaluation.methods.values())
        return next((v for v in values if v is not None), 0.0)

    ordered = sorted(names, key=lambda o: -of(o))
    if len(ordered) <= MOST:
        return ordered, ""
    half = MOST // 2
    return [*ordered[:half], *ordered[-half:]], (
        f" Of {len(names):,} occupations the {half} greatest and the {half} least are shown; occupations.csv has all."
    )
