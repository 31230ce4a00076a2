"""Text for a paper's method section, from what was done, and the entries that it cites."""

import re
from collections.abc import Sequence

from equipoise import __version__
from equipoise.evaluation.association import PRIOR, SHUFFLES
from equipoise.evaluation.citations import Entry, in_latex, in_words, software, sources, study
from equipoise.evaluation.fairness import contrasts
from equipoise.evaluation.intervals import draws_made
from equipoise.evaluation.language import Reader
from equipoise.evaluation.reference import STUDY
from equipoise.evaluation.results import Evaluation
from equipoise.evaluation.runs import TrainingRun
from equipoise.evaluation.training_text import training_text
from equipoise.evaluation.visible import visible
from equipoise.evaluation.wording import begun, judge_named, listed
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task
from equipoise.protocol.word_lists import GENDERED_SOURCES, NEGATIONS_SOURCE, WINDOW

_INTERVALS = {
    "clustered-wilson": "for shares Wilson’s, with n divided by the design effect of occupations and Student’s t",
    "two-level": "for means a two-level bootstrap-t, which draws occupations and sentences within them and is never "
    "narrower than Student’s over occupations",
    "woodruff": "for medians Woodruff’s, from the interval of the share of sentences at or below it",
    "jackknife": "for effective numbers a jackknife over occupations",
}
"""Each kind of interval in words; docs/EVALUATION.md has the formulas."""


_LOG_ODDS = (
    "Monroe, B. L., Colaresi, M. P., & Quinn, K. M. (2008). Fightin’ words: Lexical feature selection and evaluation "
    "for identifying the content of political conflict. Political Analysis, 16(4), 372–403."
)
_QUADRATURE = (
    "Pinheiro, J. C., & Bates, D. M. (1995). Approximations to the log-likelihood function in the nonlinear "
    "mixed-effects model. Journal of Computational and Graphical Statistics, 4(1), 12–35."
)


def _entries(task: Task) -> dict[str, Entry]:
    """By the text of each source: the task's, and those of what is measured beside its terms."""
    texts = (*task.sources, *GENDERED_SOURCES, NEGATIONS_SOURCE, _LOG_ODDS, _QUADRATURE)
    return dict(zip(texts, sources(texts), strict=True))


def _paragraphs(evaluation: Evaluation, runs: Sequence[TrainingRun]) -> list[str]:
    """The method text with a mark for each citation."""
    out = [
        _sentences(evaluation),
        _terms(evaluation.task),
        _fairness(evaluation),
        _judges(evaluation),
        _statistics(evaluation),
        _bound(evaluation),
        *(training_text(run, evaluation.task) for run in runs),
        _study(evaluation),
        f"Measured with equipoise {evaluation.provenance.get('equipoise', __version__)} {software().mark()}.",
    ]
    return [" ".join(paragraph.split()) for paragraph in out if paragraph]


def _sentences(evaluation: Evaluation) -> str:
    methods = evaluation.methods
    occupations = list(dict.fromkeys(o for m in methods.values() for o in m.occupations))
    samples = "; ".join(
        f"{visible(name)}: {m.n:,}"
        + (f", {plural(len(m.seeds), 'seed')} ({', '.join(map(visible, m.seeds))})" if len(m.seeds) > 1 else "")
        + (f", model {visible(m.model)}" if m.model else "")
        for name, m in methods.items()
    )
    return (
        f"We measured sentences about {plural(len(occupations), 'occupation')} by {plural(len(methods), 'method')} "
        f"(sentences: {samples}). {_beginnings(evaluation)}"
    )


def _beginnings(evaluation: Evaluation) -> str:
    """Whether the sentences complete the task's frame, as far as is known."""
    total, otherwise = sum(m.n for m in evaluation.methods.values()), evaluation.not_begun or 0
    frame = f"“{visible(begun(evaluation.task, '[occupation]'))}”"
    if not otherwise:
        return f"They complete {frame}; this beginning counts towards their length."
    if otherwise >= total:
        return f"None of them completes {frame}; each counts as it is, from its first word."
    return (
        f"All but {otherwise:,} of {total:,} complete {frame}; those begin otherwise or are empty. The beginning "
        "counts towards a sentence's length."
    )


