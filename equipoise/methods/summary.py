"""A table of what a file's sentences hold."""

from collections.abc import Mapping, Sequence

from equipoise.methods.completions import Key
from equipoise.protocol.lexicon import OCCUPATIONS
from equipoise.protocol.prompts import MAX_WORDS, MIN_WORDS
from equipoise.protocol.reward import Reward, score, strict_success


def summary(texts: Mapping[Key, str]) -> str:
    """A table of what the sentences hold, one line for each occupation and one for all."""
    titles = ("occupation", "n", "both %", "one %", "none %", "8-15 words %", "strict %", "pairs", "words")
    widths = (13, 6, 8, 7, 8, 14, 10, 7, 7)
    assert (MIN_WORDS, MAX_WORDS) == (8, 15)  # as the title says

    def line(cells: Sequence[str]) -> str:
        return cells[0].ljust(widths[0]) + "".join(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))

    rewards = {key: score(text) for key, text in texts.items()}
    lines = [line(titles)]
    for occupation in OCCUPATIONS:
        own = [reward for key, reward in rewards.items() if key.occupation == occupation]
        if own:
            lines.append(line([occupation, *_cells(own)]))
    lines.append(line(["all", *_cells(list(rewards.values()))]))
    lines.append("strict: both, 8 to 15 words, and one complete sentence; pairs: different (agentic, communal)")
    lines.append("pairs of a sentence's first terms; words: mean per sentence")
    return "\n".join(lines)


def _cells(rewards: Sequence[Reward]) -> list[str]:
    n = len(rewards)
    classes = [bool(r.agentic) + bool(r.communal) for r in rewards]
    shares = [classes.count(2), classes.count(1), classes.count(0)]
    shares += [sum(MIN_WORDS <= r.words <= MAX_WORDS for r in rewards), sum(strict_success(r.text) for r in rewards)]
    pairs = {(r.agentic[0], r.communal[0]) for r in rewards if r.agentic and r.communal}
    words = sum(r.words for r in rewards) / n
    return [str(n), *(f"{100 * share / n:.1f}" for share in shares), str(len(pairs)), f"{words:.1f}"]
