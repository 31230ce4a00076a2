"""One PPO update: epochs over shuffled mini-batches, `target_kl` tested before every optimizer step.

Shapes as in `maths`: B completions, T steps, N real tokens laid flat.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.errors import UserError
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.policy.score import score
from equipoise.ppo import maths
from equipoise.ppo.optimizer import MasterAdam


@dataclass(frozen=True)
class PPOConfig:
    """The guide's numbers by default."""

    batch_size: int = 64
    """Completions sampled per PPO step."""
    mini_batch_size: int = 16
    """Completions per optimizer step."""
    micro_batch_size: int = 16
    """Completions per forward and backward pass. Smaller saves memory and changes nothing else."""
    ppo_epochs: int = 4
    learning_rate: float = 1e-5
    value_learning_rate: float = 1e-3
    """Of the value head, one linear layer that starts at zero."""
    warmup_steps: int = 20
    """PPO steps over which the learning rate rises from 1/warmup. Adam's first steps are sign steps: without a warm-up
    the first alone was measured to move the policy by 0.1–0.7 nats per token."""
    target_kl: float = 0.03
    """KL(π_old‖π_θ) per token at which the update of a PPO step ends. Not the distance to the reference model."""
    kl_coef: float = 0.05
    """β: price of one nat of KL(π‖π_ref), in units of reward."""
    ref_kl_target: float | None = None
    """KL(π‖π_ref) in nats per sentence that β is steered towards; None keeps β. It cannot be near 0 when the goal is met."""
    kl_horizon: int = 10_000
    """Completions over which the steering acts."""
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2
    """Probability ratios beyond 1 ± clip earn nothing more."""
    value_clip: float = 0.2
    """Values may move this far, in units of reward, from their old ones in one PPO step."""
    entropy_coef: float = 0.0
    max_grad_norm: float = 1.0
    adam_eps: float = 1e-5
    """1e-5 as in OpenAI's PPO; it softens the first steps."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "mini_batch_size", "micro_batch_size", "ppo_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.batch_size % self.mini_batch_size:
            raise UserError(
                f"batch-size {self.batch_size} is not a multiple of mini-batch-size {self.mini_batch_size}: "
                "every optimizer step must see equally many completions"
            )
        if self.target_kl <= 0 or self.learning_rate <= 0:
            raise UserError(f"target-kl {self.target_kl} and learning-rate {self.learning_rate} must be above 0")


class Experience(NamedTuple):
    """A rollout with all that the update needs; (B, T) tensors, 0 outside the mask."""

    rollout: Rollout
    old_logp_BT: Tensor
    old_values_BT: Tensor
    returns_BT: Tensor
    advantages_BT: Tensor
    """Whitened over the whole batch."""


class UpdateStats(NamedTuple):
    update_kl: float
    updates: int
    early_stop: bool
    ratio_max: float
    clip_fraction: float
    policy_loss: float
    value_loss: float
    grad_norm: float
    nonfinite: str | None
    """What was not finite, where something was; the parameters are as they were before that optimizer step."""


def mini_batches(config: PPOConfig, generator: torch.Generator) -> list[Tensor]:
    """Row numbers of every optimizer step of one PPO step: each epoch visits all rows once, in an order of its own."""
    orders = [torch.randperm(config.batch_size, generator=generator) for _ in range(config.ppo_epochs)]
    return [rows for order in orders for rows in order.split(config.mini_batch_size)]


def update(
    policy: Policy,
    optimizer: MasterAdam,
    experience: Experience,
    batches: list[Tensor],
    config: PPOConfig,
    temperature: float,
    *,
    packed: bool,
) -> UpdateStats:
    """Take up to len(batches) optimizer steps. Stops, before stepping, at the first mini-batch whose KL exceeds target_kl,
    and at anything non-finite."""
    seen: list[dict[str, float]] = []
    update_kl, taken, early_stop, nonfinite = 0.0, 0, False, None
    for rows in batches:
        stats = _accumulate_gradients(policy, optimizer, experience, rows, config, temperature, packed=packed)
        if not all(map(_finite, stats.values())):
            nonfinite = next(f"{name} is {value}" for name, value in stats.items() if not _finite(value))
            break
        update_kl = max(update_kl, stats["kl"])
        if stats["kl"] > config.target_kl:
            early_stop = True
            break
        grad_norm = optimizer.step(config.max_grad_norm)
        if not _finite(grad_norm):
            nonfinite = f"gradient norm is {grad_norm}"
            break
        taken += 1
        seen.append({**stats, "grad_norm": grad_norm})
    optimizer.zero_grad()

    def mean(key: str) -> float:
        return sum(s[key] for s in seen) / len(seen) if seen else 0.0

    return UpdateStats(
        update_kl=update_kl,
        updates=taken,
        early_stop=early_stop,
        ratio_max=max((s["ratio_max"] for s in seen), default=1.0),
        clip_fraction=mean("clip_fraction"),
        policy_loss=mean("policy_loss"),
        value_loss=mean("value_loss"),
        grad_norm=mean("grad_norm"),
        nonfinite=nonfinite,
    )


def _accumulate_gradients(
    policy: Policy,
    optimizer: MasterAdam,
    experience: Experience,
    rows: Tensor,
    config: PPOConfig,
    temperature: float,
    *,
    packed: bool,
) -> dict[str, float]:
    """Forward and backward over one mini-batch. Every term is divided by the mini-batch's tokens, whatever the micro-batch."""
    mask_BT = experience.rollout.mask_BT
    tokens = int(mask_BT[rows].sum())
    sums = dict.fromkeys(("policy_loss", "value_loss", "kl", "clip_fraction"), 0.0)
    ratio_max = 0.0
    for micro in rows.split(config.micro_batch_size):
        part = experience.rollout.select(micro)
        mask = mask_BT[micro]
        old_logp, old_values, returns, advantages = (
            x[micro][mask].to(policy.device)
            for x in (experience.old_logp_BT, experience.old_values_BT, experience.returns_BT, experience.advantages_BT)
        )
        new = score(policy, part, temperature, packed=packed, entropy=config.entropy_coef != 0)
        surrogate = maths.policy_loss(new.logprobs, old_logp, advantages, config.clip)
        value_loss = maths.value_loss(new.values, old_values, returns, config.value_clip)
        # The value head has a learning rate of its own and shares no weights, so its loss needs no coefficient.
        loss = (surrogate.loss + value_loss - config.entropy_coef * new.entropies.sum()) / tokens
        loss.backward()
        optimizer.accumulate()
        sums["policy_loss"] += float(surrogate.loss.detach()) / tokens
        sums["value_loss"] += float(value_loss.detach()) / tokens
        sums["kl"] += float(maths.kl_k3(old_logp, new.logprobs.detach()).sum()) / tokens
        sums["clip_fraction"] += float(surrogate.clipped.sum()) / tokens
        ratio_max = max(ratio_max, float(surrogate.log_ratio.abs().max().exp()))
    return {**sums, "ratio_max": ratio_max}


def _finite(x: float) -> bool:
    return x == x and abs(x) != float("inf")
