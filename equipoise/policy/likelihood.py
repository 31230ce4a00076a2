"""Log-probabilities of texts and completions under the policy and its reference."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from equipoise.policy.config import SamplingConfig
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout, rollout_of
from equipoise.policy.score import nucleus_mass, score
from equipoise.protocol.task import Task
from equipoise.runs.ranks import ALONE, Ranks


@torch.no_grad()
def kl_to_reference(
    policy: Policy,
    rollouts: Sequence[Rollout],
    sampling: SamplingConfig,
    rows: int,
    ranks: Ranks = ALONE,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """(B,) log π − log π_ref of each completion, nats: k1 of KL(π‖π_ref). `rows` at a time, dealt out to the ranks.

    π is what the completions were sampled from: with a nucleus its probabilities are those within, which sum to 1.
    π_ref is the reference at the same temperature, all of it; temperature 0 is taken for 1. `tick` is called before
    each part with how many completions are done and how many there are."""
    temperature = sampling.temperature or 1.0

    parts = [part for rollout in rollouts for part in _parts(rollout, rows)]
    total, done = sum(map(len, parts)), 0

    def log_ratio(part: Rollout) -> Tensor:
        nonlocal done
        tick(min(done, total), total)
        done += len(part) * ranks.size  # as many on each, so about
        own, base = (_summed(policy, part, temperature, reference, _pays(len(parts))) for reference in (False, True))
        if sampling.temperature == 0 or sampling.top_p == 1:
            return own - base
        return own - base - _by_row(nucleus_mass(policy, part, sampling), part)

    return torch.cat(ranks.deal(parts, log_ratio))


def continuation_nll(
    policy: Policy, texts: Sequence[str], occupations: Sequence[str], task: Task, rows: int, ranks: Ranks = ALONE
) -> list[float]:
    """`text_nll` without the texts of which nothing follows the prefix."""
    return [nll for nll in text_nll(policy, texts, occupations, task, rows, ranks) if nll is not None]


@torch.no_grad()
def text_nll(
    policy: Policy,
    texts: Sequence[str],
    occupations: Sequence[str],
    task: Task,
    rows: int,
    ranks: Ranks = ALONE,
    *,
    repeated: bool = False,
) -> list[float | None]:
    """Negative log-likelihood under the reference model, nats per token, of what follows the task's prefix (such as
    `The X was`) in each text, `rows` texts at a time, dealt out to the ranks. None where nothing follows.

    The text stands alone, without chat template or instruction: how natural it is in itself, not how well it follows a
    prompt. `repeated`: as many texts will be scored time and again, so that a recorded graph pays.
    """
    prompts, completions, places = [], [], []
    starts = {o: list(policy.tokenizer(task.prefix(o))["input_ids"]) for o in set(occupations)}
    encoded = policy.tokenizer(list(texts))["input_ids"] if texts else []
    for place, (of_text, occupation) in enumerate(zip(encoded, occupations, strict=True)):
        ids, start = list(of_text), starts[occupation]
        # Where the text continues within the prefix's last token, that token belongs to what follows.
        shared = next(
            (i for i, (a, b) in enumerate(zip(ids, start, strict=False)) if a != b), min(len(ids), len(start))
        )
        if 0 < shared < len(ids):
            prompts.append(ids[:shared])
            completions.append(ids[shared:])
            places.append(place)
    found: list[float | None] = [None] * len(texts)
    if not completions:
        return found
    rollout = rollout_of(prompts, completions)
    parts = _parts(rollout, rows)
    recorded = repeated or _pays(len(parts))
    total_B = torch.cat(ranks.deal(parts, lambda part: _summed(policy, part, 1.0, True, recorded)))
    for place, nll in zip(places, (-total_B / rollout.lengths_B).tolist(), strict=True):
        found[place] = nll
    return found


@torch.no_grad()
def completion_logprobs(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    rows: int,
    ranks: Ranks = ALONE,
    nucleus: SamplingConfig | None = None,
) -> list[float]:
    """Log-probability under the policy of each completion (token ids) after its prompt, in nats, `rows` at a time,
    dealt out to the ranks.

    `nucleus`: how the completions were sampled, at temperature 1; the probabilities are then those within the nucleus.
    """
    sums = [0.0] * len(prompts)
    # Rows of one prompt together: a pack holds it once, and it may be three times as long as what is scored.
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    parts = [order[first : first + rows] for first in range(0, len(order), rows)]

    def summed(part: Sequence[int]) -> list[float]:
        rollout = rollout_of([prompts[i] for i in part], [completions[i] for i in part])
        # On a GPU a pack's shape would be recorded as a graph for a single use.
        packed = not policy.graphs.enabled
        flat = score(policy, rollout, 1.0, packed=packed, entropy=False).logprobs.double().cpu()
        if nucleus is not None:
            flat = flat - nucleus_mass(policy, rollout, nucleus).double().cpu()
        return [float(logprobs.sum()) for logprobs in flat.split(rollout.lengths_B.tolist())]

    for part, found in zip(parts, ranks.deal(parts, summed), strict=True):
        for i, total in zip(part, found, strict=True):
            sums[i] = total
    return sums


MANY_PARTS = 24
"""A graph of a shape is recorded in the time of some ten passes that are launched kernel by kernel."""


def _pays(parts: int) -> bool:
    return parts >= MANY_PARTS


def _parts(rollout: Rollout, rows: int) -> list[Rollout]:
    return [rollout.select(part) for part in torch.arange(len(rollout)).split(rows)]


def _summed(policy: Policy, rollout: Rollout, temperature: float, reference: bool, recorded: bool) -> Tensor:
    """(B,) log-probability of each completion, on the CPU."""
    scores = score(policy, rollout, temperature, packed=True, reference=reference, entropy=False, recorded=recorded)
    return _by_row(scores.logprobs, rollout)


def _by_row(values_N: Tensor, rollout: Rollout) -> Tensor:
    """(B,) sums over the tokens of each completion, on the CPU."""
    return torch.stack([part.sum() for part in values_N.double().cpu().split(rollout.lengths_B.tolist())])


EVALUATION_ROWS = 128  # completions scored at a time, at first
