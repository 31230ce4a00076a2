"""Sentences for supervised fine-tuning that the model writes itself.

Where the task has openings, each sentence begins with a term of each class, put there; all combinations come equally
often, and the model goes on in its own words. Where it has none, the model's free samples that comply are taken. The
collector is PPO's warm start's.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from equipoise.errors import NonFiniteError, UserError
from equipoise.learning.collect import said, search
from equipoise.learning.search import BATCH, Search
from equipoise.learning.supervised import Row
from equipoise.methods.completions import COLUMNS
from equipoise.policy.config import SamplingConfig
from equipoise.policy.load import Policy
from equipoise.policy.sample import NonFiniteLogits
from equipoise.protocol.plural import plural
from equipoise.protocol.prompts import word_count
from equipoise.protocol.task import Task
from equipoise.runs.ranks import ALONE, Ranks
from equipoise.runs.rows import serialise

LABELS = {True: "Forced-Pairs", False: "Own-Samples"}
"""The column Label of sentences that begin with terms which were put there, and of free ones."""
ROWS = 128  # drawn at a time, at least


class Found(NamedTuple):
    rows: list[Row]
    """In the task's order of occupations."""
    forced: bool
    """Whether terms were put there."""
    drawn: int
    """Samples that they took."""
    seconds: float


def own_sentences(
    policy: Policy,
    task: Task,
    prompts: dict[str, list[int]],
    wanted: Search,
    seed: int,
    say: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> Found:
    """Strictly successful sentences of the policy as it is, each once, drawn by all ranks. `prompts` maps occupations
    to token ids.

    `seed` decides them on a device. Raises UserError where `wanted` asks for fewer than `BATCH` or the budget ends with
    fewer, and NonFiniteError.
    """
    if wanted.sentences < BATCH:
        raise UserError(f"--sentences {wanted.sentences} must be at least {BATCH} with --data forced")
    which = "begin with a term of each class" if wanted.forced else "comply by themselves"
    say(f"collecting {plural(wanted.sentences, 'sentence')} that {which}, of at most {wanted.budget:,} samples")
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    try:
        collected = search(policy, wanted, task, prompts, SamplingConfig(), generator, ROWS, said(say), ranks)
    except NonFiniteLogits as error:
        raise NonFiniteError(f"{error}: try --dtype float32, or another model") from None
    # What was recorded to sample with reads the weights where an optimizer will no longer leave them.
    policy.forget_recordings()
    found = len(collected.examples)
    if found < BATCH:
        drawn = f"{plural(collected.drawn, 'sample')}" + (
            " that began with a term of each class" if wanted.forced else ""
        )
        more = "use another model" if wanted.forced else "give the task openings"
        raise UserError(
            f"{drawn} gave {plural(found, 'sentence')}, and at least {BATCH} are needed: raise --budget, {more}, or "
            "give a completions file with --data"
        )
    if found < wanted.sentences:
        ended = "the budget" if collected.drawn >= wanted.budget else "the search, which finds too few to go on,"
        say(f"{ended} ended with {found:,} of {wanted.sentences:,} sentences: learning from those")
    place = {occupation: i for i, occupation in enumerate(task.names)}
    of_model = sorted(collected.examples, key=lambda example: place[example.occupation])
    rows = [Row(example.occupation, example.text) for example in of_model]
    return Found(rows, wanted.forced, collected.drawn, time.perf_counter() - began)


def as_completions(rows: Sequence[Row], model: str, label: str) -> str:
    """The rows as a completions file."""
    counts: dict[str, int] = {}
    lines: list[tuple[object, ...]] = [COLUMNS]
    for row in rows:
        counts[row.occupation] = counts.get(row.occupation, 0) + 1
        lines.append((model, row.occupation, counts[row.occupation], row.text, word_count(row.text), label))
    return serialise(lines).decode()
