"""A task's prompts as rows of another trainer's data set."""

from collections.abc import Callable
from typing import Any, Literal

from equipoise.errors import UserError
from equipoise.plugins.written import label
from equipoise.protocol.prompts import Prompt
from equipoise.protocol.task import Task

Trainer = Literal["trl", "verl", "openrlhf"]


def rows(
    trainer: Trainer,
    task: Task,
    named: str,
    prompt: Prompt,
    *,
    system: str | None = "",
    holdout: bool = False,
    render: Callable[[str], str] | None = None,
) -> list[dict[str, Any]]:
    """One row for each occupation; `named` is how the reward finds the task again (a name, or a file's path).

    `render` makes the whole text of a prompt, the sentence begun, out of an occupation; without it the prompt is
    messages, and the model writes the sentence from its first word. `system`: the system message; None for no such
    turn, which is something else than an empty one (many templates then write their own). Raises UserError where the
    trainer cannot take such prompts.
    """
    if trainer == "verl" and (render is not None or prompt.instruction is None):
        raise UserError(
            "verl puts every prompt through the chat template and begins the answer itself: leave out --model, and "
            "give a prompt with an instruction"
        )
    out: list[dict[str, Any]] = []
    for index, name in enumerate(task.training_names(holdout)):
        told = label(named, name)
        user = task.user_message(prompt, name)
        asked: Any = render(name) if render else task.prefix(name) if user is None else _messages(user, system)
        if trainer == "verl":
            out.append(
                {
                    "data_source": "equipoise",
                    "prompt": asked,
                    "ability": "writing",
                    "reward_model": {"style": "rule", "ground_truth": told},
                    "extra_info": {"index": index, "occupation": name},
                }
            )
        else:
            out.append({"prompt": asked, "label": told})
    return out


def _messages(user: str, system: str | None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": user}]
    return turns if system is None else [{"role": "system", "content": system}, *turns]