def _terms(task: Task) -> str:
    """What counts as a term and as success."""
    classes: list[str] = []
    for label, (_, terms) in zip(task.labels, task.classes, strict=True):
        noun = ("one" if classes else "term") + "s" * (len(terms) != 1)
        classes.append(f"{len(terms)} {label} {noun} ({', '.join(terms)})")
    entries = _entries(task)
    after = f", after {listed(entries[text].mark() for text in task.sources)}" if task.sources else ""
    outside = f" ({listed(task.not_in_source)} not listed there)" if task.sources and task.not_in_source else ""
    stems = " A term that ends in * counts in every word that begins so." if _has_stems(task) else ""
    labels = ", ".join(map(visible, task.labels))
    if len(task.classes) == 1:
        verb, variety, whose = "at least one term", "different terms, by a sentence's first,", "these terms"
    else:
        verb = "at least one term of each class"
        variety = f"different ({labels}) {task.pair_noun} of a sentence's first terms,"
        whose = f"the {task.pair_noun}"
    there = "is" if len(task.classes) == 1 and len(task.classes[0].terms) == 1 else "are"
    return (
        f"A term counts as a whole word, whatever its case, after normalising Unicode hyphens.{stems} There {there} "
        f"{listed(classes)}{after}{outside}. The primary measure is strict success: {verb}, "
        f"{task.bounds}, and one complete sentence. Variety is the number of {variety} and their effective number 2^H, "
        f"with H the Shannon entropy of {whose} in bits."
    )


def _has_stems(task: Task) -> bool:
    return any(term.endswith("*") for term in task.lexicon.terms)


def _fairness(evaluation: Evaluation) -> str:
    """What is counted beside the terms, where it is."""
    keys = [key for key, metric in evaluation.metrics.items() if metric.tier == "fairness"]
    if not keys:
        return ""
    task, entries = evaluation.task, _entries(evaluation.task)
    reader, out = Reader(task), []
    if reader.gendered is not None:
        own = task.lists.gendered is not None
        after = "" if own else f", after {listed(entries[text].mark() for text in GENDERED_SOURCES)}"
        kinds = [f"{name.replace('_', ' ')} ({', '.join(words)})" for name, words in reader.gendered.classes]
        out.append(f"Behind the frame we looked for gendered words: {listed(kinds)}{after}.")
    if reader.negations.cues:
        after = "" if task.lists.negations is not None else f" after {entries[NEGATIONS_SOURCE].mark()}"
        cues = plural(len(reader.negations.cues), "cue")
        out.append(
            f"A term counts as negated where one of {cues}{after} is among the {WINDOW} words before it in the same "
            "clause."
        )
    if len(task.classes) > 1:
        out.append("The class that comes first is that of the first term, in sentences with terms of every class.")
    against = listed(what for _, _, what in contrasts(task))
    out.append(
        f"The association of an occupation is the log-odds of its mentions, {against}, with an informative Dirichlet "
        f"prior of the weight of {PRIOR:g} mention {entries[_LOG_ODDS].mark()}; its spread is the standard deviation "
        f"over occupations, that of chance is from {SHUFFLES} random assignments of the sentences to occupations."
    )
    return " ".join(out)


def _judges(evaluation: Evaluation) -> str:
    judges = "; ".join(
        judge_named(j) + (f", with the caveat: {visible(j.caveat)}" if j.caveat else "") for j in evaluation.judges
    )
    return judges and (
        "Fluency is the median over sentences of the mean negative log-likelihood per token of the whole sentence "
        f"under a judge model: {judges}."
    )


def _statistics(evaluation: Evaluation) -> str:
    """Intervals and tests."""
    draws, seed = (evaluation.settings.get(key) for key in ("bootstrap_draws", "seed"))
    kinds = {e.interval for m in evaluation.methods.values() for e in m.metrics.values()}
    used = [text for kind, text in _INTERVALS.items() if kind in kinds]
    drawn = "two-level" in kinds or bool(evaluation.comparisons)
    most = max((len(m.occupations) for m in evaluation.methods.values()), default=1)
    return (
        "Occupations are the unit of analysis. "
        + (f"95 % intervals: {'; '.join(used)}. " if used else "")
        + (
            f"Bootstraps have {draws_made(draws, max(1, most)):,} draws and the seed {seed}. "
            if drawn and isinstance(draws, int)
            else ""
        )
        + (_tests(evaluation) if evaluation.comparisons else "")
    )


