"""A table of what a file's sentences hold."""

from collections.abc import Mapping, Sequence

from equipoise.measures.variety import pair_counts
from equipoise.methods.completions import Key
from equipoise.protocol.reward import Reward
from equipoise.protocol.task import Task


def summary(texts: Mapping[Key, str], task: Task) -> str:
    """A table of what the sentences hold, one line for each occupation and one for all, with a legend."""
    in_length = f"{task.min_words}-{task.max_words} words %"
    titles = ("occupation", "n", "both %", "one %", "none %", in_length, "strict %", task.pair_noun, "words")
    widths = [13, 6, 8, 7, 8, 14, 10, 7, 7]
    widths[0] = max(widths[0], 1 + max(map(len, task.names)))
    widths = [max(width, 2 + len(title)) for width, title in zip(widths, titles, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return cells[0].ljust(widths[0]) + "".join(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))

    rewards = {key: task.score(text) for key, text in texts.items()}
    lines = [line(titles)]
    for occupation in task.names:
        own = [reward for key, reward in rewards.items() if key.occupation == occupation]
        if own:
            lines.append(line([occupation, *_cells(own, task)]))
    lines.append(line(["all", *_cells(list(rewards.values()), task)]))
    return "\n".join([*lines, *_legend(task)])


def _cells(rewards: Sequence[Reward], task: Task) -> list[str]:
    n = len(rewards)
    complete, some = sum(r.complete for r in rewards), sum(r.some for r in rewards)
    shares = [complete, some - complete, n - some]
    shares += [sum(task.in_length(r.words) for r in rewards), sum(task.strict(r.text) for r in rewards)]
    pairs = pair_counts(r.first for r in rewards)
    words = sum(r.words for r in rewards) / n
    return [str(n), *(f"{100 * share / n:.1f}" for share in shares), str(len(pairs)), f"{words:.1f}"]


def _legend(task: Task) -> list[str]:
    """What the columns mean."""
    classes, noun = len(task.classes), task.pair_noun
    listed = ", ".join(task.labels)
    if classes == 1:
        return [
            f"both: {task.all_classes} ({listed}); one: never; none: no term of it",
            f"strict: both, {task.bounds}, and one complete sentence; {noun}: different first terms of the sentences",
            "words: mean per sentence",
        ]
    lines = [
        f"strict: both, {task.bounds}, and one complete sentence; {noun}: different ({listed})",
        f"{noun} of a sentence's first terms; words: mean per sentence",
    ]
    return lines if classes == 2 else [f"both: {task.all_classes}; one: some of them; none: no class", *lines]
