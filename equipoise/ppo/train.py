"""PPO: sample → reward → score by policy and reference → advantages → update → log → save.

Shapes: B completions, T steps, N real tokens laid flat; tensors of a step's experience live on the CPU, where they are
small, and go to the device where the model needs them.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from equipoise.errors import NonFiniteError
from equipoise.learning.optimizer import MasterAdam
from equipoise.policy.load import Policy, load_policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import leaked_terms, prompt_ids
from equipoise.ppo.base import BaseRates, base_rates
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.finish import finish, mark_checkpoint
from equipoise.ppo.guard import ALERT_EXIT, NONFINITE_EXIT, react, recover
from equipoise.ppo.nonfinite import locate
from equipoise.ppo.run import Run
from equipoise.ppo.state import State
from equipoise.ppo.step import RewardFunction, ppo_step
from equipoise.ppo.warm_start import warm_start
from equipoise.protocol.lexicon import OCCUPATIONS
from equipoise.protocol.prompts import get_prompt
from equipoise.runs.signals import Stopped, StopSignals


@dataclass(frozen=True)
class Outcome:
    """How a call to `train` ended."""

    status: Literal["done", "stopped", "nonfinite", "alert"]
    step: int
    exit_code: int
    """0 done; 128 + signal number when stopped by one, with everything saved; 3 after repeated non-finite values; 4
    when an alert ended it, as --on-alert stop asks."""


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
