"""The algorithms that a policy is trained with, and in what they differ. Needs no torch, as options do not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Algorithm:
    """What sets an algorithm apart; sampling, packing, clipping, `target_kl` and the optimizer are the same for all."""

    title: str
    """As records and texts name it."""
    source: str
    """The paper that its formulas are from."""
    how: str
    """What becomes of rewards, as a clause for texts; `{group}` and `{others}` are numbers of sentences."""
    value_head: bool = False
    """Whether a value head predicts the reward that is still to come."""
    grouped: bool = False
    """Whether a sentence is compared with the others of its group: the batch holds `num_generations` of each occupation
    that is drawn."""
    kl_in_loss: bool = False
    """Whether the KL to the reference is a term of the loss (k3, per token), not a part of the reward (k1)."""
    whole_ratio: bool = False
    """Whether the probability ratio that is clipped is the whole completion's, not each token's."""
    sentence_mean: bool = False
    """Whether the loss is a mean over the tokens of each completion and then over completions, which all weigh alike;
    else it is a mean over all tokens, and longer completions weigh more."""
    token_credit: bool = False
    """Whether rewards are discounted (`gamma`) from token to token; else a completion is paid for as a whole."""

    def group_size(self, batch: int, given: int) -> int:
        """Sentences of one occupation that stand side by side in a batch; `given`: `num_generations`, 0 for none."""
        if given or not self.grouped:
            return given or 1
        return next((n for n in range(GROUP, 1, -1) if batch % n == 0), 1)


GROUP = 8
"""Sentences of a group where no number is given and the batch can be divided so."""

ALGORITHMS: Mapping[str, Algorithm] = {
    "ppo": Algorithm(
        "PPO",
        "Schulman et al. 2017, arXiv 1707.06347",
        "the rewards still to come, the KL penalty on every token among them, are compared with what a value head "
        "predicts, and whitened over the batch",
        value_head=True,
        token_credit=True,
    ),
    "grpo": Algorithm(
        "GRPO",
        "Shao et al. 2024, arXiv 2402.03300",
        "the advantage of every token is the sentence's reward minus the mean of its group of {group} sentences about "
        "one occupation, over the group's standard deviation; the KL to the reference is a term of the loss (k3, per "
        "token), and completions weigh alike in it",
        grouped=True,
        kl_in_loss=True,
        sentence_mean=True,
    ),
    # A ratio that is the same for all tokens of a completion: their mean is the completion's own loss.
    "rloo": Algorithm(
        "RLOO",
        "Ahmadian et al. 2024, arXiv 2402.14740",
        "the advantage of a completion is its reward, the KL penalty taken off, minus the mean of the {others} others "
        "of its group about one occupation, and the probability ratio that is clipped is the whole completion's",
        grouped=True,
        whole_ratio=True,
        sentence_mean=True,
    ),
    "reinforce++": Algorithm(
        "REINFORCE++",
        "Hu 2025, arXiv 2501.03262",
        "the advantages are the rewards still to come, the KL penalty on every token among them, whitened over the "
        "batch and compared with nothing else",
        token_credit=True,
    ),
}


def recorded(ppo: Mapping[str, Any]) -> Algorithm:
    """That of a run, from the group `ppo` of the configuration on its record: PPO where it is of before there was a
    choice, or names none that is known."""
    return ALGORITHMS.get(str(ppo.get("algorithm")), ALGORITHMS["ppo"])
