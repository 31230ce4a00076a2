"""Every metric's key with its title, unit, tier and caveat; docs/EVALUATION.md has the formulas.

A "@" at the end of a key stands for the name of a judge or classifier.
"""

from collections.abc import Sequence

from equipoise.evaluation.results import Metric

_GROWS = "depends on n: compare at equal n only"
_BIASED = "too large on few sentences, the more so the fewer there are: compare at equal n only"
_SHORT = "NLL on short texts is weak evidence of fluency: it rises as texts shorten and falls with repetition"
_STUDY = "the public study's formula, for comparison with its numbers only"

CATALOGUE: dict[str, Metric] = {
    "strict": Metric("strict success", "share", "headline", "higher"),
    "pairs/unique": Metric("unique pairs", "count", "headline", "higher", _GROWS),
    "pairs/effective": Metric("effective pairs", "count", "headline", "higher", _GROWS),
    "nll/median@": Metric("median NLL", "nats/token", "headline", "lower", _SHORT),
    "both": Metric("both classes", "share", "diagnostic", "higher"),
    "either": Metric("any term", "share", "diagnostic", "higher"),
    "agentic_only": Metric("agentic only", "share", "diagnostic", "lower"),
    "communal_only": Metric("communal only", "share", "diagnostic", "lower"),
    "neither": Metric("no term", "share", "diagnostic", "lower"),
    "strict/train": Metric("strict, occupations trained on", "share", "diagnostic", "higher"),
    "strict/heldout": Metric("strict, the five hold-out occupations", "share", "diagnostic", "higher"),
    "in_length": Metric("length in bounds", "share", "diagnostic", "higher"),
    "complete": Metric("one complete sentence", "share", "diagnostic", "higher"),
    "words": Metric("words", "words", "diagnostic", "neither"),
    "reward": Metric("protocol reward", "reward", "diagnostic", "higher"),
    "terms": Metric("different terms per sentence", "terms", "diagnostic", "neither"),
    "stuffed": Metric("more than one term of a class", "share", "diagnostic", "lower"),
    "repeated": Metric("a term more than twice", "share", "diagnostic", "lower"),
    "agentic_share": Metric("agentic share of mentions", "share", "diagnostic", "neither", "0.5 is balance"),
    "agentic_per_communal": Metric("agentic : communal", "ratio", "diagnostic", "neither", "1 is balance"),
    "unique_texts": Metric("different texts", "share", "diagnostic", "higher", _GROWS),
    "distinct/1": Metric("distinct-1", "share", "diagnostic", "higher", _GROWS),
    "distinct/2": Metric("distinct-2", "share", "diagnostic", "higher", _GROWS),
    "distinct/3": Metric("distinct-3", "share", "diagnostic", "higher", _GROWS),
    "self_bleu": Metric("self-BLEU", "points", "diagnostic", "lower", "of one subsample of the same size everywhere"),
    "masked/unique": Metric("different texts, terms masked", "share", "diagnostic", "higher", _GROWS),
    "masked/distinct_2": Metric("distinct-2, terms masked", "share", "diagnostic", "higher", _GROWS),
    "jsd/uniform_agentic": Metric("JSD to uniform, agentic", "bits", "diagnostic", "lower", _BIASED),
    "jsd/uniform_communal": Metric("JSD to uniform, communal", "bits", "diagnostic", "lower", _BIASED),
    "jsd/occupations": Metric("JSD between occupations", "bits", "diagnostic", "lower", _BIASED),
    "nll/token_weighted@": Metric("token-weighted NLL", "nats/token", "diagnostic", "lower", _SHORT),
    "acceptable@": Metric("acceptable", "share", "diagnostic", "higher", "a classifier's opinion"),
    "study/both": Metric("both (study)", "share", "study", "higher", _STUDY + "; substring matcher"),
    "study/either": Metric("any (study)", "share", "study", "higher", _STUDY + "; substring matcher"),
    "study/entropy_agentic": Metric("entropy, agentic (study)", "bits", "study", "higher", _STUDY),
    "study/entropy_communal": Metric("entropy, communal (study)", "bits", "study", "higher", _STUDY),
    "study/entropy": Metric("entropy (study)", "bits", "study", "higher", _STUDY + "; mean of the two lists"),
    "study/pairs": Metric("pairs (study)", "count", "study", "higher", _STUDY + "; " + _GROWS),
    "study/ppl@": Metric("mean perplexity (study)", "ppl", "study", "lower", _STUDY + "; comparable under gpt2 only"),
}
"""In the order of a table."""

DEPENDS_ON_N = tuple(
    key for key, metric in CATALOGUE.items()
    if _GROWS in metric.note or _BIASED in metric.note or key.startswith("study/entropy")
)  # fmt: skip
"""What is computed again at equal n where methods differ in n."""


def titled(judges: Sequence[str], classifier: str | None) -> dict[str, Metric]:
    """The catalogue with an entry for each judge in place of "@"."""
    out: dict[str, Metric] = {}
    for key, metric in CATALOGUE.items():
        if not key.endswith("@"):
            out[key] = metric
            continue
        names = ([classifier] if classifier else []) if key == "acceptable@" else judges
        for name in names:
            out[key + name] = Metric(f"{metric.title}, {name}", metric.unit, metric.tier, metric.better, metric.note)
    return out