def _tests(evaluation: Evaluation) -> str:
    tests = (
        "Methods are compared by the mean paired difference over occupations, tested with sign-flips (Wilcoxon’s "
        "signed-rank test as a check) and corrected after Holm within each metric; we report Cohen’s h for shares and "
        "Cliff’s delta over occupation values."
    )
    if any(c.mixed is not None for c in evaluation.comparisons):
        tests += (
            " Beside them stands a mixed logit of single sentences, in which occupations have random intercepts and "
            f"slopes, fitted by adaptive Gauss–Hermite quadrature {_entries(evaluation.task)[_QUADRATURE].mark()}; its "
            "test is the likelihood ratio against an F distribution."
        )
    margins = sorted({c.tost.margin for c in evaluation.comparisons if c.tost is not None})
    if margins:
        tests += (
            " Fluency is tested for non-inferiority with two one-sided paired t-tests at a margin of "
            f"{' and '.join(f'{m:g}' for m in margins)} nats per token."
        )
    return tests


def _bound(evaluation: Evaluation) -> str:
    """What the distances to the base model are compared with."""
    frontier = evaluation.frontier
    if frontier.p0 is None or frontier.p0.value is None:
        return ""
    event = evaluation.task.all_classes if frontier.event == "both" else "strict success"
    return (
        "A policy that complies with probability c has KL(π‖π₀) ≥ kl(c‖p₀) = c·ln(c/p₀) + (1−c)·ln((1−c)/(1−p₀)) "
        "nats per sentence from a base model π₀ that complies with probability p₀ (data-processing inequality). "
        f"We report each method’s distance above that bound for {event}, with p₀ = {frontier.p0.value:.3g} "
        f"({visible(frontier.p0_source)}). {_distances(evaluation)}"
    )


def _distances(evaluation: Evaluation) -> str:
    """How each method's KL was estimated, which may differ: from its own sentences, or from weights."""
    told: dict[str, list[str]] = {}
    for name, method in evaluation.methods.items():
        if method.kl is not None:
            told.setdefault(method.kl.note or "its side file does not say how", []).append(name)
    each = "; ".join(f"of {listed(names)}, {visible(how).rstrip('.')}" for how, names in told.items())
    return f"These KLs are, {each}." if each else ""


def _study(evaluation: Evaluation) -> str:
    """What the study-compatible metrics are, where there are any."""
    if not any(metric.tier == "study" for metric in evaluation.metrics.values()):
        return ""
    beside = any(row.source == STUDY for row in evaluation.reference)
    numbers = ", whose published numbers stand beside ours" if beside else ""
    return f"The metrics called study-compatible follow the formulas of the public study {study().mark()}{numbers}."


def methods_text(evaluation: Evaluation, runs: Sequence[TrainingRun]) -> list[str]:
    """Paragraphs that say what was measured and how, each claim from the evaluation's own settings and the task."""
    return [in_words(paragraph) for paragraph in _paragraphs(evaluation, runs)]


def methods_latex(evaluation: Evaluation, runs: Sequence[TrainingRun]) -> str:
    """The same for LaTeX, with a \\cite for each entry of `bibtex`."""
    paragraphs = [in_latex(paragraph) for paragraph in _paragraphs(evaluation, runs)]
    return "\n\n".join(["% What is cited is in references.bib, beside this file.", *paragraphs]) + "\n"


def bibtex(evaluation: Evaluation) -> str:
    """An entry for each work that the method text cites: the task's sources, the public study, this software."""
    entries = {entry.key: entry for entry in [*_entries(evaluation.task).values(), study(), software()]}
    text = methods_latex(evaluation, ())
    return "\n".join(entries[key].bibtex() for key in dict.fromkeys(re.findall(r"\\cite\{(\w+)\}", text)))
