"""How varied sentences are: pairs of terms, effective numbers, moulds and openings."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from equipoise.protocol.lexicon import LEXICON, Lexicon


def effective(counts: Counter[Any]) -> float:
    """2^H of the shares, H their entropy in bits: how many equally frequent values would be as varied. 0 for none."""
    total = sum(counts.values())
    if total == 0:
        return 0.0
    # Sorted, so that the sum does not depend on the order in which values were met.
    shares = sorted(n / total for n in counts.values() if n)
    return math.exp(-math.fsum(p * math.log(p) for p in shares))


def pair_counts(terms: Iterable[tuple[Sequence[str], Sequence[str]]]) -> Counter[tuple[str, str]]:
    """How often each (first agentic, first communal) pair occurs among the sentences that have both."""
    return Counter((agentic[0], communal[0]) for agentic, communal in terms if agentic and communal)


def masked(text: str, occupation: str, lexicon: Lexicon = LEXICON) -> str:
    """The sentence's mould: lower case, every term as "*", the occupation as "_"."""
    mould = lexicon.mark(text, ("\0", "\0"), ("\0", "\0"))
    mould = re.sub("\0[^\0]*\0", "*", mould).lower()
    return re.sub(rf"\b{re.escape(occupation.lower())}\b", "_", mould)


def opening(text: str, lexicon: Lexicon = LEXICON) -> str:
    """The first two words after `The X was`, lower case, terms masked, with a mark that no term has."""
    words = lexicon.mark(text, ("\0", "\0"), ("\0", "\0")).lower().split()[3:5]
    return "> " + " ".join("*" if "\0" in word else word for word in words)
