"""Sampling a policy with random numbers of its own and measuring what comes: before, during and after training.

Nothing here draws from the run's generator, so that measuring more, less or not at all leaves the training as it is.
"""

import hashlib
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch

from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.measures.decomposition import Outcomes, Pair, PairRates, outcomes, read_rates, split
from equipoise.measures.variety import effective, pair_counts
from equipoise.policy.config import SamplingConfig
from equipoise.policy.likelihood import EVALUATION_ROWS, continuation_nll, kl_to_reference
from equipoise.policy.load import Policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import sentences_of
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import sample
from equipoise.protocol.task import Task
from equipoise.runs.ranks import ALONE, Ranks
from equipoise.runs.stage import Stage, unseen


class Drawn(NamedTuple):
    """B sentences, with their occupations and the rollouts (CPU, in parts) that they are the text of."""

    occupations: list[str]
    texts: list[str]
    rollouts: list[Rollout]
    log_ratios: tuple[float, ...] = ()
    """log π − log π_ref of each in nats, where it was measured."""


def draw_sentences(
    policy: Policy,
    task: Task,
    prompts: Mapping[str, Sequence[int]],
    sampling: SamplingConfig,
    count: int,
    name: str,
    rows: int,
    tick: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> Drawn:
    """`count` sentences over the occupations in turn, `rows` at a time, such batches being dealt out to the ranks.
    `name` decides the random numbers. `tick` is called before as many batches as there are ranks, with what is done and
    what there is to do, and may raise to end it.

    Raises NonFiniteLogits.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    uniform_BT = torch.rand(
        count, sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    occupations = list(itertools.islice(itertools.cycle(prompts), count))
    drawn = Drawn(occupations, [], [])

    def written(first: int) -> Rollout:
        part, numbers_BT = occupations[first : first + rows], uniform_BT[first : first + rows]
        # The last part is filled up: on a GPU every size has a decoder, with recordings and a cache, of its own.
        spare = rows - len(part)
        ids = [prompts[o] for o in (*part, *[part[0]] * spare)]
        numbers_BT = torch.cat([numbers_BT, numbers_BT[:1].expand(spare, -1)])
        return sample(policy, ids, sampling, uniform_BT=numbers_BT).cpu().select(torch.arange(len(part)))

    starts = range(0, count, rows)
    for place in range(0, len(starts), ranks.size):
        tick(starts[place], count)
        for rollout in ranks.deal(starts[place : place + ranks.size], written):
            done = len(drawn.texts)
            part = occupations[done : done + len(rollout)]
            drawn.texts.extend(sentences_of(policy.tokenizer, rollout, part, task))
            drawn.rollouts.append(rollout)
    return drawn


def measure(texts: Sequence[str], occupations: Sequence[str], task: Task) -> dict[str, float]:
    """Shares of the sentences (0–1), and how varied the compliant ones are; `n` sentences. `both` is every class, `one`
    some of them but not all."""
    rewards = [task.score(text) for text in texts]
    pairs = pair_counts(r.first for r in rewards)
    complete, some = sum(r.complete for r in rewards), sum(r.some for r in rewards)
    n = len(texts)
    share = 1 / max(1, n)
    return {
        "n": n,
        "reward": sum(r.reward for r in rewards) * share,
        "both": complete * share,
        "one": (some - complete) * share,
        "in_length": sum(task.in_length(r.words) for r in rewards) * share,
        "strict": sum(map(task.strict, texts)) * share,
        "pairs": len(pairs),
        "effective_pairs": effective(pairs),
        "unique": len(set(texts)) * share,
        "occupations": len(set(occupations)),
    }


def groups(drawn: Drawn, trained: Sequence[str], task: Task) -> dict[str, dict[str, float]]:
    """`measure` and `kl`, as of `evaluate`, of the occupations that were trained on and of those held out, for each of
    the two that is there."""
    out = {}
    for name, members in (("trained", set(trained)), ("held_out", set(task.held_out) - set(trained))):
        rows = [i for i, o in enumerate(drawn.occupations) if o in members]
        if rows:
            measured = measure([drawn.texts[i] for i in rows], [drawn.occupations[i] for i in rows], task)
            out[name] = {**measured, "kl": math.fsum(drawn.log_ratios[i] for i in rows) / len(rows)}
    return out


def evaluate(
    policy: Policy,
    task: Task,
    prompts: Mapping[str, Sequence[int]],
    sampling: SamplingConfig,
    count: int,
    name: str,
    rows: int,
    stage: Callable[[str], AbstractContextManager[Stage]] = unseen,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, float], Drawn]:
    """`measure` of fresh sentences, their KL to the reference and how many ended by themselves; and the sentences.
    `stage` shows how far either part is. Raises NonFiniteLogits."""
    with stage("sentences") as shown:
        drawn = draw_sentences(policy, task, prompts, sampling, count, name, rows, shown, ranks)
    with stage("KL to the reference") as shown:
        kl_B = RowLimit(EVALUATION_ROWS, lambda _: None).run(
            policy, lambda r: kl_to_reference(policy, drawn.rollouts, sampling, r, ranks, shown)
        )
    finished = torch.cat([rollout.finished_B for rollout in drawn.rollouts]).double().mean().item()
    found = {**measure(drawn.texts, drawn.occupations, task), "kl": kl_B.mean().item(), "finished": finished}
    return found, drawn._replace(log_ratios=tuple(kl_B.tolist()))


def spent(drawn: Drawn, task: Task, rates: PairRates | None) -> dict[str, float]:
    """`kl_compliance`, `kl_variety` and `kl_waste`, which `kl` is the sum of; nothing where the reference's pairs are
    not known, or are of other occupations than the sentences."""
    if rates is None or set(drawn.occupations) != set(task.names):
        return {}
    made = split(strict_outcomes(drawn, task), rates)
    return {"kl_compliance": made.compliance.value, "kl_variety": made.variety.value, "kl_waste": made.waste.value}


def read_pair_rates(path: str, task: Task) -> PairRates | None:
    """Of a costs file of Ctrl-G, or of the record beside its sentences; None without a path. Raises UserError, also for
    pairs that are not the task's: none of its own would be known."""
    if not path:
        return None
    try:
        document = read_json(Path(path).expanduser())
        found = document.get("pair_rates", document)
        if found.get("event", "strict").partition(",")[0] != "strict":
            raise ValueError(f"its event is {found['event']}, expected strict")
        read = read_rates(found)
        for pair in read.rates:
            of_classes = [term in each.terms for term, each in zip(pair, task.classes, strict=False)]
            if len(pair) != len(task.classes) or not all(of_classes):
                raise ValueError(f"it knows {' / '.join(pair)}, which are no terms of the task {task.name}")
        return read
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--pair-rates {path} cannot be used ({error}): give a costs file of Ctrl-G") from None


def strict_outcomes(drawn: Drawn, task: Task) -> dict[Pair | None, Outcomes]:
    """What the distance to the reference is split by: success with each pair, failure, and of either the log ratios."""
    pairs = [task.match(text).first if task.strict(text) else None for text in drawn.texts]
    return outcomes(zip(pairs, drawn.log_ratios, strict=True))


def fluency(policy: Policy, drawn: Drawn, task: Task, ranks: Ranks = ALONE) -> float | None:
    """Median of `continuation_nll`; None without a sentence that it is defined for, or where it is not finite."""
    values = RowLimit(EVALUATION_ROWS, lambda _: None).run(
        policy, lambda r: continuation_nll(policy, drawn.texts, drawn.occupations, task, r, ranks)
    )
    middle = statistics.median(values) if values else math.nan
    return middle if math.isfinite(middle) else None


# What the untrained model does
