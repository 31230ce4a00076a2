"""A report's findings in words, and what it lacks with the way to get it. Every sentence is made from the numbers."""

from collections.abc import Sequence
from typing import NamedTuple

from equipoise.evaluation.figures import STRICT
from equipoise.evaluation.pairs import total
from equipoise.evaluation.results import Comparison, Equivalence, Estimate, Evaluation, Method
from equipoise.evaluation.runs import TrainingRun
from equipoise.evaluation.tables import fixed, formatted
from equipoise.evaluation.visible import visible
from equipoise.evaluation.wording import constraint, listed, strict, term_pairs
from equipoise.protocol.task import PROTOCOL, Task

EFFECTIVE = "pairs/effective"
UNIQUE = "pairs/unique"
BASELINES = ("Prompt-Only", "prompt-only", "prompt_only", "Prompt-only", "base", "Base")
"""What the method of an untrained, unfiltered model is called, in the order of preference."""


class Finding(NamedTuple):
    """A question that a reader comes with, and its answer."""

    question: str
    answer: str


class Gap(NamedTuple):
    """Something that the report lacks, and how to get it."""

    what: str
    remedy: str


def findings(evaluation: Evaluation) -> list[Finding]:
    """The answers, in the order of the questions. Empty where there is nothing to say."""
    known = {name: m for name, m in evaluation.methods.items() if _value(m.metrics.get(STRICT)) is not None}
    if not known:
        return [Finding("Which method complies most?", "No method has a sentence, so nothing can be said.")]
    ranked = sorted(known, key=lambda name: -(_value(known[name].metrics[STRICT]) or 0.0))
    answers = [
        ("Which method complies most?", _compliance(evaluation.task, known, ranked)),
        ("Is the difference real?", _difference(evaluation, ranked)),
        ("At what cost in fluency?", _fluency(evaluation, ranked)),
        ("At what cost in variety?", _variety(evaluation, known, ranked)),
        ("How far from the optimum?", _optimum(evaluation)),
        ("What did a sentence cost?", _cost(known)),
        ("How was it measured?", _measured(evaluation)),
    ]
    return [Finding(question, answer) for question, answer in answers if answer]


def baseline(evaluation: Evaluation, other_than: str) -> str | None:
    """The method that others are measured against: the prompted base model where there is one."""
    names = [name for name in evaluation.methods if name != other_than]
    exact = next((name for name in BASELINES if name in names), None)
    return exact or next((name for name in names if name.lower().startswith(("prompt", "base"))), None)


def _compliance(task: Task, known: dict[str, Method], ranked: Sequence[str]) -> str:
    best = known[ranked[0]].metrics[STRICT]
    if not best.value:
        return f"None: of {sum(m.n for m in known.values()):,} sentences not one is a strict success ({strict(task)})."
    level = [name for name in ranked if known[name].metrics[STRICT].value == best.value]
    verb = "complies" if len(level) == 1 else "comply"
    text = (
        f"{listed(level)} {verb} most: {share(best)} of {known[ranked[0]].n:,} sentences are strict successes "
        f"({strict(task)})."
    )
    rest = ranked[len(level) :]
    if rest:
        text += f" {listed(f'{visible(name)} reaches {share(known[name].metrics[STRICT])}' for name in rest)}."
    return text


def _difference(evaluation: Evaluation, ranked: Sequence[str]) -> str:
    if len(ranked) < 2:
        return "There is one method only, so there is nothing to compare it with."
    against = [(ranked[0], ranked[1])]
    base = baseline(evaluation, ranked[0])
    if base is not None and base != ranked[1]:
        against.append((ranked[0], base))
    told = [text for a, b in against if (text := _tested(evaluation, a, b))]
    return " ".join(told) or "The evaluation holds no comparison of strict success between these methods."


def _tested(evaluation: Evaluation, a: str, b: str) -> str:
    c = _comparison(evaluation, STRICT, a, b)
    if c is None or c.difference is None:
        return ""
    interval = ""
    if c.low is not None and c.high is not None:
        interval = f" (95 % interval {fixed(100 * c.low, 1, True)} to {fixed(100 * c.high, 1, True)})"
    text = f"{visible(a)} against {visible(b)}: {fixed(100 * c.difference, 1, True)} percentage points{interval}"
    p = c.p_holm if c.p_holm is not None else c.p_sign_flip
    if p is None:
        return f"{text}; not tested{f' ({visible(c.note)})' if c.note else ''}."
    corrected = ", Holm-corrected" if c.p_holm is not None else ""
    told = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    verdict = "the difference is significant at 0.05" if p < 0.05 else "not significant at 0.05"
    note = f" {visible(c.note).rstrip('.')}." if c.note and p >= 0.05 else ""
    return f"{text}; {verdict} ({told}{corrected}, sign-flips over {c.n_occupations} occupations).{_capital(note)}"


