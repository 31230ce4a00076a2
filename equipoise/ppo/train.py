"""The training loop: one PPO step after the other, logged, guarded and saved, until the run is complete or stopped."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from equipoise.errors import NonFiniteError
from equipoise.learning.search import BATCH
from equipoise.policy.alike import check_alike
from equipoise.policy.load import Policy, load_policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import Prompts, leaked_terms, render_prompts
from equipoise.policy.source import load_config, load_tokenizer, resolve
from equipoise.policy.verify import check_length, settle
from equipoise.ppo.base import BaseRates, base_rates
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.evaluate import read_pair_rates
from equipoise.ppo.finish import finish, mark_checkpoint
from equipoise.ppo.functions import FunctionFailed, Functions, RankFunction, RewardFunction, keep_traceback
from equipoise.ppo.guard import ALERT_EXIT, NONFINITE_EXIT, on_alert, on_nonfinite
from equipoise.ppo.idle import check_power
from equipoise.ppo.nonfinite import locate
from equipoise.ppo.run import is_due
from equipoise.ppo.shared import SharedRun
from equipoise.ppo.state import State
from equipoise.ppo.step import ppo_step
from equipoise.ppo.training import Training, new_optimizer
from equipoise.ppo.untrained import keep_untrained
from equipoise.ppo.warm_start import check_file, found_in, warm_start
from equipoise.protocol.plural import plural
from equipoise.runs.ranks import ALONE, Ranks, joined
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
    rank_fn: RankFunction | None = None,
    *,
    overwrite: bool = False,
    base: BaseRates | None = None,
    changed_functions: bool = False,
) -> Outcome:
    """Train, or continue the run in `config.run`, to `config.steps`; then write the final model.

    `reward_fn` replaces the protocol's reward as what is maximised. Checkpoints are then compared by `rank_fn`, or by
    the mean of `reward_fn` where none is given, so that the best by what was asked for is exported. `base`, where it
    has been measured before, saves sampling the untrained model.

    A run is continued with the functions that it began with; `changed_functions` has it go on with others, as where one
    was mended. Raises UserError for what the user can mend, also where a function fails: what was trained is then
    saved, and the error that it raised is the cause.
    """
    functions = Functions(reward_fn, rank_fn)
    options: Any = {"overwrite": overwrite, "base": base, "changed_functions": changed_functions}
    with joined() as ranks, Trainer(config, functions, ranks=ranks, **options) as trainer:
        return trainer.train()


class Trainer:
    """One run, a step at a time: opened (as a context manager), its model loaded, trained.

    `edited`: what was changed in the script that trains, for the record; the configuration has it already.
    Entering raises UserError for what must not be continued or touched.
    """

    def __init__(
        self,
        config: TrainConfig,
        functions: Functions | None = None,
        *,
        overwrite: bool = False,
        base: BaseRates | None = None,
        changed_functions: bool = False,
        edited: Mapping[str, Any] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks.sharing_layers(config.policy.tensor_parallel)
        self.config, self.functions, self.base = config, functions or Functions(), base
        self.overwrite, self.changed_functions, self.edited = overwrite, changed_functions, edited
        self.policy: Policy | None = None
        self.run: SharedRun
        self.stop: StopSignals
        self._open = ExitStack()

    def __enter__(self) -> "Trainer":
        self.config.task.check_new_tokens(self.config.sampling.max_new_tokens)
        check_power(self.config)
        self.ranks.first_does(lambda: read_pair_rates(self.config.evaluation.pair_rates, self.config.task))
        if self.overwrite:  # before anything of an earlier run is removed
            self.ranks.first_does(lambda: check_file(self.config))
        with ExitStack() as opened:
            self.run = opened.enter_context(
                SharedRun.open(
                    self.config,
                    self.ranks,
                    overwrite=self.overwrite,
                    functions=self.functions.document(),
                    prompts=lambda: self.prompts.record,
                    changed_functions=self.changed_functions,
                    edited=self.edited,
                )
            )
            self.ranks, self.config = self.run.ranks, self.run.config
            self.stop = opened.enter_context(StopSignals(ranks=self.ranks))
            for line in self.functions.lines():
                self.run.log.say(line)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    @cached_property
    def prompts(self) -> Prompts:
        """As the model reads them; needs its tokenizer and configuration alone. Raises UserError also where they do
        not fit into it: before anything of an earlier run is removed."""
        config, task = self.config, self.config.task
        source = resolve(config.policy.model)
        prompts = render_prompts(load_tokenizer(source), task.prompt(config.prompt), task, config.system)
        check_length(load_config(source), list(prompts.ids.values()), config.sampling.max_new_tokens)
        return prompts

    def load(self) -> Policy:
        """The policy, untrained, and compared with itself: see `settle`. Raises UserError, on all ranks."""
        if self.policy is None:
            self.ranks.each(self._load)
            assert self.policy is not None
            policy = self.policy
            check_alike(policy, list(self.prompts.ids.values()), self.ranks)
            # Found by each with its own rounding.
            policy.ways = self.ranks.first_does(lambda: policy.ways)
        return self.policy

    def _load(self) -> None:
        config, log = self.config, self.run.log
        with log.stage("loading the model"):
            torch.manual_seed(config.seed)  # adapters start at random
            prompt, head = config.task.prompt(config.prompt), config.ppo.method.value_head
            hidden = config.ppo.value_hidden
            self.policy = load_policy(self.run.policy, prompt, self.ranks, value_head=head, value_hidden=hidden)
        with log.stage("comparing packed, padded and single sentences"):
            settle(self.policy, list(self.prompts.ids.values()), config.sampling.max_new_tokens, log.say)

    def train(self) -> Outcome:
        """Train to the end, or until something stops it; then write the final model. Raises UserError."""
        run, stop, config = self.run, self.stop, self.config
        if run.complete:
            run.log.say(
                f"this run is complete ({plural(config.steps, 'step')}): raise --steps to go on, or --overwrite "
                "to start anew"
            )
            run.push()
            return Outcome("done", config.steps, 0)
        try:
            training = self._begin()
        except Stopped:
            return _stopped_before(run, stop, "while the untrained model was measured")
        state = training.state
        try:
            if run.resumed is None and config.warm_start.wanted:
                warm_start(training, run.log.say, stop.check, partial(_without_warm_start, run), run.log.stage)
                run.save(training.optimizer, state, asynchronous=True)  # the warm start can take minutes
            outcome = _run_steps(training, run, stop)
            if outcome.status == "done":
                finish(training, run)
                run.push()
            return outcome
        except Stopped:
            return _stopped_before(run, stop, "in the warm start")
        except FunctionFailed as error:
            raise _saved(training, run, error) from error.__cause__
        except NonFiniteError as error:  # nothing of it was written: the run ends as it was last saved
            run.log.event(state.step, "gave_up", because=str(error))
            run.log.say(f"stopped: {error}. The same command continues from the last checkpoint.")
            return Outcome("nonfinite", state.step, NONFINITE_EXIT)

    def _begin(self) -> Training:
        """The policy and all that belongs to it: as the run's newest checkpoint left it, or untrained and measured.

        Raises Stopped where a signal ends the measuring."""
        config, run, policy = self.config, self.run, self.load()
        leaked = leaked_terms(policy.tokenizer, config.task.prompt(config.prompt), config.task, config.system)
        rates = self.ranks.first_does(lambda: read_pair_rates(config.evaluation.pair_rates, config.task))
        state = State.begin(config, RowLimit(config.ppo.micro_batch_size, run.log.say), leaked, rates)
        optimizer = new_optimizer(config, policy, self.ranks)
        training = Training(config, policy, optimizer, state, self.prompts.ids, self.functions, self.ranks)
        if run.resumed is not None:
            run.restore(run.resumed, training.optimizer, state)
        else:
            if config.warm_start.warm_start_file:  # before the minutes that measuring takes
                found_in(Path(config.warm_start.warm_start_file), training, training.trained_prompts)
            with run.log.stage("rehearsing the export"):
                run.rehearse_export(policy)
            with run.log.stage("measuring the untrained model") as stage:

                def tick(done: int, total: int) -> None:
                    self.stop.check()
                    stage(done, total)

                prompts = training.trained_prompts
                state.base = self.base or base_rates(config, policy, prompts, run.log.say, tick, self.ranks)
                if config.evaluation.final_sentences:
                    keep_untrained(training)
        return training


def _stopped_before(run: SharedRun, stop: StopSignals, where: str) -> Outcome:
    """Say and record that a signal came before the first step, when there is nothing yet to save."""
    assert stop.seen is not None
    run.log.event(0, "signal", name=stop.seen.name)
    run.log.say(f"stopped by {stop.seen.name} {where}, with which the same command begins again")
    return Outcome("stopped", 0, stop.exit_code)


def _saved(training: Training, run: SharedRun, error: FunctionFailed) -> FunctionFailed:
    """Save what was trained before a function of the user's failed; the error, with what was saved and the remedy."""
    state = training.state
    run.save(training.optimizer, state)
    where = training.ranks.first_does(lambda: keep_traceback(error, Path(run.config.run.output_dir)))
    run.log.event(state.step, "function_failed", what=str(error))
    kept = f", the traceback is in {where}" if where else ""
    return FunctionFailed(
        f"{error}. Step {state.step} is saved{kept}: mend the function and go on with train(…, changed_functions=True)"
    )


