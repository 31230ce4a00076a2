"""The task's reward for OpenRLHF: `--reward.remote_url` takes this file, whose path running it as a module prints.

`equipoise prompts --for openrlhf` writes the data set, with `--data.input_key prompt --data.label_key label`.
"""

from collections.abc import Sequence
from typing import Any

from equipoise.errors import UserError
from equipoise.plugins.written import numbers, read_label, score


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
    """`rewards`, the task's reward; `scores`, the same within 0 and 1, by which OpenRLHF filters prompts; `extra_logs`.

    A query is prompt and response together, with special tokens. OpenRLHF asks for one at a time and takes numbers; of
    several queries each entry is a list. Raises UserError for a query that does not begin with its prompt.
    """
    told = [read_label(text) for text in labels]
    rewards = [
        score(task, occupation, prompt, response(query, prompt))
        for (task, occupation), query, prompt in zip(told, queries, prompts, strict=True)
    ]
    parts = [numbers(task, reward) for (task, _), reward in zip(told, rewards, strict=True)]
    out: dict[str, Any] = {
        "rewards": [reward.reward for reward in rewards],
        "scores": [min(1.0, max(0.0, reward.reward)) for reward in rewards],
        "extra_logs": {name: [part[name] for part in parts] for name in (parts[0] if parts else {})},
    }
    return _single(out) if len(rewards) == 1 else out


def response(query: str, prompt: str) -> str:
    """What follows the prompt in the query. A tokenizer may put a token or white space before the prompt that the
    prompt does not have, so the prompt is looked for. Raises UserError where it is not there."""
    place = query.find(prompt.strip())
    if place < 0 or not prompt.strip():
        raise UserError(f"the query {query!r:.80} does not hold its prompt {prompt!r:.80}")
    return query[place + len(prompt.strip()) :]


def _single(out: dict[str, Any]) -> dict[str, Any]:
    logs = {name: values[0] for name, values in out["extra_logs"].items()}
    return {"rewards": out["rewards"][0], "scores": out["scores"][0], "extra_logs": logs}


if __name__ == "__main__":
    print(__file__)
