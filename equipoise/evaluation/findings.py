"""A report's findings in words, and what it lacks with the way to get it. Every sentence is made from the numbers."""

from collections.abc import Sequence
from typing import NamedTuple

from equipoise.evaluation.figures import STRICT
from equipoise.evaluation.intervals import draws_made
from equipoise.evaluation.pairs import total
from equipoise.evaluation.results import FEWEST, Comparison, Equivalence, Estimate, Evaluation, FrontierPoint, Method
from equipoise.evaluation.runs import TrainingRun
from equipoise.evaluation.tables import fixed, formatted
from equipoise.evaluation.visible import visible
from equipoise.evaluation.wording import constraint, event, judge_named, listed, strict, term_pairs, untrained
from equipoise.protocol.plural import plural
from equipoise.protocol.task import PROTOCOL, Task

EFFECTIVE = "pairs/effective"
UNIQUE = "pairs/unique"


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
    few = [name for name in known if known[name].n < FEWEST]
    if len(few) == len(known):
        few = []  # then the order is told with its doubt
    ranked = sorted(known, key=lambda name: (name in few, -(_value(known[name].metrics[STRICT]) or 0.0)))
    answers = [
        ("Which method complies most?", _compliance(evaluation.task, known, ranked, few)),
        ("Is the difference real?", _difference(evaluation, ranked)),
        ("At what cost in fluency?", _fluency(evaluation, ranked)),
        ("At what cost in variety?", _variety(evaluation, known, ranked)),
        ("Are occupations associated less?", _associations(evaluation)),
        ("How far from the optimum?", _optimum(evaluation)),
        ("What did a sentence cost?", _cost(known)),
        ("How was it measured?", _measured(evaluation)),
    ]
    return [Finding(question, answer) for question, answer in answers if answer]


def baseline(evaluation: Evaluation, other_than: str) -> str | None:
    """The method that others are measured against: the one that --base named, or the only one that is called as the
    untrained model usually is."""
    named = evaluation.settings.get("base")
    names = [named] if named in evaluation.methods else untrained(evaluation.methods)
    return names[0] if len(names) == 1 and names[0] != other_than else None


def _of_base(evaluation: Evaluation, name: str) -> str:
    """The baseline's name, with what makes it one where only its name does."""
    guessed = evaluation.settings.get("base") != name
    return visible(name) + (", taken for the untrained model because of its name" if guessed else "")


def _compliance(task: Task, known: dict[str, Method], ranked: Sequence[str], few: Sequence[str]) -> str:
    """`few`: methods with fewer than FEWEST sentences, the last of `ranked`, which are told and not ranked."""
    if not any(m.metrics[STRICT].value for m in known.values()):
        return (
            f"None: of {plural(sum(m.n for m in known.values()), 'sentence')} not one is a strict success "
            f"({strict(task)})."
        )
    best, able = known[ranked[0]].metrics[STRICT], [name for name in ranked if name not in few]
    level = [name for name in able if known[name].metrics[STRICT].value == best.value]
    text = (
        f"{listed(level)} {'complies' if len(level) == 1 else 'comply'} most: "
        + listed(_reached(known[name]) for name in level)
        + f" are strict successes ({strict(task)})."
    )
    if rest := able[len(level) :]:
        text += f" {listed(f'{visible(name)} reaches {_reached(known[name])}' for name in rest)}."
    if few:
        told = listed(f"{visible(name)}, {_reached(known[name])}" for name in few)
        text += f" Not ranked, with fewer than {FEWEST} sentences: {told}."
    if all(m.n < FEWEST for m in known.values()):
        text += f" No method has {FEWEST} sentences, so this order may be chance."
    return text


def _reached(method: Method) -> str:
    """Such as "97.5 % [87.5, 100] of 40 sentences"."""
    return f"{share(method.metrics[STRICT])} of {plural(method.n, 'sentence')}"


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
    over = plural(c.n_occupations, "occupation")
    return f"{text}; {verdict} ({told}{corrected}, sign-flips over {over}).{_capital(note)}"


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
        each = [
            f"{visible(name)} {_with_interval(estimate, 'nats/token')} (n = {estimate.n:,})"
            for name, estimate in values.items()
        ]
        text = (
            f"Median negative log-likelihood under the judge {visible(judge.name)}, in nats per token: {listed(each)}."
        )
        base = baseline(evaluation, "")
        against = [_less_fluent(evaluation, key, name, base) for name in values if base is not None and name != base]
        if known := [one for one in against if one]:
            text += f" Difference to {_of_base(evaluation, base or '')} (above 0 is less fluent): {listed(known)}."
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
    told: list[str] = []
    notes: dict[str, list[str]] = {}
    for name in ranked:
        method = known[name]
        effective, unique = (method.metrics.get(key) for key in (EFFECTIVE, UNIQUE))
        if effective is None or effective.value is None or not total(method.pairs, evaluation.lexicon):
            continue
        text = f"{visible(name)} {_with_interval(effective, 'count')}"
        different = f"{unique.value:.0f} different, " if unique is not None and unique.value is not None else ""
        if effective.low is None and effective.note:
            notes.setdefault(visible(effective.note), []).append(name)
        told.append(f"{text} ({different}of {plural(effective.n, 'compliant sentence')})")
    repeated = [f"{visible(name)} {m.duplicates.rows:,} of {m.n:,}" for name, m in known.items() if m.duplicates.rows]
    text = f"No sentence holds {constraint(task)}."
    if told:
        text = f"Effective {term_pairs(task)}, of {task.pair_count:,}: {listed(told)}."
        text += "".join(f" Of {listed(names)}, {note}." for note, names in notes.items())
    return text + (f" Rows that repeat an earlier text: {listed(repeated)}." if repeated else " No text occurs twice.")


