"""How varied texts and terms are. Plain numbers; all of them depend on how many texts there are.

Effective numbers of plain counts are `measures.variety.effective`. The entropy here is of arrays: divergences between
all pairs of occupations, and the jackknife, which leaves each occupation out once, take thousands of them at a time.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU

from equipoise.protocol.lexicon import NO_CLASS, normalise
from equipoise.protocol.task import Task

Counts = NDArray[np.float64]


def entropy(counts: Counts) -> Counts:
    """Shannon entropy in bits along the last axis, (…, M) counts to (…); 0 where there is nothing."""
    total = counts.sum(-1, keepdims=True)
    shares = np.divide(counts, total, out=np.zeros_like(counts, dtype=float), where=total > 0)
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.asarray(-(shares * logs).sum(-1)) + 0.0  # without -0.0


def jensen_shannon(p: Counts, q: Counts) -> Counts:
    """Jensen–Shannon divergence in bits, 0 to 1, along the last axis of two arrays of shares (Lin 1991)."""
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0.0)


def to_uniform(counts: Counts) -> float | None:
    """Divergence of the distribution of `counts` to the uniform one, in bits. None for no counts."""
    total = counts.sum()
    if total == 0:
        return None
    return float(jensen_shannon(counts / total, np.full(len(counts), 1 / len(counts))))


def between(counts_OT: Counts) -> float | None:
    """Mean divergence over pairs of occupations, in bits. None for fewer than two that have counts."""
    kept = counts_OT[counts_OT.sum(1) > 0]
    if len(kept) < 2:
        return None
    shares = kept / kept.sum(1, keepdims=True)
    sums = [jensen_shannon(shares[i + 1 :], shares[i]).sum() for i in range(len(shares) - 1)]
    return float(sum(sums) / (len(shares) * (len(shares) - 1) / 2))


def words_of(text: str) -> list[str]:
    """What n-grams are made of: pieces between white space, in lower case, punctuation kept."""
    return text.lower().split()


def distinct(texts_of_words: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams / all n-grams, none of them across texts (Li et al. 2016, arXiv 1510.03055). None for none.

    Words are numbers below 2^24, so that an n-gram of up to three is one number.
    """
    grams: list[int] = []
    for words in texts_of_words:
        if n == 1:
            grams.extend(words)
        elif n == 2:
            grams.extend(a << 24 | b for a, b in pairwise(words))
        else:
            grams.extend(a << 48 | b << 24 | c for a, b, c in zip(words, words[1:], words[2:], strict=False))
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean over texts of BLEU-4 against all the others, 0 to 100 (Zhu et al. 2018, arXiv 1802.01886). None below two.

    sacrebleu's sentence BLEU with effective order. Every text is its own sample: two equal texts score 100.
    """
    texts = [text for text in texts if text.strip()]
    if len(texts) < 2:
        return None
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score for i, text in enumerate(texts)]
    return float(np.mean(scores))


_MARKS = ("<a>", "<c>", "<d>", "<e>")
"""What stands for a term of each class."""


class Mask:
    """Replaces the terms and the occupation, so that what is left is the template.

    Unlike `Task.mould` it tells the classes apart: their order is part of a template.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, text: str, occupation: str) -> str:
        """`text` in lower case with a mark of its class for each term and `<x>` for the occupation."""
        pieces = self.task.lexicon.pieces(text)
        masked = normalise("".join(text if kind == NO_CLASS else _MARKS[kind] for text, kind in pieces)).lower()
        form = re.escape(normalise(self.task.occupation(occupation).frame).lower())
        return re.sub(rf"(?<!\w){form}(?!\w)", "<x>", masked) if occupation else masked


def substrings(text: str, terms: Sequence[str]) -> tuple[bool, ...]:
    """The study's matcher, for its own tier only: whether each term is somewhere in the text, inside words too."""
    low = text.lower()
    return tuple(term.removesuffix("*").lower() in low for term in terms)
