"""PPO: sample → reward → score by policy and reference → advantages → update → log → save.

Shapes: B completions, T steps, N real tokens laid flat; tensors of a step's experience live on the CPU, where they are
small, and go to the device where the model needs them.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from equipoise.errors import NonFiniteError, UserError
from equipoise.policy.load import Policy, PolicyConfig, load_policy
from equipoise.policy.prompt import leaked_terms, prompt_ids, sentences_of
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import NonFiniteLogits, SamplingConfig, sample
from equipoise.policy.score import score
from equipoise.ppo import maths
from equipoise.ppo.choice import mark_checkpoint
from equipoise.ppo.clock import Clock
from equipoise.ppo.diversity import DiversityConfig, TermWindow
from equipoise.ppo.evaluate import BaseRates, EvaluationConfig, base_rates
from equipoise.ppo.finish import finish
from equipoise.ppo.guard import ALERT_EXIT, NONFINITE_EXIT, react, recover
from equipoise.ppo.metrics import distance, remember, step_metrics
from equipoise.ppo.nonfinite import locate
from equipoise.ppo.optimizer import MasterAdam
from equipoise.ppo.run import Run, RunConfig, flatten
from equipoise.ppo.signals import Stopped, StopSignals
from equipoise.ppo.state import State
from equipoise.ppo.update import Experience, PPOConfig, RowLimit, mini_batches, update
from equipoise.ppo.warm_start import WarmStartConfig, warm_start
from equipoise.ppo.watch import Alert, WatchConfig, explain
from equipoise.protocol import reward as protocol
from equipoise.protocol.lexicon import HOLDOUT, OCCUPATIONS
from equipoise.protocol.prompts import get_prompt
from equipoise.protocol.reward import Reward, RewardWeights

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(sentences, occupations) → one number each."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; saved with it. Presets are values of this class."""

    preset: str = "bundled-cpu"
    prompt: str = "describe"
    """`study`, `describe`, `require`, `raw`, or your own as NAME=INSTRUCTION with {occupation} in it."""
    system: str = ""
    """System message. Empty on purpose: some templates put one of their own that contains a term the reward pays
    for."""
    steps: int = 2000
    """PPO steps, each of batch-size completions."""
    seed: int = 0
    holdout: bool = False
    """Train on 15 occupations and keep barista, electrician, mechanic, plumber and salesperson unseen."""
    missing_eos_penalty: float = 0.0
    """Taken off the training reward of a completion that was cut off at max-new-tokens. Not part of the protocol's
    reward."""
    strict_bonus: float = 0.0
    """Added to the training reward of a sentence of strict success: both classes, 8 to 15 words, one complete sentence.
    Not part of the protocol's reward."""
    scoring: Literal["packed", "padded"] = "packed"
    """`packed` shares the tokens that prompts have in common; `padded` is its plain twin, one row per completion."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    reward: RewardWeights = field(default_factory=RewardWeights)
    diversity: DiversityConfig = field(default_factory=DiversityConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps {self.steps} must be at least 1; the guide trains for 2000")
        for key, value in flatten(asdict(self)).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{key.rpartition('.')[2].replace('_', '-')} is {value}: give a finite number")
        if 0 < self.ppo.decay_steps < self.steps:
            raise UserError(
                f"decay-steps {self.ppo.decay_steps} is below steps {self.steps}: nothing would be learnt after it"
            )
        if self.sampling.temperature == 0:
            raise UserError("temperature 0 leaves nothing to learn from: train at 1.0, the protocol's temperature")
        get_prompt(self.prompt)

    @property
    def occupations(self) -> tuple[str, ...]:
        return tuple(o for o in OCCUPATIONS if not (self.holdout and o in HOLDOUT))


@dataclass(frozen=True)
class Outcome:
    """How a call to `train` ended."""

    status: Literal["done", "stopped", "nonfinite", "alert"]
    step: int
    exit_code: int
    """0 done; 128 + signal number when stopped by one, with everything saved; 3 after repeated non-finite values; 4
    when an alert ended it, as --on-alert stop asks."""


def occupation_at(position: int, occupations: Sequence[str], seed: int) -> str:
    """The `position`-th occupation of an endless stream of shuffled rounds, so that a checkpoint need only hold a
    count."""
    round_number, place = divmod(position, len(occupations))
    order = list(occupations)
    random.Random(f"{seed}/{round_number}").shuffle(order)
    return order[place]


def train(
    config: TrainConfig,
    reward_fn: RewardFunction | None = None,
    *,
    overwrite: bool = False,
    base: BaseRates | None = None,
) -> Outcome:
    """Train, or continue the run in `config.run`, to `config.steps`; then write the final model.

    `reward_fn` replaces the protocol's reward as what is maximised. `base`, where it has been measured before, saves
    sampling the untrained model. Raises UserError for what the user can mend.
    """
    with Run.open(config, overwrite=overwrite) as run, StopSignals() as stop:
        if run.complete:
            run.log.say(
                f"this run is complete ({config.steps} steps): raise --steps to go on, or --overwrite to start anew"
            )
            return Outcome("done", config.steps, 0)
        torch.manual_seed(config.seed)  # adapters start at random
        prompt = get_prompt(config.prompt)
        policy = load_policy(config.policy, prompt)
        everyone = {o: prompt_ids(policy.tokenizer, prompt, o, config.system) for o in OCCUPATIONS}
        prompts = {o: everyone[o] for o in config.occupations}
        leaked = leaked_terms(policy.tokenizer, prompt, config.system)
        state = State.begin(config, RowLimit(config.ppo.micro_batch_size, run.log.say), leaked)
        optimizer = _optimizer(config, policy)
        if run.resumed is not None:
            run.restore(run.resumed, optimizer, state)
        else:
            state.base = base or base_rates(config, policy, prompts, run.log.say)
        try:
            if run.resumed is None and config.warm_start.wanted:
                optimizer = _warm_start(config, policy, state, prompts, run, stop)
                run.save(optimizer, state)  # it took minutes, perhaps
            outcome = _run_steps(config, policy, optimizer, state, prompts, run, reward_fn, stop)
            if outcome.status == "done":
                finish(config, policy, optimizer, state, everyone, run)
            return outcome
        except Stopped:
            assert stop.received is not None
            run.log.event(state.step, "signal", name=stop.received.name)
            run.log.say(f"stopped by {stop.received.name} in the warm start, with which the same command begins again")
            return Outcome("stopped", state.step, stop.exit_code)
        except NonFiniteError as error:  # nothing of it was written: the run ends as it was last saved
            run.log.event(state.step, "gave_up", because=str(error))
            run.log.say(f"stopped: {error}. The same command continues from the last checkpoint.")
            return Outcome("nonfinite", state.step, NONFINITE_EXIT)


def _run_steps(
    config: TrainConfig,
    policy: Policy,
    optimizer: MasterAdam,
    state: State,
    prompts: dict[str, list[int]],
    run: Run,
    reward_fn: RewardFunction | None,
    stop: StopSignals,
) -> Outcome:
    while state.step < config.steps and stop.received is None:
        step = ppo_step(config, policy, optimizer, state, prompts, reward_fn)
        if step.metrics:
            run.log.step(state.step, step.metrics, step.timings | {"time/save": run.take_save_seconds()})
        if state.step % config.run.sample_every == 0 or state.step == 1:
            run.log.samples(state.step, step.rewards)
        if step.alerts and not react(run, optimizer, state, config.watch, step.alerts):
            run.save(optimizer, state)
            return Outcome("alert", state.step, ALERT_EXIT)
        if step.problem is not None:
            origin = locate(policy, step.rollout, step.evidence, config)
            run.dump(state.step, step.problem, step.rollout, step.evidence, origin)
            if not recover(run, optimizer, state, step.problem):
                return Outcome("nonfinite", state.step, NONFINITE_EXIT)
        if run.is_due(state) and state.step > run.saved_step:
            mark_checkpoint(config, policy, optimizer, state, prompts, run)
        run.save_if_due(optimizer, state)

    run.save(optimizer, state)
    if stop.received is not None:
        run.log.event(state.step, "signal", name=stop.received.name)
        run.log.say(f"stopped by {stop.received.name} after step {state.step}; saved. The same command continues.")
        return Outcome("stopped", state.step, stop.exit_code)
    return Outcome("done", state.step, 0)


def _optimizer(config: TrainConfig, policy: Policy) -> MasterAdam:
    ppo = config.ppo
    return MasterAdam(policy.trained(), betas=(0.9, 0.999), eps=ppo.adam_eps, average=ppo.average_weights)


def _warm_start(
    config: TrainConfig, policy: Policy, state: State, prompts: dict[str, list[int]], run: Run, stop: StopSignals
) -> MasterAdam:
    """The supervised stage before PPO; returns a fresh optimizer. Raises Stopped."""
    warm_start(
        policy, config.warm_start, prompts, config.sampling, state.generator, config.ppo.batch_size,
        packed=config.scoring == "packed", say=run.log.say, check=stop.check,
    )  # fmt: skip
    return _optimizer(config, policy)


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
