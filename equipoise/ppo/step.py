"""One PPO step: sample, reward, score, advantages, update."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.errors import UserError
from equipoise.learning.optimizer import MasterAdam
from equipoise.policy.load import Policy
from equipoise.policy.prompt import sentences_of
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import NonFiniteLogits, sample
from equipoise.policy.score import score
from equipoise.ppo import maths
from equipoise.ppo.clock import Clock
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.diversity import TermWindow
from equipoise.ppo.metrics import distance, remember, step_metrics
from equipoise.ppo.state import State
from equipoise.ppo.update import Experience, mini_batches, update
from equipoise.ppo.watch import Alert, explain
from equipoise.protocol import reward as protocol
from equipoise.protocol.reward import Reward

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(sentences, occupations) → one number each."""


def occupation_at(position: int, occupations: Sequence[str], seed: int) -> str:
    """The `position`-th occupation of an endless stream of shuffled rounds, so that a checkpoint need only hold a
    count."""
    round_number, place = divmod(position, len(occupations))
    order = list(occupations)
    random.Random(f"{seed}/{round_number}").shuffle(order)
    return order[place]


class Step(NamedTuple):
    """What one PPO step leaves to be logged; `problem` says what was not finite, with the evidence."""

    problem: str | None = None
    metrics: dict[str, float] = {}  # noqa: RUF012 (never changed)
    timings: dict[str, float] = {}  # noqa: RUF012
    rewards: Sequence[Reward] = ()
    rollout: Rollout | None = None
    evidence: dict[str, Tensor] = {}  # noqa: RUF012
    alerts: Sequence[Alert] = ()


def ppo_step(
    config: TrainConfig,
    policy: Policy,
    optimizer: MasterAdam,
    state: State,
    prompts: dict[str, list[int]],
    reward_fn: RewardFunction | None = None,
) -> Step:
    """One step, `state.step` counting it. Where something was not finite the weights are as before it showed."""
    ppo, packed = config.ppo, config.scoring == "packed"
    clock = Clock(policy.device)
    first = state.step * ppo.batch_size
    occupations = [occupation_at(first + i, config.occupations, config.seed) for i in range(ppo.batch_size)]
    batches = mini_batches(ppo, state.generator)
    learning_rate = ppo.policy_learning_rate(state.step) * state.remedies.rate
    state.step += 1

    with clock("sample"):
        try:
            rollout = sample(policy, [prompts[o] for o in occupations], config.sampling, state.generator).cpu()
        except NonFiniteLogits as error:
            return Step(str(error))

    rewards: list[Reward] = []
    paid_B = bonus_B = torch.zeros(0)

    def reward() -> None:
        nonlocal paid_B, bonus_B
        if not rewards:  # once, also where scoring had to begin again
            with clock("reward", wait=False):
                rewards.extend(
                    protocol.score(s, config.reward) for s in sentences_of(policy.tokenizer, rollout, occupations)
                )
                paid_B, bonus_B = _training_rewards(config, rewards, rollout, state.window, reward_fn, occupations)

    with clock("score"), torch.no_grad():
        old, ref_logp_BT = state.limit.run(
            policy, lambda rows: _score_batch(policy, rollout, batches, config, packed, rows, meanwhile=reward)
        )
    if not bool(paid_B.isfinite().all()):
        return Step("the reward is not finite", rewards=rewards, rollout=rollout, evidence={"rewards": paid_B})
    mask_BT = rollout.mask_BT
    kl_BT = torch.where(mask_BT, maths.kl_k1(old["logprobs"], ref_logp_BT), 0.0)
    if not bool(kl_BT.isfinite().all() and old["values"].isfinite().all()):
        evidence = {**old, "reference": ref_logp_BT}
        return Step("log-probabilities or values are not finite", rewards=rewards, rollout=rollout, evidence=evidence)
    token_rewards_BT = maths.token_rewards(paid_B, kl_BT, mask_BT, state.kl_coef)
    raw = maths.gae(token_rewards_BT, old["values"], mask_BT, ppo.gamma, ppo.gae_lambda)
    whitened_BT = maths.whiten(raw.advantages, mask_BT)

    kl_B = kl_BT.sum(1)
    nll_B = torch.where(mask_BT, -ref_logp_BT, 0.0).sum(1) / rollout.lengths_B
    running: dict[str, float] = {}

    def measure() -> None:
        batch = remember(rewards, occupations, rollout, kl_B, nll_B)
        state.recent.add(batch)
        entropy = maths.masked_mean(old["entropies"], mask_BT).item()
        running.update(distance(state.recent, state.base) | state.watch.measure(state.recent, batch, entropy))

    with clock("update"):
        optimizer.set_learning_rates(learning_rate, ppo.value_learning_rate)
        experience = Experience(rollout, old["logprobs"], old["values"], raw.returns, whitened_BT)
        temperature, limit = config.sampling.temperature, state.limit
        stats = update(
            policy, optimizer, experience, batches, ppo, temperature, packed=packed, limit=limit, meanwhile=measure
        )
        if stats.nonfinite is None:
            optimizer.update_average(state.step)

    metrics = step_metrics(
        rewards=rewards, paid_B=paid_B, bonus_B=bonus_B, rollout=rollout, kl_B=kl_B,
        kl_k3_B=torch.where(mask_BT, maths.kl_k3(old["logprobs"], ref_logp_BT), 0.0).sum(1),
        entropy_BT=old["entropies"], values_BT=old["values"], returns_BT=raw.returns, advantages_BT=raw.advantages,
        kl_coef=state.kl_coef, learning_rate=learning_rate, update=stats, skipped=state.skipped,
        missing_eos_penalty=config.missing_eos_penalty, strict_bonus=config.strict_bonus,
    ) | running  # fmt: skip
    watch = state.watch
    alerts = [explain(sign, metrics, state.recent, watch.leaked) for sign in watch.judge(state.step, metrics)]
    metrics["watch/standing"] = len(watch.standing)
    state.window.add(rewards)
    state.kl_coef = maths.adapt_kl_coef(
        state.kl_coef, float(kl_B.mean()), ppo.ref_kl_target, ppo.batch_size, ppo.kl_horizon
    )
    if stats.nonfinite is None:
        state.bad_in_a_row = 0
    timings = clock.timings(tokens=int(rollout.lengths_B.sum()))
    evidence = {**old, "reference": ref_logp_BT, "advantages": whitened_BT}
    return Step(stats.nonfinite, metrics, timings, rewards, rollout, evidence, alerts)


