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
    exact: Tensor
    """KL of the next token's distribution to the reference's, nats; 0 where --kl-in reward has no need of it."""
    reference: Tensor

    def kl_BT(self, rollout: Rollout) -> Tensor:
        """(B, T) log π − log π_ref: k1 of KL(π‖π_ref), nats."""
        return torch.where(rollout.mask_BT, maths.kl_k1(self.logprobs, self.reference), 0.0)

    def charged_BT(self, rollout: Rollout, kl_in: str) -> Tensor:
        """(B, T) nats that the reward of each token is charged for: k1 of the token itself; with `both` the exact KL of
        the next place, which the token leads to; with `loss` nothing."""
        if kl_in == "reward":
            return self.kl_BT(rollout)
        charged_BT = torch.zeros_like(self.exact)
        if kl_in == "both":
            charged_BT[:, :-1] = torch.where(rollout.mask_BT, self.exact, 0.0)[:, 1:]
        return charged_BT


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
    exact_price: float | None = None
    """Price of a nat of the exact KL to the reference, in units of the advantages as they are used, where it is in the
    loss; else None."""
