"""What to look for when sentences to learn from are collected. Needs no torch, as options do not."""

from dataclasses import dataclass
from typing import Literal

BATCH = 16
"""Sentences of one optimizer step unless said otherwise, and the fewest worth learning from."""


@dataclass(frozen=True)
class Search:
    """How sentences are found, how many, and which of them are kept."""

    forced: bool
    """Begin each with terms that are put there; else only free samples that happen to comply."""
    sentences: int
    candidates: int = 1
    """Sentences to find for each that is kept."""
    keep: Literal["likeliest", "conditional", "even"] = "likeliest"
    budget: int = 20_000
    """Samples drawn at most."""
