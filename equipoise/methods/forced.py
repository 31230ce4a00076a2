"""Sentences for supervised fine-tuning that the model writes itself: each begins with a pair of terms, put there.

The collector is PPO's warm start's. All pairs come equally often, and the model goes on in its own words.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from equipoise.errors import NonFiniteError, UserError
from equipoise.learning.collect import said, search
from equipoise.learning.search import BATCH, Search
from equipoise.learning.supervised import Row
from equipoise.methods.completions import COLUMNS, serialise
from equipoise.policy.config import SamplingConfig
from equipoise.policy.load import Policy
from equipoise.policy.sample import NonFiniteLogits
from equipoise.protocol.lexicon import OCCUPATIONS
from equipoise.protocol.prompts import word_count
from equipoise.protocol.task import PROTOCOL

LABEL = "Forced-Pairs"
ROWS = 128  # drawn at a time, at least


class Forced(NamedTuple):
    rows: list[Row]
    """In the order of OCCUPATIONS."""
    drawn: int
    """Samples that they took."""
    seconds: float


def forced_sentences(
    policy: Policy,
    prompts: dict[str, list[int]],
    *,
    sentences: int,
    candidates: int,
    budget: int,
    seed: int,
    say: Callable[[str], None],
) -> Forced:
    """Strictly successful sentences of the policy as it is, each once. `prompts` maps occupations to token ids.

    `seed` decides them on a device. Raises UserError where the budget ends with fewer than `BATCH`, and
    NonFiniteError.
    """
    if sentences < BATCH:
        raise UserError(f"--sentences {sentences} must be at least {BATCH} with --data forced; 750 is the default")
    say(f"collecting {sentences:,} sentences that begin with a term of each class, of at most {budget:,} samples")
    began = time.perf_counter()
    how = Search(forced=True, sentences=sentences, candidates=candidates, budget=budget)
    generator = torch.Generator().manual_seed(seed)
    try:
        collected = search(policy, how, PROTOCOL, prompts, SamplingConfig(), generator, ROWS, said(say))
    except NonFiniteLogits as error:
        raise NonFiniteError(f"{error}: try --dtype float32, or another model") from None
    # What was recorded to sample with reads the weights where an optimizer will no longer leave them.
    policy.forget_recordings()
    found = len(collected.examples)
    if found < BATCH:
        raise UserError(
            f"{collected.drawn:,} samples that began with a term of each class gave {found} sentences, and at least "
            f"{BATCH} are needed: raise --budget, or give a completions file with --data"
        )
    if found < sentences:
        say(f"the budget ended with {found:,} of {sentences:,} sentences: learning from those")
    of_model = sorted(collected.examples, key=lambda example: OCCUPATIONS.index(example.occupation))
    rows = [Row(example.occupation, example.text) for example in of_model]
    return Forced(rows, collected.drawn, time.perf_counter() - began)


def as_completions(rows: list[Row], model: str) -> str:
    """The rows, in the order of OCCUPATIONS, as a completions file."""
    counts = dict.fromkeys(OCCUPATIONS, 0)
    lines: list[tuple[object, ...]] = [COLUMNS]
    for row in rows:
        counts[row.occupation] += 1
        lines.append((model, row.occupation, counts[row.occupation], row.text, word_count(row.text), LABEL))
    return serialise(lines).decode()