def _fluency(evaluation: Evaluation, ranked: Sequence[str]) -> str:
    told = []
    for judge in evaluation.judges:
        key = f"nll/median@{judge.name}"
        values = {
            name: estimate
            for name in ranked
            if (estimate := evaluation.methods[name].metrics.get(key)) is not None and estimate.value is not None
        }
        if not values:
            continue
        each = [f"{visible(name)} {_with_interval(estimate, 'nats/token')}" for name, estimate in values.items()]
        text = (
            f"Median negative log-likelihood under the judge {visible(judge.name)}, in nats per token: {listed(each)}."
        )
        base = baseline(evaluation, "")
        against = [_less_fluent(evaluation, key, name, base) for name in values if base is not None and name != base]
        if known := [one for one in against if one]:
            text += f" Difference to {visible(base or '')} (above 0 is less fluent): {listed(known)}."
        told.append(text + (f" Caveat: {visible(judge.caveat)}." if judge.caveat else ""))
    return " ".join(told) or "Not known: no judge measured fluency."


def _less_fluent(evaluation: Evaluation, key: str, name: str, base: str | None) -> str:
    c = _comparison(evaluation, key, name, base) if base is not None else None
    if c is None or c.difference is None:
        return ""
    text = f"{visible(name)} {fixed(c.difference, 2, True)}"
    if c.tost is not None and c.tost.noninferior is not None:
        text += f" ({'' if c.tost.noninferior else 'not shown to be '}non-inferior at the margin of {c.tost.margin:g})"
    return text


def _variety(evaluation: Evaluation, known: dict[str, Method], ranked: Sequence[str]) -> str:
    task = evaluation.task
    told = []
    for name in ranked:
        method = known[name]
        effective, unique = (method.metrics.get(key) for key in (EFFECTIVE, UNIQUE))
        if effective is None or effective.value is None or not total(method.pairs, evaluation.lexicon):
            continue
        text = f"{visible(name)} {_with_interval(effective, 'count')}"
        if unique is not None and unique.value is not None:
            text += f" ({unique.value:.0f} different)"
        told.append(text)
    repeated = [f"{visible(name)} {m.duplicates.rows:,} of {m.n:,}" for name, m in known.items() if m.duplicates.rows]
    text = f"No sentence holds {constraint(task)}."
    if told:
        text = f"Effective {term_pairs(task)}, of {task.pair_count:,}: {listed(told)}."
    return text + (f" Rows that repeat an earlier text: {listed(repeated)}." if repeated else " No text occurs twice.")


def _optimum(evaluation: Evaluation) -> str:
    frontier = evaluation.frontier
    points = sorted((p for p in frontier.points if p.excess is not None), key=lambda p: p.excess or 0.0)
    if not points:
        if frontier.p0 is None:
            return f"Not known: nothing tells how often the base model complies ({visible(frontier.p0_source)})."
        return "Not known: no method with a finite bound has a KL to the base model on record."
    told = [
        f"{visible(p.method)} {fixed(p.excess or 0.0, 1)} ({fixed(_value(p.kl) or 0.0, 1)} where its compliance needs "
        f"{fixed(_value(p.bound) or 0.0, 1)})"
        for p in points
    ]
    own = share(frontier.p0) if frontier.p0 else "unknown"
    return (
        f"Nats per sentence above the least KL to the base model that its compliance needs: {listed(told)}. That "
        f"bound, kl(c‖p₀), follows from the base model's own compliance, {own} ({visible(frontier.p0_source)})."
    )


def _cost(known: dict[str, Method]) -> str:
    told = [
        f"{visible(name)} {m.cost.generations_per_accepted:,.1f}"
        for name, m in known.items()
        if m.cost is not None and m.cost.generations_per_accepted is not None
    ]
    return f"Generations per accepted sentence: {listed(told)}." if told else ""


def _measured(evaluation: Evaluation) -> str:
    sizes = sorted({m.n for m in evaluation.methods.values()})
    n = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    occupations = len({o for m in evaluation.methods.values() for o in m.occupations})
    judges = listed(f"{visible(j.name)} ({visible(j.source)})" for j in evaluation.judges)
    return (
        f"{n} sentences of each of {len(evaluation.methods)} method{'s' * (len(evaluation.methods) != 1)} about "
        f"{occupations} occupation{'s' * (occupations != 1)}"
        f"{f', judged by {judges}' if judges else ', without a fluency judge'}; intervals over occupations, bootstraps "
        f"of {evaluation.settings.get('bootstrap_draws', 'several thousand')} draws, seed "
        f"{evaluation.settings.get('seed', 'not recorded')}."
    )


