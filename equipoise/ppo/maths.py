"""PPO as pure tensor functions: no model, no configuration, no state.

Shapes: B sequences of a batch, T time steps (completion tokens), N real completion tokens of a batch laid flat.
Everything is computed in float32; a mask is True where a token is real. Lengths, never pad ids, decide what is real.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Beyond e**20 a probability ratio says only "the policy has left"; the clamp keeps its exponential finite.
MAX_LOG_RATIO = 20.0


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is True; 0 when nothing is."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def scale(x: Tensor, mask: Tensor) -> Tensor:
    """1 / std of `x` over the True entries: what `whiten` multiplies by, and with it anything that is to keep its
    proportion to what was whitened."""
    return torch.rsqrt(masked_mean((x - masked_mean(x, mask)) ** 2, mask) + 1e-8)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x − mean) / std over the True entries, 0 elsewhere. The standard deviation is the population one.

    One call covers the whole batch (all its mini-batches): whitening each mini-batch by itself would make a sample's
    advantage depend on which others it happens to be drawn with.
    """
    return torch.where(mask, (x - masked_mean(x, mask)) * scale(x, mask), 0.0)


def kl_k1(logp: Tensor, logq: Tensor) -> Tensor:
    """Schulman's k1 for KL(p‖q), elementwise on samples of p: unbiased, of either sign (joschu.net/blog/kl-approx)."""
    return logp - logq


def kl_k3(logp: Tensor, logq: Tensor) -> Tensor:
    """Schulman's k3 for KL(p‖q), elementwise on samples of p: r − 1 − log r with r = q/p; unbiased, never negative."""
    log_r = (logq - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_r) - log_r


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """(B, T) rewards: −β·KL on every real token, and the sequence's score on its last real token.

    Raises ValueError when a sequence has no token: there would be nothing to pay the score to.
    """
    lengths_B = mask_BT.sum(1)
    if bool((lengths_B == 0).any()):
        raise ValueError("every sequence needs at least one completion token (the stop token counts)")
    rewards_BT = torch.where(mask_BT, -kl_coef * kl_BT, 0.0)
    last_B1 = (lengths_B - 1)[:, None]
    return rewards_BT.scatter_add(1, last_B1, scores_B[:, None].to(rewards_BT.dtype))


class Advantages(NamedTuple):
    """Both (B, T) and 0 outside the mask; `returns` is what the value head should have predicted."""

    advantages: Tensor
    returns: Tensor


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation, Schulman et al. 2016 (arXiv 1506.02438) eq. 16.

    A_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γ V_{t+1} − V_t. The value after the last real token is 0: a completion
    ends there whether by a stop token or by the token limit, since the score is paid in either case.
    """
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    rewards_BT = torch.where(mask_BT, rewards_BT, 0.0)
    advantages_BT = torch.zeros_like(values_BT)
    running_B = torch.zeros_like(values_BT[:, 0])
    next_value_B = torch.zeros_like(running_B)
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        running_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * running_B, 0.0)
        advantages_BT[:, t] = running_B
        next_value_B = values_BT[:, t]
    return Advantages(advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, 0.0))


class Relative(NamedTuple):
    """Both (B,): the reward less its group's mean, and that divided by the group's spread."""

    centred: Tensor
    divided: Tensor


def group_relative(rewards_B: Tensor, group: int) -> Relative:
    """GRPO's outcome advantage, Shao et al. 2024 (arXiv 2402.03300) § 4.1.2: (r − mean) / (std + 1e-4) over the
    sentence's group; a group is a run of `group` rows.

    The standard deviation has n − 1, as in TRL and verl; TRL's 1e-4 (GRPOTrainer) is here too. A group of equal rewards
    teaches nothing: its advantages are exactly 0.
    """
    grouped = rewards_B.view(-1, group)
    centred = torch.where(_differ(grouped), grouped - grouped.mean(1, keepdim=True), 0.0)
    divided = centred / (grouped.std(1, keepdim=True) + 1e-4)
    return Relative(centred.flatten(), divided.flatten())


def leave_one_out(rewards_B: Tensor, group: int) -> Tensor:
    """(B,) RLOO's advantage, Ahmadian et al. 2024 (arXiv 2402.14740) after Kool et al. 2019: the reward minus the mean
    of the group's others, groups as in `group_relative`. Exactly 0 in a group of equal rewards."""
    grouped = rewards_B.view(-1, group)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return torch.where(_differ(grouped), grouped - others, 0.0).flatten()


def _differ(grouped: Tensor) -> Tensor:
    """(groups, 1) whether rewards within a group differ. Their mean may be off by rounding, and a tiny difference
    divided by a tiny standard deviation is not tiny."""
    return grouped.amax(1, keepdim=True) > grouped.amin(1, keepdim=True)


class PolicyLoss(NamedTuple):
    """Each (N,), per token; the last two are detached, for logging."""

    loss: Tensor
    log_ratio: Tensor
    clipped: Tensor


def policy_loss(
    new_logp_N: Tensor, old_logp_N: Tensor, advantages_N: Tensor, clip: float, rows_N: Tensor | None = None
) -> PolicyLoss:
    """PPO's clipped surrogate, Schulman et al. 2017 (arXiv 1707.06347) eq. 7, negated, per token.

    With `rows_N`, below N, every token has the ratio of its whole completion, π_θ(y|x)/π_old(y|x): tokens of one number
    are one completion. The caller takes the mean over the whole mini-batch, so that cutting it into micro-batches (or
    over several GPUs) changes nothing.
    """
    log_ratio = new_logp_N - old_logp_N
    if rows_N is not None:
        # Sums that are as many as tokens, most of them 0: a shape that does not depend on the rows can be recorded.
        log_ratio = torch.zeros_like(log_ratio).scatter_add(0, rows_N, log_ratio).gather(0, rows_N)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages_N
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages_N
    return PolicyLoss(-torch.minimum(unclipped, clipped), log_ratio.detach(), (clipped < unclipped).detach())


def value_loss(values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, clip: float) -> Tensor:
    """Half the squared error, the larger of plain and clipped around the old value, per token.

    As in OpenAI's PPO (baselines/ppo2) and lm-human-preferences. `clip` is in units of the reward.
    """
    clipped = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_N - returns_N) ** 2, (clipped - returns_N) ** 2)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(returns − values)/Var(returns) over the True entries; 0 when the returns do not vary."""
    error, target = (returns - values)[mask], returns[mask]
    variance = target.var(unbiased=False)
    return torch.where(variance > 0, 1 - error.var(unbiased=False) / variance.clamp(min=1e-12), torch.zeros(()))


def adapt_kl_coef(kl_coef: float, kl: float, target: float | None, batch: int, horizon: int) -> float:
    """Ziegler et al. 2019 (arXiv 1909.08593) eq. 3: steer KL(π‖π_ref), nats per sentence, towards `target`.

    The relative error is clipped to ±0.2 and `batch`/`horizon` of it is applied. No target: the coefficient stays.
    """
    if target is None:
        return kl_coef
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * batch / horizon)
