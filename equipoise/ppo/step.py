"""One PPO step: sample → reward → score by policy and reference → advantages → update → measure.

Shapes: B completions, T steps, N real tokens laid flat. The tensors of a step's experience live on the CPU, where they
are small, and go to the device where the model needs them.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
from torch import Tensor

from equipoise.policy.likelihood import text_nll
from equipoise.policy.load import Policy
from equipoise.policy.prompt import sentences_of
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import NonFiniteLogits, sample_dealt
from equipoise.policy.score import score
from equipoise.ppo import maths
from equipoise.ppo.advantages import estimate, experience_of
from equipoise.ppo.clock import Clock
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.experience import Rewarded, Scored
from equipoise.ppo.metrics import remember, step_metrics
from equipoise.ppo.training import Training
from equipoise.ppo.update import Update, mini_batches
from equipoise.ppo.watch import Alert
from equipoise.protocol.reward import Reward
from equipoise.runs.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Step:
    """What one PPO step leaves to be logged."""

    problem: str | None = None
    """What was not finite, where something was; the weights are then as they were before it showed."""
    metrics: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    rewards: Sequence[Reward] = ()
    occupations: Sequence[str] = ()
    """Of the sentences."""
    own: Sequence[float] | None = None
    """The user's reward of each sentence, where that is what is maximised."""
    rollout: Rollout | None = None
    evidence: dict[str, Tensor] = field(default_factory=dict)
    """Tensors to look into where something was not finite."""
    alerts: Sequence[Alert] = ()


def occupation_at(position: int, occupations: Sequence[str], seed: int) -> str:
    """The `position`-th occupation of an endless stream of shuffled rounds, so that a checkpoint need only hold a
    count."""
    round_number, place = divmod(position, len(occupations))
    return _round(round_number, tuple(occupations), seed)[place]


@lru_cache(maxsize=16)
def _round(number: int, occupations: tuple[str, ...], seed: int) -> Sequence[str]:
    order = list(occupations)
    random.Random(f"{seed}/{number}").shuffle(order)
    return order


def occupations_of(config: TrainConfig, done: int) -> list[str]:
    """Those of the batch after `done` steps, the sentences of a group side by side."""
    group = config.ppo.group_size
    groups = config.ppo.batch_size // group
    places = range(done * groups, (done + 1) * groups)
    drawn = [occupation_at(place, config.occupations, config.seed) for place in places]
    return [occupation for occupation in drawn for _ in range(group)]


def ppo_step(training: Training) -> Step:
    """One step, `state.step` counting it. Where something was not finite the weights are as before it showed.

    Raises FunctionFailed, with all state as before the step, where the user's reward fails.
    """
    config, policy, optimizer, state = training.config, training.policy, training.optimizer, training.state
    ppo, clock, ranks = config.ppo, Clock(policy.device), training.ranks
    drawn = state.generator.get_state()
    occupations = occupations_of(config, state.step)
    batches = mini_batches(ppo, state.generator)
    learning_rate = ppo.policy_learning_rate(state.step) * state.remedies.rate
    state.step += 1

    with clock("sample"):
        prompts = [training.prompts[o] for o in occupations]
        try:
            rollout = sample_dealt(policy, prompts, config.sampling, state.generator, ranks)
        except NonFiniteLogits as error:
            return Step(str(error))

    with clock("score"):
        with ranks.by_itself():
            launched = state.limit.run(
                policy, lambda rows: launch_scores(policy, rollout, batches, config, rows, ranks)
            )
        with clock("reward", wait=False), state.undone_where_a_function_fails(drawn):  # on the host, while a GPU scores
            rewarded = reward_sentences(training, rollout, occupations)
        scored = collect_scores(launched, rollout, ranks)
    failed = partial(Step, rewards=rewarded.rewards, occupations=occupations, rollout=rollout)
    if not bool(rewarded.paid_B.isfinite().all()):
        return failed("the reward is not finite", evidence={"rewards": rewarded.paid_B})
    kl_BT = scored.kl_BT(rollout)
    if not bool(kl_BT.isfinite().all() and scored.values.isfinite().all()):
        return failed("log-probabilities or values are not finite", evidence=scored._asdict())
    advantages = estimate(ppo, rewarded.paid_B, scored, rollout, state.kl_coef)

    with clock("update"):
        optimizer.set_learning_rates(learning_rate, ppo.value_learning_rate)
        experience = experience_of(ppo, rollout, scored, advantages, state.kl_coef)
        temperature, packed = config.sampling.temperature, config.scoring == "packed"
        updates = Update(policy, optimizer, experience, batches, ppo, temperature, packed, state.limit, ranks)
        updates.begin()
        # On the host, while a GPU is at the first mini-batches.
        batch = remember(rewarded.rewards, occupations, rollout, scored, config.task)
        running = state.look_back(batch, maths.masked_mean(scored.entropies, rollout.mask_BT).item())
        state.window.add(rewarded.rewards, occupations)
        stats = updates.finish()
        if stats.nonfinite is None:
            optimizer.update_average(state.step)

    metrics = step_metrics(config, state, learning_rate, rollout, rewarded, scored, advantages, stats) | running
    alerts = state.judge(metrics)
    state.adapt_kl_coef(float(kl_BT.sum(1).mean()), ppo)
    if stats.nonfinite is None:
        state.bad_in_a_row = 0
    timings = together(clock.timings(tokens=int(rollout.lengths_B.sum())), ranks)
    evidence = scored._asdict() | {"advantages": advantages.used_BT}
    return Step(
        stats.nonfinite, metrics, timings, rewarded.rewards, occupations, rewarded.own, rollout, evidence, alerts
    )