def _without_warm_start(run: SharedRun, found: int, drawn: int) -> None:
    """Say and record that PPO begins from what the model is, since it wrote too few sentences to learn from."""
    run.log.event(0, "no_warm_start", found=found, drawn=drawn, needed=BATCH)
    run.log.say(
        f"{run.config.ppo.method.title} goes on without it, and learns little where the model hardly ever complies: "
        "give the task openings (--warm-start forced), or sentences with --warm-start-file"
    )


def _mark(training: Training, run: SharedRun) -> None:
    """`mark_checkpoint`, and a note in the state until it is done, so that one which fails is made up for."""
    training.state.unmarked = True
    mark_checkpoint(training, run)
    training.state.unmarked = False


def _run_steps(training: Training, run: SharedRun, stop: StopSignals) -> Outcome:
    config, state, optimizer = training.config, training.state, training.optimizer
    if state.unmarked:
        _mark(training, run)
        run.saved_step = -1  # what it holds is of before the evaluation
        run.save(optimizer, state)
    while state.step < config.steps and stop.look() is None:
        step = ppo_step(training)
        if step.metrics:
            run.log.step(state.step, step.metrics, step.timings | {"time/save": run.take_save_seconds()})
        if state.step % config.run.sample_every == 0 or state.step == 1:
            run.log.samples(state.step, step.rewards, step.occupations, step.own)
        if step.alerts and not on_alert(training, run, step.alerts):
            run.save(optimizer, state)
            return Outcome("alert", state.step, ALERT_EXIT)
        if step.problem is not None:
            origin = partial(locate, training.policy, step.rollout, step.evidence, config)
            if training.ranks.tensor > 1:  # which all compute together
                found = origin()
                origin = partial(dict, found)
            run.dump(state.step, step.problem, step.rollout, step.evidence, origin)
            if not on_nonfinite(training, run, step.problem):
                return Outcome("nonfinite", state.step, NONFINITE_EXIT)
        if is_due(config, state) and state.step > run.saved_step:
            _mark(training, run)
        run.save_if_due(optimizer, state)

    if stop.look() is None:
        run.save(optimizer, state, asynchronous=True)  # measuring and exporting go on meanwhile
    if (received := stop.look()) is not None:
        run.save(optimizer, state)
        run.log.event(state.step, "signal", name=received.name)
        run.log.say(f"stopped by {received.name} after step {state.step}; saved. The same command continues.")
        return Outcome("stopped", state.step, stop.exit_code)
    return Outcome("done", state.step, 0)
