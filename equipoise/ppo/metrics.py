"""The numbers of one PPO step, under the names that docs/METRICS.md defines. Deterministic: no clock is read here."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.measures.variety import pair_counts
from equipoise.policy.rollout import Rollout
from equipoise.ppo import maths
from equipoise.ppo.advantages import Estimated
from equipoise.ppo.config import PPOConfig, TrainConfig
from equipoise.ppo.experience import Rewarded, Scored
from equipoise.ppo.state import State
from equipoise.ppo.update import UpdateStats
from equipoise.ppo.window import Sentence
from equipoise.protocol.reward import Reward
from equipoise.protocol.task import Task


def step_metrics(
    config: TrainConfig,
    state: State,
    learning_rate: float,
    rollout: Rollout,
    rewarded: Rewarded,
    scored: Scored,
    advantages: Estimated,
    update: UpdateStats,
) -> dict[str, float]:
    """All metrics of a step; KLs in nats per sentence. `state` as it was when the step was paid."""
    rewards, mask_BT = rewarded.rewards, rollout.mask_BT
    kl = scored.kl_BT(rollout).sum(1).mean().item()
    kl_k3_BT = torch.where(mask_BT, maths.kl_k3(scored.logprobs, scored.reference), 0.0)
    parts = _parts(rewards)
    mean_reward, base, bonus, length, repetition = parts.mean(0).tolist()
    task, share = config.task, 1 / len(rewards)
    complete, some = sum(r.complete for r in rewards), sum(r.some for r in rewards)
    strict = sum(task.strict(r.text) for r in rewards) * share
    finished = rollout.finished_B.float().mean().item()
    return {
        "reward/mean": mean_reward,
        "reward/std": parts[:, 0].std(unbiased=False).item(),
        "reward/base": base,
        "reward/bonus": bonus,
        "reward/length_penalty": length,
        "reward/repetition_penalty": repetition,
        "reward/training": rewarded.paid_B.mean().item(),
        "reward/diversity_bonus": rewarded.bonus_B.mean().item(),
        "reward/missing_eos": -config.missing_eos_penalty * (1 - finished),
        "reward/strict_bonus": config.strict_bonus * strict,
        "compliance/both": complete * share,
        "compliance/one": (some - complete) * share,
        "compliance/none": (len(rewards) - some) * share,
        "compliance/in_length": sum(task.in_length(r.words) for r in rewards) * share,
        "compliance/strict": strict,
        "text/words": sum(r.words for r in rewards) * share,
        "text/unique": len({r.text for r in rewards}) * share,
        "text/pairs": len(pair_counts(r.first for r in rewards)),
        "text/tokens": rollout.lengths_B.float().mean().item(),
        "text/finished": finished,
        "kl/ref": kl,
        "kl/ref_k3": kl_k3_BT.sum(1).mean().item(),
        "kl/coef": state.kl_coef,
        **({} if config.ppo.method.kl_in_loss else {"kl/penalty": state.kl_coef * kl}),
        "ppo/update_kl": update.update_kl,
        "ppo/updates": update.updates,
        "ppo/early_stop": int(update.early_stop),
        "ppo/ratio_max": update.ratio_max,
        "ppo/clip_fraction": update.clip_fraction,
        "ppo/policy_loss": update.policy_loss,
        **_losses(update),
        "ppo/entropy": maths.masked_mean(scored.entropies, mask_BT).item(),
        "ppo/grad_norm": update.grad_norm,
        "ppo/learning_rate": learning_rate,
        **_values(scored, advantages, mask_BT),
        "advantage/std": advantages.raw_BT[mask_BT].std(unbiased=False).item(),
        **_groups(config.ppo, rewarded),
        "guard/skipped": state.skipped,
        **_exact(config, scored, mask_BT),
    } | _function(rewarded)


def _exact(config: TrainConfig, scored: Scored, mask_BT: Tensor) -> dict[str, float]:
    """The exact KL at the places visited, where it is computed."""
    if config.ppo.kl_in == "reward":
        return {}
    return {"kl/exact": torch.where(mask_BT, scored.exact, 0.0).sum(1).mean().item()}


def _losses(update: UpdateStats) -> dict[str, float]:
    """The losses that not every algorithm has."""
    found = {"ppo/value_loss": update.value_loss, "ppo/kl_loss": update.kl_loss}
    return {key: loss for key, loss in found.items() if loss is not None}


def _values(scored: Scored, advantages: Estimated, mask_BT: Tensor) -> dict[str, float]:
    """How good the value head is, where there is one."""
    if advantages.returns_BT is None:
        return {}
    return {
        "value/mean": maths.masked_mean(scored.values, mask_BT).item(),
        "value/explained_variance": maths.explained_variance(scored.values, advantages.returns_BT, mask_BT).item(),
    }


def _groups(ppo: PPOConfig, rewarded: Rewarded) -> dict[str, float]:
    """How far rewards differ within groups, where sentences are compared within them."""
    if not ppo.method.grouped:
        return {}
    paid = rewarded.paid_B.double().view(-1, ppo.group_size)
    alike = paid.amax(1) == paid.amin(1)
    return {
        "group/reward_std": paid.std(1).mean().item(),
        "group/alike": alike.double().mean().item(),
    }


def _function(rewarded: Rewarded) -> dict[str, float]:
    """The mean of the user's own reward, where there is one."""
    return {} if rewarded.own is None else {"reward/function": math.fsum(rewarded.own) / len(rewarded.own)}


def _parts(rewards: Sequence[Reward]) -> Tensor:
    """(B, 5) float64: the sum of each reward and its parts."""
    parts = [[r.reward, r.base, r.bonus, r.length_penalty, r.repetition_penalty] for r in rewards]
    return torch.tensor(parts, dtype=torch.float64)


def remember(
    rewards: Sequence[Reward], occupations: Sequence[str], rollout: Rollout, scored: Scored, task: Task
) -> list[Sentence]:
    """The batch as the running measures keep it."""
    kl_B = scored.kl_BT(rollout).sum(1)
    nll_B = torch.where(rollout.mask_BT, -scored.reference, 0.0).sum(1) / rollout.lengths_B
    strict = [task.strict(r.text) for r in rewards]
    rest = (rollout.lengths_B.tolist(), rollout.finished_B.tolist(), strict, kl_B.tolist(), nll_B.tolist())
    return [
        Sentence(r.text, occupation, r.terms, r.words, tokens, finished, ok, r.reward, kl, nll)
        for r, occupation, tokens, finished, ok, kl, nll in zip(rewards, occupations, *rest, strict=True)
    ]
