"""Which checkpoint is exported: an evaluation at every multiple of save-every, and the rule that compares two.

The challenger replaces the best so far if

1. the best's strict success is below what the sampling error of the highest strict success seen so far allows (the
   lower end of its 95 % Wilson interval) and the challenger's is higher; or
2. the challenger's is not below it, and it has at least 2 % more effective pairs; or
3. as 2, with pairs within 2 % of each other and a lower KL to the reference model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from equipoise.policy.load import Policy
from equipoise.policy.sample import NonFiniteLogits
from equipoise.ppo.evaluate import evaluate
from equipoise.ppo.maths import wilson
from equipoise.ppo.optimizer import MasterAdam
from equipoise.ppo.run import Run

if TYPE_CHECKING:
    from equipoise.ppo.state import State
    from equipoise.ppo.train import TrainConfig

PAIRS_APART = 1.02  # a factor: nearer than that, two numbers of effective pairs count as one

Evaluation = dict[str, float]
"""`step` and what `evaluate` measures."""


def admissible(strict: float, highest: float, n: float) -> bool:
    """Whether a strict success is within the sampling error of the highest seen, each of `n` sentences."""
    return strict >= min(highest, wilson(round(highest * n), int(n)).low)


def better(challenger: Mapping[str, float], best: Mapping[str, float], highest: float) -> bool:
    """Whether the challenger replaces the best; `highest` is the highest strict success so far, its own included."""
    good, n = challenger["strict"], challenger["n"]
    if not admissible(best["strict"], highest, n):
        return good > best["strict"]
    if not admissible(good, highest, n):
        return False
    ours, theirs = challenger["effective_pairs"], best["effective_pairs"]
    if max(ours, theirs) > PAIRS_APART * min(ours, theirs):
        return ours > theirs
    return challenger["kl"] < best["kl"]


class Choice:
    """The best evaluation so far; part of every checkpoint."""

    def __init__(self) -> None:
        self.best: Evaluation | None = None
        self.highest = 0.0

    @property
    def step(self) -> int | None:
        """Of the best."""
        return int(self.best["step"]) if self.best else None

    def consider(self, challenger: Evaluation) -> bool:
        """Take part in the comparison; whether it is the best now."""
        self.highest = max(self.highest, challenger["strict"])
        if self.best is None or better(challenger, self.best, self.highest):
            self.best = challenger
            return True
        return False

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "highest": self.highest}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.best, self.highest = state["best"], state["highest"]


def evaluate_checkpoint(
    config: "TrainConfig",
    policy: Policy,
    optimizer: MasterAdam,
    state: "State",
    prompts: Mapping[str, Sequence[int]],
    run: Run,
) -> Evaluation | None:
    """Sample and measure the weights as they would be exported. None where their logits are not finite."""
    count, rows = config.evaluation.eval_sentences, config.ppo.batch_size
    sampling = config.evaluation.sampling(config.sampling)
    try:
        with optimizer.averaged():
            measured, _ = evaluate(policy, prompts, sampling, count, "evaluation", rows)
    except NonFiniteLogits as error:
        run.log.event(state.step, "nonfinite", what=f"{error}, in an evaluation")
        return None
    if not math.isfinite(measured["kl"]):
        run.log.event(state.step, "nonfinite", what="the KL to the reference is not finite, in an evaluation")
        return None
    return {"step": state.step, **measured}


def mark_checkpoint(
    config: "TrainConfig",
    policy: Policy,
    optimizer: MasterAdam,
    state: "State",
    prompts: Mapping[str, Sequence[int]],
    run: Run,
) -> None:
    """Before a checkpoint that is kept: note whether it is the best so far, and whether nothing was amiss."""
    if state.watch.at_ease:
        state.watch.healthy_step = state.step
    if config.evaluation.eval_sentences:
        found = evaluate_checkpoint(config, policy, optimizer, state, prompts, run)
        if found is not None:
            run.log.evaluation(state.step, found)
            state.choice.consider(found)


class Exported(NamedTuple):
    """Whose weights are exported, why, and what their evaluation measured, where there was one."""

    step: int
    because: str
    evaluation: Evaluation | None


def settle(
    config: "TrainConfig",
    policy: Policy,
    optimizer: MasterAdam,
    state: "State",
    prompts: Mapping[str, Sequence[int]],
    run: Run,
) -> Exported:
    """At the end: put the weights that are to be exported in place.

    The last weights take part without being remembered, so that a run which goes on is not changed by having ended.
    """
    evaluation, choice = config.evaluation, state.choice
    if not evaluation.eval_sentences:
        return Exported(state.step, "the last step", None)
    last = choice.best if choice.step == state.step else None
    if last is None and state.step % config.run.save_every != 0:
        last = evaluate_checkpoint(config, policy, optimizer, state, prompts, run)
    if evaluation.export == "last":
        return Exported(state.step, "the last step, as asked", last)
    if last is not None and (
        choice.best is None or last is choice.best or better(last, choice.best, max(choice.highest, last["strict"]))
    ):
        return Exported(state.step, f"the best evaluation ({_words(last)})", last)
    checkpoint = run.checkpoint_at(choice.step) if choice.step is not None else None
    if checkpoint is None or choice.best is None:
        return Exported(state.step, "the last step: the checkpoint of the best evaluation is gone", last)
    optimizer.load_state(checkpoint.tensors("weights"), checkpoint.tensors("optimizer"))
    because = f"the best evaluation ({_words(choice.best)}), not the last step {state.step}"
    return Exported(checkpoint.step, because, choice.best)


def _words(found: Mapping[str, float]) -> str:
    return (
        f"strict {100 * found['strict']:.1f} % of {found['n']:.0f} sentences, {found['effective_pairs']:.1f} effective "
        f"pairs, KL {found['kl']:.2f}"
    )
