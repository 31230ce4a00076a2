"""Text for a paper's method section, from what was done, and the entries that it cites."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from equipoise import __version__
from equipoise.evaluation.results import Evaluation
from equipoise.evaluation.runs import TrainingRun
from equipoise.evaluation.visible import visible

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
    """Paragraphs that say what was measured and how, each claim from the evaluation's own settings."""
    settings = evaluation.settings
    low, high = settings.get("min_words", 8), settings.get("max_words", 15)
    methods = evaluation.methods
    occupations = list(dict.fromkeys(o for m in methods.values() for o in m.occupations))
    samples = "; ".join(
        f"{visible(name)}: {m.n:,}"
        + (f", {len(m.seeds)} seeds ({', '.join(map(visible, m.seeds))})" if len(m.seeds) > 1 else "")
        + (f", model {visible(m.model)}" if m.model else "")
        for name, m in methods.items()
    )
    agentic, communal = evaluation.lexicon["agentic"], evaluation.lexicon["communal"]
    out = [
        f"We generated one-sentence descriptions of {len(occupations)} occupations with {len(methods)} "
        f"method{'s' * (len(methods) != 1)} ({samples}). Every sentence begins with “The [occupation] was”; the prefix "
        "counts towards its length.",
        f"A term counts as a whole word, whatever its case, after normalising Unicode hyphens. There are "
        f"{len(agentic)} agentic terms ({', '.join(agentic)}) and {len(communal)} communal ones "
        f"({', '.join(communal)}), after Gaucher et al. (2011). The primary measure, strict success, was fixed "
        f"beforehand: at least one term of each class, {low} to {high} words, and one complete "
        "sentence. Variety is the number of different (agentic, communal) pairs of a sentence's first terms, and their "
        "effective number 2^H, with H the Shannon entropy of the pairs in bits.",
    ]
    if evaluation.judges:
        judges = "; ".join(
            f"{visible(j.name)} ({visible(j.source)}{f'; {visible(j.caveat)}' if j.caveat else ''})"
            for j in evaluation.judges
        )
        out.append(
            "Fluency is the median over sentences of the mean negative log-likelihood per token of the whole sentence "
            f"under a judge model that is not the policy: {judges}."
        )
    draws, seed = settings.get("bootstrap_draws"), settings.get("seed")
    tests = (
        "Methods are compared by the mean paired difference over occupations, tested with sign-flips (Wilcoxon’s "
        "signed-rank test as a check) and corrected after Holm within each metric; we report Cohen’s h for shares and "
        "Cliff’s delta over occupation values."
    )
    margins = sorted({c.tost.margin for c in evaluation.comparisons if c.tost is not None})
    if margins:
        tests += (
            " Fluency is tested for non-inferiority with two one-sided paired t-tests at a margin of "
            f"{' and '.join(f'{m:g}' for m in margins)} nats per token, set beforehand."
        )
    kinds = {e.interval for m in methods.values() for e in m.metrics.values()}
    used = [text for kind, text in _INTERVALS.items() if kind in kinds]
    out.append(
        "Occupations are the unit of analysis. "
        + (f"95 % intervals: {'; '.join(used)}. " if used else "")
        + (f"Bootstraps have {draws:,} draws and the seed {seed}. " if isinstance(draws, int) else "")
        + (tests if evaluation.comparisons else "")
    )
    frontier = evaluation.frontier
    if frontier.p0 is not None and frontier.p0.value is not None:
        event = "both classes" if frontier.event == "both" else "strict success"
        out.append(
            "A policy that complies with probability c has KL(π‖π₀) ≥ kl(c‖p₀) = c·ln(c/p₀) + (1−c)·ln((1−c)/(1−p₀)) "
            "nats per sentence from a base model π₀ that complies with probability p₀ (data-processing inequality). "
            f"We report each method’s distance above that bound for {event}, with p₀ = {frontier.p0.value:.3g} "
            f"({visible(frontier.p0_source)})."
        )
    out += [text for run in runs if (text := _training_text(run))]
    out.append(f"Measured with equipoise {evaluation.provenance.get('equipoise', __version__)}.")
    return [" ".join(paragraph.split()) for paragraph in out]


def _training_text(run: TrainingRun) -> str:
    config = run.record.get("config")
    if not isinstance(config, Mapping):
        return ""

    def at(*path: str) -> Any:
        value: Any = config
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    facts = [
        ("model", at("policy", "model")),
        ("prompt", at("prompt")),
        ("batch", at("ppo", "batch_size")),
        ("mini-batch", at("ppo", "mini_batch_size")),
        ("epochs", at("ppo", "epochs")),
        ("learning rate", at("ppo", "learning_rate")),
        ("target KL of an update", at("ppo", "target_kl")),
        ("KL coefficient", at("ppo", "kl_coef")),
        ("temperature", at("sampling", "temperature")),
        ("top-p", at("sampling", "top_p")),
        ("seed", at("seed")),
    ]
    told = ", ".join(f"{name} {visible(str(value))}" for name, value in facts if value is not None)
    done = run.steps[-1] if run.steps else 0
    return f"The policy of the run {visible(run.name)} was trained with PPO for {done:,} steps ({told})."


def bibtex() -> str:
    """Entries for this software and what its CITATION.cff refers to."""
    try:
        document = yaml.safe_load(CITATION.read_text(encoding="utf-8"))
    except OSError:
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
