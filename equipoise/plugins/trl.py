"""The task's reward for TRL's GRPOTrainer and RLOOTrainer (1.16 or newer): `reward_funcs=reward()`.

TRL calls a reward function with lists, one entry for each completion: `prompts`, `completions`, and the data set's
columns by name. `equipoise prompts --for trl` writes the columns `prompt` and `label`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from equipoise.errors import UserError
from equipoise.plugins.written import Turn, numbers, read_label, score, weights_from

RewardFunction = Callable[..., list[float]]


def reward(**weights: float) -> RewardFunction:
    """A reward function for `reward_funcs`; `weights` are `RewardWeights`' names, as in `reward(base_one=0.0)`.

    It returns the task's reward of each completion, plain text or messages, and logs the means of its parts and the
    share with every class where TRL offers that. Raises UserError for a data set without the column `label`.
    """
    used = weights_from(weights)

    def equipoise_reward(
        prompts: Sequence[Turn], completions: Sequence[Turn], label: Sequence[Any] | None = None, **given: Any
    ) -> list[float]:
        labels = given.get("occupation") if label is None else label
        if labels is None:
            columns = ", ".join(sorted(given)) or "none"
            raise UserError(
                f"the data set has no column 'label' (its others: {columns}): write it with equipoise prompts --for trl"
            )
        told = [read_label(text) for text in labels]
        rewards = [
            score(task, occupation, prompt, completion, used)
            for (task, occupation), prompt, completion in zip(told, prompts, completions, strict=True)
        ]
        log: Callable[[str, float], None] | None = given.get("log_metric")
        if log is not None and rewards:
            parts = [numbers(task, reward) for (task, _), reward in zip(told, rewards, strict=True)]
            for name in parts[0]:
                log(f"equipoise/{name}", sum(part[name] for part in parts) / len(parts))
        return [reward.reward for reward in rewards]

    return equipoise_reward
