"""From rewards to advantages, by each algorithm. B completions, T steps; (B, T) tensors are 0 outside the mask."""

from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.policy.rollout import Rollout
from equipoise.ppo import maths
from equipoise.ppo.config import PPOConfig
from equipoise.ppo.experience import Experience, Scored


class Estimated(NamedTuple):
    """(B, T) each."""

    raw_BT: Tensor
    """In units of reward."""
    used_BT: Tensor
    """What the loss multiplies with: raw, or brought to a spread of one."""
    returns_BT: Tensor | None = None
    """What the value head should have predicted, where there is one."""


def estimate(config: PPOConfig, paid_B: Tensor, scored: Scored, rollout: Rollout, kl_coef: float) -> Estimated:
    """The advantages of a batch whose sentences were paid (B,) `paid_B`; `kl_coef` is the price of KL(π‖π_ref).

    ppo: the KL penalty on every token, the reward on the last, GAE against the value head, whitened over the batch.
    reinforce++: the same rewards, discounted sums without any baseline, whitened over the batch (Hu 2025, arXiv
    2501.03262). rloo: reward minus the completion's KL penalty, then minus the mean of the group's others
    (Ahmadian et al. 2024). grpo: the reward, normalised within the group (Shao et al. 2024); its KL is in the loss.
    """
    mask_BT, kl_BT = rollout.mask_BT, scored.kl_BT(rollout)

    def spread(x_B: Tensor) -> Tensor:
        return torch.where(mask_BT, x_B.to(kl_BT.dtype)[:, None], 0.0)

    if config.algorithm == "grpo":
        relative = maths.group_relative(paid_B.double(), config.group_size)
        return Estimated(*map(spread, relative))
    if config.algorithm == "rloo":
        net_B = paid_B.double() - kl_coef * kl_BT.double().sum(1)
        advantages_BT = spread(maths.leave_one_out(net_B, config.group_size))
        return Estimated(advantages_BT, advantages_BT)
    rewards_BT = maths.token_rewards(paid_B, scored.charged_BT(rollout, config.kl_in), mask_BT, kl_coef)
    if config.algorithm == "reinforce++":
        # A sum of what is still to come is the advantage over values of 0 at λ = 1.
        sums = maths.gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, config.gamma, 1.0)
        return Estimated(sums.advantages, maths.whiten(sums.advantages, mask_BT))
    found = maths.gae(rewards_BT, scored.values, mask_BT, config.gamma, config.gae_lambda)
    return Estimated(found.advantages, maths.whiten(found.advantages, mask_BT), found.returns)


def experience_of(
    config: PPOConfig, rollout: Rollout, scored: Scored, advantages: Estimated, kl_coef: float
) -> Experience:
    """What the update needs of the batch, and nothing that its algorithm does not use."""
    method = config.method
    return Experience(
        rollout,
        scored.logprobs,
        scored.values if method.value_head else None,
        advantages.returns_BT,
        advantages.used_BT,
        scored.reference if method.kl_in_loss else None,
        kl_coef if method.kl_in_loss else 0.0,
        # In proportion to the advantages, which are whitened.
        None if config.kl_in == "reward" else kl_coef * maths.scale(advantages.raw_BT, rollout.mask_BT).item(),
    )
