"""What belongs together while a run is trained."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.errors import UserError
from equipoise.learning.optimizer import MasterAdam
from equipoise.policy.load import Policy
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.state import State

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(sentences, occupations) → one number each."""
RankFunction = Callable[[Sequence[str], Sequence[str]], float]
"""(sentences of one evaluation, their occupations) → how good they are; the higher the better."""


def name_of(function: Callable[..., Any]) -> str:
    """A function as a record names it: where it is defined; of a callable object or a `partial`, its class."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


@dataclass
class Training:
    """The policy in training. Where it is kept on disk is the `Run`'s affair, which a benchmark does without."""

    config: TrainConfig
    policy: Policy
    optimizer: MasterAdam
    """Replaced by a fresh one after the warm start."""
    state: State
    prompts: dict[str, list[int]]
    """Token ids of the prompt of every occupation, the held-out ones among them."""
    reward_fn: RewardFunction | None = None
    """What is maximised in place of the protocol's reward."""
    rank_fn: RankFunction | None = None
    """What checkpoints are compared by, in place of strict success, pairs and KL."""

    @property
    def trained_prompts(self) -> dict[str, list[int]]:
        """Those of the occupations that are trained on."""
        return {occupation: self.prompts[occupation] for occupation in self.config.occupations}

    def rank(self, texts: Sequence[str], occupations: Sequence[str]) -> float | None:
        """How good an evaluation's sentences are by the user's function: `rank_fn`, else the mean of `reward_fn`; None
        where there is neither. Raises UserError for what is no finite number."""
        if self.rank_fn is not None:
            value = float(self.rank_fn(texts, occupations))
        elif self.reward_fn is not None:
            values = [float(x) for x in self.reward_fn(texts, occupations)]
            value = math.fsum(values) / max(1, len(values))
        else:
            return None
        if not math.isfinite(value):
            raise UserError(
                f"the rank of an evaluation is {value}: return a finite number, higher for better sentences"
            )
        return value


def new_optimizer(config: TrainConfig, policy: Policy) -> MasterAdam:
    """Adam on the policy's trained weights as they are now. It moves them: see `Policy.forget_recordings`."""
    ppo = config.ppo
    return MasterAdam(policy.trained(), betas=(0.9, 0.999), eps=ppo.adam_eps, average=ppo.average_weights)