def gaps(evaluation: Evaluation, runs: Sequence[TrainingRun], unfinished: Sequence[tuple[str, str]] = ()) -> list[Gap]:
    """What a full report would have besides, with the command or option that adds it.

    `unfinished`: methods of a study that are not done, with what happened.
    """
    out = [
        Gap(f"The study's method {visible(name)} ({visible(status)})", "run `equipoise study` again: it goes on where "
            "it stopped")
        for name, status in unfinished
    ]  # fmt: skip
    if not evaluation.judges:
        out.append(Gap("Fluency", "evaluate with a judge: `equipoise evaluate FILES --judge bundled --output FOLDER`"))
    if len(evaluation.methods) < 2:
        task = "" if evaluation.task == PROTOCOL else " --task FILE"
        out.append(Gap("Comparisons and the front", "give completions of a second method, for instance the untrained "
                       f"model: `python generate_rlhf.py --model bundled{task} --output baseline.csv`"))  # fmt: skip
    if evaluation.frontier.p0 is None:
        out.append(Gap("The bound on KL", f"{visible(evaluation.frontier.p0_source)}; a file of the untrained model's "
                       "completions, or Generate-and-Filter's `.costs.json` beside its file, gives p₀"))  # fmt: skip
    without = [visible(name) for name, m in evaluation.methods.items() if m.kl is None]
    if without:
        out.append(Gap(f"KL to the base model of {listed(without)}",
                       "keep the `.costs.json` that `equipoise study` and "
                       "`equipoise generate` write beside a completions file"))  # fmt: skip
    free = [visible(name) for name, m in evaluation.methods.items() if m.cost is None]
    if free:
        out.append(Gap(f"Cost of {listed(free)}", "keep the `.costs.json` beside the completions file"))
    if not runs:
        out.append(Gap("Training curves and the path of training", "name the folder that training wrote: "
                       "`--run rlhf_llama3_7b_output`"))  # fmt: skip
    silent = [visible(name) for name, m in evaluation.methods.items() if not m.n]
    if silent:
        out.append(Gap(f"Sentences of {listed(silent)}", "the file has no rows: run the command that writes it again"))
    return out


def share(estimate: Estimate) -> str:
    """Such as "97.5 % [87.5, 100]"."""
    value = "–" if estimate.value is None else formatted(estimate.value, "share")
    if estimate.low is None or estimate.high is None:
        return f"{value} %"
    return f"{value} % [{formatted(estimate.low, 'share')}, {formatted(estimate.high, 'share')}]"


def _with_interval(estimate: Estimate, unit: str) -> str:
    assert estimate.value is not None
    text = formatted(estimate.value, unit)
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{formatted(estimate.low, unit)}, {formatted(estimate.high, unit)}]"


def _comparison(evaluation: Evaluation, metric: str, a: str, b: str) -> Comparison | None:
    """a − b, turned round where the evaluation holds b − a."""
    for c in evaluation.comparisons:
        if c.metric == metric and (c.a, c.b) == (a, b):
            return c
        if c.metric == metric and (c.a, c.b) == (b, a):
            minus = (None if v is None else -v for v in (c.difference, c.high, c.low, c.cohens_h, c.cliffs_delta))
            difference, low, high, h, delta = minus
            return Comparison(
                metric, c.family, a, b, difference, low, high, c.p_sign_flip, c.p_wilcoxon, c.p_holm, h, delta,
                None if c.tost is None else _turned(c.tost), c.n_occupations, c.note,
            )  # fmt: skip
    return None


def _turned(tost: Equivalence) -> Equivalence:
    """The test the other way round. The larger of its two p-values is known, and which of them is the given one."""
    noninferior: bool | None = None  # the other p-value is the smaller and not on record
    if tost.equivalent:
        noninferior = True
    elif None not in (tost.p_equivalent, tost.p_noninferior) and tost.p_equivalent != tost.p_noninferior:
        noninferior = False
    p = tost.p_equivalent if noninferior is not None else None
    return Equivalence(tost.margin, p, tost.p_equivalent, noninferior, tost.equivalent, tost.note)


def _value(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _capital(text: str) -> str:
    return text[:1] + text[1:2].upper() + text[2:] if text.startswith(" ") else text
