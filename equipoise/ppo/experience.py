"""What one step gathers for its update. B completions, T steps; (B, T) tensors are 0 outside the rollout's mask."""

from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.policy.rollout import Rollout
from equipoise.ppo import maths
from equipoise.protocol.reward import Reward


class Rewarded(NamedTuple):
    """The rewards of B sentences: the protocol's in parts, and what PPO maximises."""

    rewards: list[Reward]
    paid_B: Tensor
    """(B,) what PPO maximises before the KL penalty."""
    bonus_B: Tensor
    """(B,) the diversity bonus in it."""
    own: list[float] | None = None
    """The user's reward of each, where that stands in place of the protocol's."""


class Scored(NamedTuple):
    """(B, T) numbers of each completion token: of the policy as it sampled, and the reference's log-probability."""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor
    """0 where the policy has no value head."""
    reference: Tensor

    def kl_BT(self, rollout: Rollout) -> Tensor:
        """(B, T) log π − log π_ref: k1 of KL(π‖π_ref), nats."""
        return torch.where(rollout.mask_BT, maths.kl_k1(self.logprobs, self.reference), 0.0)


class Experience(NamedTuple):
    """A rollout with all that the update needs."""

    rollout: Rollout
    old_logp_BT: Tensor
    old_values_BT: Tensor | None
    """None where there is no value head; the returns likewise."""
    returns_BT: Tensor | None
    advantages_BT: Tensor
    """As the loss multiplies with them."""
    reference_BT: Tensor | None = None
    """log π_ref, where the KL to the reference is in the loss; else None."""
    kl_coef: float = 0.0
    """The weight of that KL."""
