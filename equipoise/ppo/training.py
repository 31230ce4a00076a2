"""What belongs together while a run is trained."""

from dataclasses import dataclass, field

from equipoise.learning.optimizer import MasterAdam, adam_for
from equipoise.policy.load import Policy
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.functions import Functions
from equipoise.ppo.state import State
from equipoise.runs.ranks import ALONE, Ranks


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
    functions: Functions = field(default_factory=Functions)
    """What is maximised, and what checkpoints are compared by, in place of the task's."""
    ranks: Ranks = ALONE
    """The processes that do it together."""

    @property
    def trained_prompts(self) -> dict[str, list[int]]:
        """Those of the occupations that are trained on."""
        return {occupation: self.prompts[occupation] for occupation in self.config.occupations}


def new_optimizer(config: TrainConfig, policy: Policy, ranks: Ranks) -> MasterAdam:
    """Adam on the policy's trained weights as they are now; see `adam_for`."""
    return adam_for(policy, ranks, eps=config.ppo.adam_eps, average=config.ppo.average_weights)