def _training_rewards(
    config: TrainConfig,
    rewards: Sequence[Reward],
    rollout: Rollout,
    window: TermWindow,
    reward_fn: RewardFunction | None,
    occupations: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """(B,) what PPO maximises before the KL penalty, and (B,) the diversity bonus in it."""
    bonus_B = torch.tensor(window.bonuses(rewards))
    if reward_fn is None:
        base_B = torch.tensor([r.reward for r in rewards])
    else:
        base_B = torch.tensor([float(x) for x in reward_fn([r.text for r in rewards], occupations)])
        if len(base_B) != len(rewards):
            raise UserError(f"the reward function returned {len(base_B)} numbers for {len(rewards)} sentences")
    strict_B = torch.tensor([config.strict_bonus * protocol.strict_success(r.text) for r in rewards])
    return base_B + bonus_B + strict_B - config.missing_eos_penalty * ~rollout.finished_B, bonus_B


def _score_batch(
    policy: Policy,
    rollout: Rollout,
    batches: Sequence[Tensor],
    config: TrainConfig,
    packed: bool,
    rows_at_once: int,
    meanwhile: Callable[[], None],
) -> tuple[dict[str, Tensor], Tensor]:
    """(B, T) logprobs, entropies and values under the policy, and logprobs under the reference. `meanwhile` is called
    while a GPU works on them."""
    ppo, temperature = config.ppo, config.sampling.temperature
    if policy.graphs.enabled and packed and rows_at_once >= ppo.mini_batch_size:
        # One trie of the whole batch: more is shared, and a quarter of the kernels do.
        groups = [torch.arange(len(rollout))]
    else:
        # The very micro-batches of the first epoch's updates: there the ratio is then exactly 1, in bfloat16 too.
        first_epoch = batches[: ppo.batch_size // ppo.mini_batch_size]
        groups = [micro for rows in first_epoch for micro in rows.split(rows_at_once)]
    mask_BT = rollout.mask_BT
    out = {name: torch.zeros(mask_BT.shape) for name in ("logprobs", "entropies", "values", "reference")}
    for group in groups:
        part = rollout.select(group)
        scores = score(policy, part, temperature, packed=packed)
        reference = score(policy, part, temperature, packed=packed, reference=True, entropy=False)
        meanwhile()
        flat = torch.stack([*scores, reference.logprobs]).cpu()
        for name, values in zip((*scores._fields, "reference"), flat, strict=True):
            rows_BT = torch.zeros(part.mask_BT.shape)
            rows_BT[part.mask_BT] = values
            out[name][group] = rows_BT
    return out, out.pop("reference")
