"""`equipoise prompts`: a task's prompts as a data set for another trainer."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from equipoise.errors import UserError
from equipoise.options import parse
from equipoise.plugins.dataset import Trainer, rows
from equipoise.protocol.plural import plural
from equipoise.protocol.prompts import Prompt
from equipoise.protocol.task import PROTOCOL, Task, packaged_tasks, read_task
from equipoise.runs.files import unwritable, write_whole


@dataclass(frozen=True)
class PromptsConfig:
    """Whose data set is written, of which task, and where to."""

    trainer: Annotated[Trainer, tyro.conf.arg(name="for")] = tyro.MISSING
    """The trainer that reads the data set."""
    task: str = PROTOCOL.name
    """A task file, or the name of a packaged task. The rows name it, so the file must stay where it is."""
    prompt: str = ""
    """One of the task's prompts, or NAME=INSTRUCTION. Default: the task's first."""
    model: str = ""
    """Write the text that this model reads, the sentence begun, in place of messages: `bundled`, a folder or a Hub
    id."""
    system: str = ""
    """The system message."""
    system_turn: bool = True
    """An empty system message stands there too; without one many chat templates write their own. --no-system-turn for
    those that have no place for it."""
    holdout: bool = False
    """Leave out the occupations that the task holds out."""
    output: str = ""
    """The file, one JSON object a line. Default: prompts-TRAINER.jsonl."""
    overwrite: bool = False
    """Replace the file where it is there already."""


def main(argv: list[str]) -> int:
    """Write the data set and say how it is used. Raises UserError."""
    config = parse(
        PromptsConfig,
        argv,
        PromptsConfig(),
        prog="equipoise prompts",
        description="Write a task's prompts as a data set for another trainer, whose reward equipoise.plugins gives.",
    )
    if config.system and not config.system_turn:
        raise UserError(f"--no-system-turn and --system {config.system[:60]!r} exclude each other: leave one out")
    task = read_task(config.task)
    prompt = task.prompt(config.prompt) if config.prompt else task.default_prompt
    named = config.task if config.task in packaged_tasks() else str(Path(config.task).resolve())
    written = rows(
        config.trainer,
        task,
        named,
        prompt,
        system=config.system if config.system_turn else None,
        holdout=config.holdout,
        render=_renderer(config, task, prompt) if config.model else None,
    )
    path = Path(config.output or f"prompts-{config.trainer}.jsonl")
    if path.exists() and not config.overwrite:
        raise UserError(f"{path} is there already: give --output, or --overwrite to replace it")
    try:
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    except OSError as error:
        raise unwritable(path, error) from None
    print(f"{path}: {plural(len(written), 'prompt')} for {config.trainer}; docs/PLUGINS.md shows how it is used")
    return 0


def _renderer(config: PromptsConfig, task: Task, prompt: Prompt) -> Callable[[str], str]:
    """From an occupation to the text that the model reads."""
    from equipoise.policy.prompt import prompt_text  # loads transformers, which messages do without
    from equipoise.policy.source import load_tokenizer, resolve

    tokenizer = load_tokenizer(resolve(config.model))
    return lambda occupation: prompt_text(tokenizer, prompt, occupation, task, config.system)
