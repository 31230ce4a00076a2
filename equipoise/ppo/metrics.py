"""The numbers of one PPO step, under the names that docs/METRICS.md defines. Deterministic: no clock is read here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.measures.shares import kl_bound
from equipoise.policy.rollout import Rollout
from equipoise.ppo import maths
from equipoise.ppo.base import BaseRates
from equipoise.ppo.update import UpdateStats
from equipoise.ppo.window import Sentence, Window
from equipoise.protocol.prompts import MAX_WORDS, MIN_WORDS
from equipoise.protocol.reward import Reward, strict_success


def step_metrics(
    *,
    rewards: Sequence[Reward],
    paid_B: Tensor,
    bonus_B: Tensor,
    rollout: Rollout,
    kl_B: Tensor,
    kl_k3_B: Tensor,
    entropy_BT: Tensor,
    values_BT: Tensor,
    returns_BT: Tensor,
    advantages_BT: Tensor,
    kl_coef: float,
    learning_rate: float,
    update: UpdateStats,
    skipped: int,
    missing_eos_penalty: float,
    strict_bonus: float,
) -> dict[str, float]:
    """All metrics of a step; B sentences, T tokens, KLs in nats per sentence."""
    mask_BT = rollout.mask_BT
    parts = torch.tensor(
        [[r.reward, r.base, r.bonus, r.length_penalty, r.repetition_penalty] for r in rewards], dtype=torch.float64
    )
    mean_reward, base, bonus, length, repetition = parts.mean(0).tolist()
    classes = [bool(r.agentic) + bool(r.communal) for r in rewards]
    pairs = {(r.agentic[0], r.communal[0]) for r in rewards if r.agentic and r.communal}
    share = 1 / len(rewards)
    strict = sum(strict_success(r.text) for r in rewards) * share
    finished = rollout.finished_B.float().mean().item()
    return {
        "reward/mean": mean_reward,
        "reward/std": parts[:, 0].std(unbiased=False).item(),
        "reward/base": base,
        "reward/bonus": bonus,
        "reward/length_penalty": length,
        "reward/repetition_penalty": repetition,
        "reward/training": paid_B.mean().item(),
        "reward/diversity_bonus": bonus_B.mean().item(),
        "reward/missing_eos": -missing_eos_penalty * (1 - finished),
        "reward/strict_bonus": strict_bonus * strict,
        "compliance/both": classes.count(2) * share,
        "compliance/one": classes.count(1) * share,
        "compliance/none": classes.count(0) * share,
        "compliance/in_length": sum(MIN_WORDS <= r.words <= MAX_WORDS for r in rewards) * share,
        "compliance/strict": strict,
        "text/words": sum(r.words for r in rewards) * share,
        "text/unique": len({r.text for r in rewards}) * share,
        "text/pairs": len(pairs),
        "text/tokens": rollout.lengths_B.float().mean().item(),
        "text/finished": finished,
        "kl/ref": kl_B.mean().item(),
        "kl/ref_k3": kl_k3_B.mean().item(),
        "kl/coef": kl_coef,
        "kl/penalty": kl_coef * kl_B.mean().item(),
        "ppo/update_kl": update.update_kl,
        "ppo/updates": update.updates,
        "ppo/early_stop": int(update.early_stop),
        "ppo/ratio_max": update.ratio_max,
        "ppo/clip_fraction": update.clip_fraction,
        "ppo/policy_loss": update.policy_loss,
        "ppo/value_loss": update.value_loss,
        "ppo/entropy": maths.masked_mean(entropy_BT, mask_BT).item(),
        "ppo/grad_norm": update.grad_norm,
        "ppo/learning_rate": learning_rate,
        "value/mean": maths.masked_mean(values_BT, mask_BT).item(),
        "value/explained_variance": maths.explained_variance(values_BT, returns_BT, mask_BT).item(),
        "advantage/std": advantages_BT[mask_BT].std(unbiased=False).item(),
        "guard/skipped": skipped,
    }


def remember(
    rewards: Sequence[Reward], occupations: Sequence[str], rollout: Rollout, kl_B: Tensor, nll_B: Tensor
) -> list[Sentence]:
    """The batch as the running measures keep it."""
    strict = [strict_success(r.text) for r in rewards]
    rest = (rollout.lengths_B.tolist(), rollout.finished_B.tolist(), strict, kl_B.tolist(), nll_B.tolist())
    return [
        Sentence(r.text, occupation, r.agentic, r.communal, r.words, tokens, finished, ok, r.reward, kl, nll)
        for r, occupation, tokens, finished, ok, kl, nll in zip(rewards, occupations, *rest, strict=True)
    ]


def distance(recent: Window, base: BaseRates | None) -> dict[str, float]:
    """KL(π‖π_ref) of the last sentences beyond what their compliance needs; nothing where the base is unknown."""
    if base is None:
        return {}
    kl = recent.mean(s.kl for s in recent.sentences)
    bound = kl_bound(recent.mean(s.both for s in recent.sentences), base.rate("both"))
    strict = kl_bound(recent.mean(s.strict for s in recent.sentences), base.rate("strict"))
    return {"kl/bound": bound, "kl/excess": kl - bound, "kl/excess_strict": kl - strict}
