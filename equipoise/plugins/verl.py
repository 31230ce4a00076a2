"""The task's reward for verl: `reward.custom_reward_function.path=pkg://equipoise.plugins.verl`, `name=compute_score`.

`equipoise prompts --for verl` writes the data set: `data_source`, `prompt` (messages), `reward_model.ground_truth`.
"""

from collections.abc import Mapping
from typing import Any

from equipoise.plugins.written import numbers, read_label, score, weights_from


def compute_score(
    data_source: str = "",
    solution_str: str = "",
    ground_truth: Any = "",
    extra_info: Mapping[str, Any] | None = None,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    **weights: float,
) -> dict[str, float]:
    """`score`, the task's reward of one response, and its parts, which verl logs.

    `ground_truth` is the label that `equipoise prompts` wrote. verl closes every turn of a prompt, so the response is
    the whole sentence. `weights` come from `reward.custom_reward_function.reward_kwargs`. The other arguments are
    verl's, and not needed. Raises UserError.
    """
    task, occupation = read_label(ground_truth)
    reward = score(task, occupation, "", solution_str, weights_from(weights))
    return {"score": reward.reward, **numbers(task, reward)}
