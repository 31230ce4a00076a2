"""The closing summary of a run: printed, and written as `summary.json` beside the model."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equipoise.documents import parse_json
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task
from equipoise.runs.files import complete_lines, content

SUMMARY = "summary.json"
FINAL = "final_sentences.jsonl"
"""The sentences that the closing summary measures."""
UNTRAINED = "untrained_sentences.jsonl"
"""A few of the untrained model, to be shown beside them."""
NEEDED = ("step", "reward/mean", "compliance/both")
"""What a row of metrics.jsonl is not read without."""
LAST = 20  # steps, at most, over which the final reward is averaged
GOOD, GOOD_STEPS = 0.9, 10  # the reward that counts as learnt, as a mean of so many steps


def read_rows(output: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` that have the numbers of a step; none where there is no such file."""
    return [row for row in objects(output / "metrics.jsonl") if all(_finite(row.get(key)) for key in NEEDED)]


def alerts(output: Path) -> dict[str, int]:
    """How often each alert was raised, by name."""
    events = objects(output / "events.jsonl")
    return dict(Counter(str(event.get("name")) for event in events if event.get("kind") == "alert"))


def left_out_warm_start(output: Path) -> bool:
    """Whether a warm start that was wanted found too few sentences to be made."""
    return any(event.get("kind") == "no_warm_start" for event in objects(output / "events.jsonl"))


def sentences(path: Path) -> list[tuple[str, str]]:
    """(occupation, text) of each line of such a file; none where there is no file."""
    found = ((row.get("occupation"), row.get("text")) for row in objects(path))
    return [(o, text) for o, text in found if isinstance(o, str) and isinstance(text, str)]


def objects(path: Path) -> list[dict[str, Any]]:
    """The objects among the lines of a file; a damaged line must not keep a run that is finished from its model."""
    found = []
    for line in complete_lines(content(path)):
        try:
            document = parse_json(line)
        except ValueError:
            continue
        if isinstance(document, dict):
            found.append(document)
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def first_good_step(rewards: Sequence[float], steps: Sequence[int]) -> int | None:
    """The first step at which the mean of the last `GOOD_STEPS` rewards reached `GOOD`; None if none did."""
    for i in range(GOOD_STEPS, len(rewards) + 1):
        # A hair below counts: ten times 0.9 does not sum up to 9 exactly.
        if sum(rewards[i - GOOD_STEPS : i]) / GOOD_STEPS >= GOOD - 1e-9:
            return steps[i - 1]
    return None


def training_summary(rows: Sequence[Mapping[str, Any]], exported_step: int) -> dict[str, Any]:
    """What the rows of a run say of it; the distances are those at the step that was exported,
    over the sentences just before it where the base's rates are known, else over its batch."""
    if not rows:
        return {"reward_first": None, "reward_last": None, "good_step": None, "train_seconds": 0.0}
    # A reward of the user's own is the reward of its run; what counts as learnt by it, no one here can know.
    own = all("reward/function" in row for row in rows)
    rewards = [row["reward/function" if own else "reward/mean"] for row in rows]
    last = rows[-LAST:]
    at = max((r for r in rows if r["step"] <= exported_step), key=lambda r: int(r["step"]), default=rows[0])
    return {
        "reward_first": rewards[0],
        "reward_last": sum(rewards[-LAST:]) / len(last),
        "last_steps": len(last),
        "good_step": None if own else first_good_step(rewards, [row["step"] for row in rows]),
        "both_last": sum(row["compliance/both"] for row in last) / len(last),
        "kl_ref": _distance(at),
        "kl_bound": at.get("kl/bound"),
        "kl_excess": at.get("kl/excess"),
        "kl_excess_strict": at.get("kl/excess_strict"),
        "train_seconds": sum(row.get("time/step", 0.0) + row.get("time/save", 0.0) for row in rows),
    }


def _distance(row: Mapping[str, Any]) -> float | None:
    """None where it was not finite."""
    parts = [row.get("kl/bound"), row.get("kl/excess")] if "kl/bound" in row else [row.get("kl/ref")]
    return sum(parts) if all(map(_finite, parts)) else None  # type: ignore[arg-type]


def describe(summary: Mapping[str, Any], task: Task) -> list[tuple[str, str]]:
    """The summary for a person: what a line is about, and the line. `task` is what was trained on."""

    def number(value: Any, form: str = "{:z.2f}") -> str:
        return "?" if value is None else form.format(value)

    lines = []
    if summary["reward_first"] is not None:
        good, function = summary["good_step"], summary.get("reward_fn")
        missed = "not reached" if summary["steps"] >= GOOD_STEPS else "needs more steps"
        learnt = f"{GOOD} as a mean of {GOOD_STEPS} steps " + (f"was reached at step {good}" if good else missed)
        text = f"{number(summary['reward_first'])} at first, {number(summary['reward_last'])} over the last "
        text += plural(summary["last_steps"], "step", one="")
        lines.append(("reward", f"{text}, by {function}" if function else f"{text}; {learnt}"))
    final = summary.get("final")
    if final:
        lines.append(("sentences", _measured(final, task)))
        lines += [(name.replace("_", " "), _of_group(part, task)) for name, part in summary.get("groups", {}).items()]
        own = (summary.get("base") or {}).get("nll")
        lines.append(
            ("fluency", "not known: no sentence has a finite likelihood under the untrained model")
            if final["nll"] is None
            else (
                "fluency",
                f"{number(final['nll'])} nats per token under the untrained model"
                + (f" (its own sentences: {number(own)})" if own is not None else ""),
            )
        )
    elif summary.get("evaluation"):
        lines.append(("sentences", _measured(summary["evaluation"], task)))
    lines += _distances(summary, task)
    raised = ", ".join(f"{name} ×{n}" for name, n in summary["alerts"].items())
    lines.append(("alerts", raised or "none"))
    lines.append(("exported", f"step {summary['exported_step']}: {summary['exported_because']}"))
    return lines


def _distances(summary: Mapping[str, Any], task: Task) -> list[tuple[str, str]]:
    """The KL to the reference: that of the batches trained on, where the least that their compliance needs is known
    (both as sampled in training), else that of the closing sentences, where there are any."""
    at, kl, bound = summary["exported_step"], summary.get("kl_ref"), summary.get("kl_bound")
    final = (summary.get("final") or {}).get("kl")
    if kl is not None and bound is not None:
        where = f"in the last batches up to step {at} (bound {bound:z.2f} for their share of {task.all_classes})"
    elif final is not None:
        kl, where = final, f"in these sentences ({summary['generation']})"
    elif kl is not None:
        where = f"in the batch of step {at}"
    else:
        return []
    return [("distance", f"{kl:z.2f} nats per sentence from the reference model, {where}")]


def _of_group(measured: Mapping[str, float], task: Task) -> str:
    kl = measured.get("kl")  # not measured before
    return _measured(measured, task) + ("" if kl is None else f"; {kl:z.2f} nats from the reference model")


def _measured(measured: Mapping[str, float], task: Task) -> str:
    noun = task.pair_noun
    return (
        f"{task.all_classes} in {100 * measured['both']:.1f} % of {measured['n']:.0f}, strict success in "
        f"{100 * measured['strict']:.1f} %; {plural(measured['pairs'], noun.removesuffix('s'))} "
        f"({measured['effective_pairs']:.1f} effective); {100 * measured['unique']:.1f} % different"
    )
