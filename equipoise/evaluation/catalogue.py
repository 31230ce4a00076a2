"""Every metric's key with its title, unit, tier and caveat; docs/EVALUATION.md has the formulas.

A "@" at the end of a key stands for the name of a judge or classifier. Keys that are of one class are named after it.
"""

from collections.abc import Sequence

from equipoise.evaluation.fairness import fairness_catalogue
from equipoise.evaluation.results import Metric
from equipoise.evaluation.wording import spelt
from equipoise.protocol.task import Task

_GROWS = "depends on n: compare at equal n only"
_BIASED = "too large on few sentences, the more so the fewer there are: compare at equal n only"
_SHORT = "NLL on short texts is weak evidence of fluency: it rises as texts shorten and falls with repetition"
_STUDY = "the public study's formula, for comparison with its numbers only"


def catalogue(task: Task) -> dict[str, Metric]:
    """The metrics of a task, in the order of a table."""
    return {
        **_headline(task),
        **_diagnostics(task),
        **_variety(task),
        **fairness_catalogue(task),
        **_study(task),
    }


def depends_on_n(task: Task) -> tuple[str, ...]:
    """What is computed again at equal n where methods differ in n."""
    return tuple(
        key
        for key, metric in catalogue(task).items()
        if _GROWS in metric.note or _BIASED in metric.note or key.startswith("study/entropy")
    )


def titled(task: Task, judges: Sequence[str], classifier: str | None) -> dict[str, Metric]:
    """The catalogue with an entry for each judge in place of "@"."""
    out: dict[str, Metric] = {}
    for key, metric in catalogue(task).items():
        if not key.endswith("@"):
            out[key] = metric
            continue
        names = ([classifier] if classifier else []) if key == "acceptable@" else judges
        for name in names:
            out[key + name] = Metric(f"{metric.title}, {name}", metric.unit, metric.tier, metric.better, metric.note)
    return out


def _headline(task: Task) -> dict[str, Metric]:
    return {
        "strict": Metric("strict success", "share", "headline", "higher"),
        "pairs/unique": Metric(f"unique {task.pair_noun}", "count", "headline", "higher", _GROWS),
        "pairs/effective": Metric(f"effective {task.pair_noun}", "count", "headline", "higher", _GROWS),
        "nll/median@": Metric("median NLL", "nats/token", "headline", "lower", _SHORT),
    }


def _named(task: Task) -> list[tuple[str, str]]:
    """(name, label) of each class."""
    return list(zip(task.lexicon.names, task.labels, strict=True))


def _diagnostics(task: Task) -> dict[str, Metric]:
    classes, several = _named(task), len(task.classes) > 1
    held_out = len(task.held_out)
    return {
        "both": Metric(task.all_classes, "share", "diagnostic", "higher"),
        "either": Metric("any term", "share", "diagnostic", "higher"),
        **{
            f"{name}_any": Metric(f"any {label} term", "share", "diagnostic", "higher")
            for name, label in classes if len(classes) > 2
        },
        **{
            f"{name}_only": Metric(f"{label} only", "share", "diagnostic", "lower")
            for name, label in classes if several
        },
        "neither": Metric("no term", "share", "diagnostic", "lower"),
        **({
            "strict/train": Metric("strict, occupations trained on", "share", "diagnostic", "higher"),
            "strict/heldout": Metric(
                f"strict, the {spelt(held_out)} hold-out occupation{'s' * (held_out > 1)}", "share", "diagnostic",
                "higher",
            ),
        } if held_out else {}),
        "in_length": Metric("length in bounds", "share", "diagnostic", "higher"),
        "complete": Metric("one complete sentence", "share", "diagnostic", "higher"),
        "words": Metric("words", "words", "diagnostic", "neither"),
        "reward": Metric("protocol reward", "reward", "diagnostic", "higher"),
        "terms": Metric("different terms per sentence", "terms", "diagnostic", "neither"),
        "stuffed": Metric("more than one term of a class", "share", "diagnostic", "lower"),
        "repeated": Metric("a term more than twice", "share", "diagnostic", "lower"),
        **_balance(classes),
    }  # fmt: skip


def _balance(classes: Sequence[tuple[str, str]]) -> dict[str, Metric]:
    """How evenly the classes are mentioned: of two classes one share says all; of one there is nothing to say."""
    count = len(classes)
    shares = {
        f"{name}_share": Metric(
            f"{label} share of mentions", "share", "diagnostic", "neither",
            f"{'0.5' if count == 2 else f'1/{count}'} is balance",
        )
        for name, label in (classes if count > 2 else classes[: count - 1])
    }  # fmt: skip
    if count == 2:
        (first, a), (second, b) = classes
        shares[f"{first}_per_{second}"] = Metric(f"{a} : {b}", "ratio", "diagnostic", "neither", "1 is balance")
    return shares


def _variety(task: Task) -> dict[str, Metric]:
    return {
        "unique_texts": Metric("different texts", "share", "diagnostic", "higher", _GROWS),
        "distinct/1": Metric("distinct-1", "share", "diagnostic", "higher", _GROWS),
        "distinct/2": Metric("distinct-2", "share", "diagnostic", "higher", _GROWS),
        "distinct/3": Metric("distinct-3", "share", "diagnostic", "higher", _GROWS),
        "self_bleu": Metric(
            "self-BLEU", "points", "diagnostic", "lower", "of one subsample of the same size everywhere"
        ),
        "masked/unique": Metric("different texts, terms masked", "share", "diagnostic", "higher", _GROWS),
        "masked/distinct_2": Metric("distinct-2, terms masked", "share", "diagnostic", "higher", _GROWS),
        **{
            f"jsd/uniform_{name}": Metric(f"JSD to uniform, {label}", "bits", "diagnostic", "lower", _BIASED)
            for name, label in _named(task)
        },
        "jsd/occupations": Metric("JSD between occupations", "bits", "diagnostic", "lower", _BIASED),
        "nll/token_weighted@": Metric("token-weighted NLL", "nats/token", "diagnostic", "lower", _SHORT),
        "acceptable@": Metric("acceptable", "share", "diagnostic", "higher", "a classifier's opinion"),
    }


def _study(task: Task) -> dict[str, Metric]:
    count = len(task.classes)
    every = {1: "the class", 2: "both"}.get(count, "all")
    mean = "; mean of the lists" if count == 1 else f"; mean of the {spelt(count)} lists"
    return {
        "study/both": Metric(f"{every} (study)", "share", "study", "higher", _STUDY + "; substring matcher"),
        "study/either": Metric("any (study)", "share", "study", "higher", _STUDY + "; substring matcher"),
        **{
            f"study/entropy_{name}": Metric(f"entropy, {label} (study)", "bits", "study", "higher", _STUDY)
            for name, label in _named(task)
        },
        "study/entropy": Metric("entropy (study)", "bits", "study", "higher", _STUDY + mean),
        "study/pairs": Metric(f"{task.pair_noun} (study)", "count", "study", "higher", _STUDY + "; " + _GROWS),
        "study/ppl@": Metric(
            "mean perplexity (study)", "ppl", "study", "lower", _STUDY + "; comparable under gpt2 only"
        ),
    }