def together(timings: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """The timings of all ranks as those of the step: of each the largest, which the step lasts; of speed the
    smallest."""
    if ranks.size == 1:
        return timings
    waited = ranks.take_waited()
    seen = ranks.each(lambda: timings | {"time/wait": waited})
    found = {key: (min if key.startswith("speed/") else max)(one[key] for one in seen) for key in seen[0]}
    return found | {"ranks/size": float(ranks.size)}


def reward_sentences(training: Training, rollout: Rollout, occupations: Sequence[str]) -> Rewarded:
    """The protocol's reward of each sentence, and what PPO maximises. Raises FunctionFailed.

    A function of the user's is called once, on rank 0: it may cost money, or be random."""
    config, task, functions = training.config, training.config.task, training.functions
    texts = sentences_of(training.policy.tokenizer, rollout, occupations, task)
    rewards = [task.score(text, config.reward) for text in texts]
    bonus_B = torch.tensor(training.state.window.bonuses(rewards, occupations))
    own = None
    if functions.reward is not None:
        own = training.ranks.first_does(lambda: functions.rewards(texts, occupations))
    base_B = torch.tensor([r.reward for r in rewards] if own is None else own)
    strict_B = torch.tensor([config.strict_bonus * task.strict(text) for text in texts])
    paid_B = base_B + bonus_B + strict_B - config.missing_eos_penalty * ~rollout.finished_B
    if config.fluency_weight:
        paid_B = paid_B - config.fluency_weight * _unnatural(training, texts, occupations)
    return Rewarded(rewards, paid_B, bonus_B, own)


def _unnatural(training: Training, texts: Sequence[str], occupations: Sequence[str]) -> Tensor:
    """(B,) `text_nll`; a text of which nothing follows the frame is as unnatural as the worst of the batch."""
    policy, task, ranks = training.policy, training.config.task, training.ranks
    found = training.state.limit.run(
        policy, lambda rows: text_nll(policy, texts, occupations, task, rows, ranks, repeated=True)
    )
    worst = max((nll for nll in found if nll is not None), default=0.0)
    return torch.tensor([worst if nll is None else nll for nll in found])


Launched = list[tuple[Tensor, Tensor]]
"""For each group of completions its row numbers, and (5, N) numbers on the device in the order of `Scored`."""


def launch_scores(
    policy: Policy,
    rollout: Rollout,
    batches: Sequence[Tensor],
    config: TrainConfig,
    rows_at_once: int,
    ranks: Ranks = ALONE,
) -> Launched:
    """Score this rank's part of the batch by policy and reference. A GPU may still be at work when this returns."""
    ppo, temperature, packed = config.ppo, config.sampling.temperature, config.scoring == "packed"
    first_epoch = batches[: ppo.batch_size // ppo.mini_batch_size]
    own = [ranks.runs(rows)[piece] for rows in first_epoch for piece in ranks.mine]
    if policy.graphs.enabled and packed and policy.ways.packed and rows_at_once >= len(own[0]):
        # One trie of all these rows: more is shared, and a quarter of the kernels do.
        groups = [torch.cat(own).sort().values]
    else:
        # The very micro-batches of the first epoch's updates: there the ratio is then exactly 1, in bfloat16 too.
        groups = [micro for rows in own for micro in rows.split(rows_at_once)]
    launched = []
    with torch.no_grad():
        for group in groups:
            part = rollout.select(group)
            scores = score(policy, part, temperature, packed=packed, kl=ppo.kl_in != "reward")
            reference = score(policy, part, temperature, packed=packed, reference=True, entropy=False)
            # Copied, since the next replay of a recorded graph writes its results into the same memory.
            launched.append((group, torch.stack([*scores, reference.logprobs])))
    return launched


def collect_scores(launched: Launched, rollout: Rollout, ranks: Ranks = ALONE) -> Scored:
    """What `launch_scores` began on all ranks, on the CPU; waits for the devices."""
    mask_BT = rollout.mask_BT
    columns = [torch.zeros(mask_BT.shape) for _ in Scored._fields]
    parts = ranks.each(lambda: [(group, flat.cpu()) for group, flat in launched])
    for group, flat in itertools.chain.from_iterable(parts):
        for column_BT, values_N in zip(columns, flat, strict=True):
            rows_BT = torch.zeros(mask_BT[group].shape)
            rows_BT[mask_BT[group]] = values_N
            column_BT[group] = rows_BT
    return Scored(*columns)
