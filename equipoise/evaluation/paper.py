"""Text for a paper's method section, from what was done, and the entries that it cites."""

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from equipoise import __version__
from equipoise.documents import read_yaml
from equipoise.errors import UserError
from equipoise.evaluation.formats import latex_text
from equipoise.evaluation.intervals import draws_made
from equipoise.evaluation.results import Evaluation
from equipoise.evaluation.runs import TrainingRun
from equipoise.evaluation.training_text import training_text
from equipoise.evaluation.visible import visible
from equipoise.evaluation.wording import begun, judge_named, listed
from equipoise.protocol.plural import plural
from equipoise.protocol.task import PROTOCOL, Task

CITATION = Path(__file__).parents[2] / "CITATION.cff"
"""In a checkout. Where only the package is installed, its metadata has the title and version."""


_INTERVALS = {
    "clustered-wilson": "for shares Wilson’s, with n divided by the design effect of occupations and Student’s t",
    "two-level": "for means a two-level bootstrap-t, which draws occupations and sentences within them and is never "
    "narrower than Student’s over occupations",
    "woodruff": "for medians Woodruff’s, from the interval of the share of sentences at or below it",
    "jackknife": "for effective numbers a jackknife over occupations",
}
"""Each kind of interval in words; docs/EVALUATION.md has the formulas."""


def methods_text(evaluation: Evaluation, runs: Sequence[TrainingRun]) -> list[str]:
    """Paragraphs that say what was measured and how, each claim from the evaluation's own settings and the task."""
    out = [
        _sentences(evaluation),
        _terms(evaluation.task),
        _judges(evaluation),
        _statistics(evaluation),
        _bound(evaluation),
        *(training_text(run, evaluation.task) for run in runs),
        f"Measured with equipoise {evaluation.provenance.get('equipoise', __version__)}.",
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
    after = f", after {listed(map(cited, task.sources))}" if task.sources else ""
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


def cited(source: str) -> str:
    """A citation as it stands in a text, "Gaucher et al. (2011)", where the source begins with its authors' surnames
    and initials and has a year in brackets; else the source as it is."""
    source = visible(source)
    year = re.search(r"\(([12]\d{3})[a-z]?\)", source)
    names = re.findall(r"([^\W\d_][\w'’ -]*), [^\W\d_]\.", source[: year.start()]) if year else []
    if year is None or not names or not source.startswith(names[0]):
        return source.rstrip(". ")
    who = names[0] if len(names) == 1 else f"{names[0]} and {names[1]}" if len(names) == 2 else f"{names[0]} et al."
    return f"{who} ({year[1]})"


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


def bibtex(task: Task) -> str:
    """Entries for this software and for the task's sources: of the default task as its CITATION.cff has them."""
    try:
        document = read_yaml(CITATION, "the citation")
    except UserError:
        document = {"title": importlib.metadata.metadata("equipoise")["Summary"], "version": __version__}
    software = {
        "author": _people(document.get("authors", [{"name": "The equipoise contributors"}])),
        "title": f"{{{document['title']}}}",
        "version": document.get("version", __version__),
        "doi": document.get("doi"),
        "url": document.get("repository-code") or document.get("url"),
        "year": str(document["date-released"])[:4] if document.get("date-released") else None,
        "note": "Software",
    }
    entries = [_entry("misc", "equipoise", software)]
    if task.sources != PROTOCOL.sources:
        notes = [{"note": f"{{{latex_text(source)}}}"} for source in task.sources]
        return "\n".join([*entries, *(_entry("misc", f"source{i}", note) for i, note in enumerate(notes, 1))])
    for reference in document.get("references", []):
        key = f"{reference['authors'][0].get('family-names', 'anonymous')}{reference.get('year', '')}".lower()
        fields = {"author": _people(reference["authors"]), "title": f"{{{reference['title']}}}"}
        fields |= {name: reference.get(name) for name in ("journal", "volume", "year")}
        fields |= {"number": reference.get("issue")}
        entries.append(_entry("article" if reference.get("type") == "article" else "misc", key, fields))
    return "\n".join(entries)


def _people(people: Sequence[Mapping[str, str]]) -> str:
    names = [
        f"{{{p['name']}}}" if "name" in p else f"{p.get('family-names', '')}, {p.get('given-names', '')}"
        for p in people
    ]
    return " and ".join(names)


def _entry(kind: str, key: str, fields: Mapping[str, object]) -> str:
    lines = [f"  {name:<7} = {{{value}}}," for name, value in fields.items() if value is not None]
    return "\n".join([f"@{kind}{{{key},", *lines, "}", ""])