def _optimum(evaluation: Evaluation) -> str:
    frontier = evaluation.frontier
    # The base model itself is at no distance.
    known = (p for p in frontier.points if p.excess is not None and (p.kl is None or p.kl.value != 0))
    points = sorted(known, key=lambda p: p.excess or 0.0)
    if not points:
        if frontier.p0 is None:
            return f"Not known: nothing tells how often the base model complies ({visible(frontier.p0_source)})."
        return "Not known: no method with a finite bound has a KL to the base model on record."
    told = [f"{visible(p.method)} {_excess(p)}" for p in points]
    own = share(frontier.p0) if frontier.p0 else "unknown"
    if frontier.p0 and frontier.p0.n:
        own += f" of {plural(frontier.p0.n, 'sentence')}"
    below = " Below 0 is sampling error, or rows cut by top-p." if any((p.excess or 0.0) < 0 for p in points) else ""
    return (
        f"Nats per sentence above the least KL to the base model that its compliance needs: {listed(told)}.{below} "
        f"That bound, kl(c‖p₀), follows from the base model's own share of sentences with "
        f"{event(evaluation.task, frontier.event)}, {own} ({visible(frontier.p0_source)})."
    )


def _excess(point: FrontierPoint) -> str:
    """Such as "7.0 (11.8 where its compliance, of 40 sentences, needs 4.8)": the KL may be of fewer, or of others."""
    kl, bound = _value(point.kl) or 0.0, _value(point.bound) or 0.0
    sentences = plural(point.compliance.n, "sentence")
    if max(abs(kl), bound) < 0.05:
        return f"0.0 (it is no farther from the base model than can be told; its compliance is of {sentences})"
    needs = f"its compliance, of {sentences}, needs {fixed(bound, 1)}"
    return f"{fixed(point.excess or 0.0, 1)} ({fixed(kl, 1)} where {needs})"


def _cost(known: dict[str, Method]) -> str:
    told = [
        f"{visible(name)} {m.cost.generations_per_accepted:,.1f}"
        + (f" ({m.cost.accepted:,} accepted)" if m.cost.accepted is not None else "")
        for name, m in known.items()
        if m.cost is not None and m.cost.generations_per_accepted is not None
    ]
    return f"Generations per accepted sentence: {listed(told)}." if told else ""


def _associations(evaluation: Evaluation) -> str:
    """How much of the untrained model's spread over occupations each method keeps, where it is known of any."""
    base = baseline(evaluation, "")
    told = []
    for key, metric in evaluation.metrics.items():
        if base is None or not key.startswith("association/kept"):
            continue
        before, chance = (
            evaluation.methods[base].metrics.get(key.replace("kept", name)) for name in ("spread", "chance")
        )
        kept = {name: m.metrics[key].value for name, m in evaluation.methods.items() if key in m.metrics}
        known = {name: value for name, value in kept.items() if value is not None}
        if before is None or before.value is None or chance is None or chance.value is None or not known:
            continue
        what = visible(metric.title.partition(", ")[2])
        told.append(
            f"With {_of_base(evaluation, base)}, occupations are {before.value:.2f} nats apart in log-odds, {what} "
            f"({chance.value:.2f} by chance). Of that, chance taken off each, "
            + listed(f"{visible(name)} keeps {formatted(value, 'share')} %" for name, value in known.items())
            + "."
        )
    return " ".join([*told, *_order(evaluation)]) if told else ""


def _order(evaluation: Evaluation) -> list[str]:
    """Where the order of terms surely goes with the untrained model's association."""
    out = []
    for key in evaluation.metrics:
        if key.startswith("first/correlation"):
            found = {name: m.metrics[key] for name, m in evaluation.methods.items() if key in m.metrics}
            sure = [
                f"{visible(name)} {fixed(e.value, 2)} [{fixed(e.low, 2)}, {fixed(e.high or 0.0, 2)}]"
                for name, e in found.items()
                if e.value is not None and e.low is not None and e.low > 0
            ]
            if sure:
                label = visible(evaluation.metrics[key].title.partition("correlation of ")[2].partition(" with ")[0])
                out.append(f"The order of terms still goes with it ({label}): correlation {listed(sure)}.")
    return out


def _measured(evaluation: Evaluation) -> str:
    sizes = sorted({m.n for m in evaluation.methods.values()})
    n = plural(sizes[0], "sentence") if len(sizes) == 1 else f"{sizes[0]:,} to {plural(sizes[-1], 'sentence')}"
    occupations = len({o for m in evaluation.methods.values() for o in m.occupations})
    methods = len(evaluation.methods)
    judges = listed(map(judge_named, evaluation.judges))
    most = max((len(m.occupations) for m in evaluation.methods.values()), default=1)
    draws, seed = (evaluation.settings.get(key) for key in ("bootstrap_draws", "seed"))
    return (
        f"{n} of {'each of ' * (methods != 1)}{plural(methods, 'method')} about {plural(occupations, 'occupation')}, "
        f"{f'fluency judged by {judges}' if judges else 'without a fluency judge'}; intervals over occupations"
        + (f", bootstraps of {draws_made(draws, max(1, most)):,} draws" if isinstance(draws, int) else "")
        + (f", seed {seed}" if seed is not None else "")
        + "."
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
