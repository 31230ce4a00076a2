"""Log-probabilities of texts and completions under the policy and its reference."""

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.policy.score import pack, score_pack
from equipoise.protocol.task import Task


@torch.no_grad()
def kl_to_reference(policy: Policy, rollouts: Sequence[Rollout], temperature: float, rows: int) -> Tensor:
    """(B,) log π − log π_ref of each completion, nats: k1 of KL(π‖π_ref)."""
    return torch.cat(
        [
            _summed(policy, part, temperature, False) - _summed(policy, part, temperature, True)
            for rollout in rollouts
            for part in _parts(rollout, rows)
        ]
    )


@torch.no_grad()
def continuation_nll(
    policy: Policy, texts: Sequence[str], occupations: Sequence[str], task: Task, rows: int
) -> list[float]:
    """Negative log-likelihood under the reference model, nats per token, of what follows the task's prefix (such as
    `The X was`) in each text, `rows` texts at a time.

    The text stands alone, without chat template or instruction: how natural it is in itself, not how well it follows a
    prompt. Texts of which nothing follows are left out.
    """
    prompts, completions = [], []
    for text, occupation in zip(texts, occupations, strict=True):
        ids = list(policy.tokenizer(text)["input_ids"])
        start = list(policy.tokenizer(task.prefix(occupation))["input_ids"])
        # Where the text continues within the prefix's last token, that token belongs to what follows.
        shared = next(
            (i for i, (a, b) in enumerate(zip(ids, start, strict=False)) if a != b), min(len(ids), len(start))
        )
        if 0 < shared < len(ids):
            prompts.append(ids[:shared])
            completions.append(ids[shared:])
    if not completions:
        return []
    width = max(map(len, completions))
    tokens_BT = torch.tensor([c + [0] * (width - len(c)) for c in completions])
    lengths_B = torch.tensor([len(c) for c in completions])
    rollout = Rollout(prompts, tokens_BT, lengths_B, torch.ones(len(prompts), dtype=torch.bool))
    total_B = torch.cat([_summed(policy, part, 1.0, True) for part in _parts(rollout, rows)])
    return (-total_B / lengths_B).tolist()


def _parts(rollout: Rollout, rows: int) -> list[Rollout]:
    return [rollout.select(part) for part in torch.arange(len(rollout)).split(rows)]


def _summed(policy: Policy, rollout: Rollout, temperature: float, reference: bool) -> Tensor:
    """(B,) log-probability of each completion, on the CPU. Not recorded: such a batch is seen once."""
    lengths = rollout.lengths_B.tolist()
    logprobs_N = score_pack(policy, pack(policy, rollout), temperature, reference=reference, entropy=False).logprobs
    real_N = logprobs_N[: sum(lengths)].double().cpu()
    return torch.stack([part.sum() for part in real_N.split(lengths)])


EVALUATION_ROWS = 128  # completions scored at a time, at first
