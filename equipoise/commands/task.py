"""`equipoise task`: looks at a task file before GPU hours are spent, or writes one to start from."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from equipoise.errors import UserError
from equipoise.options import parse
from equipoise.policy.config import check_device
from equipoise.protocol.marking import printable
from equipoise.protocol.task import packaged_tasks, read_task
from equipoise.runs.console import quiet
from equipoise.runs.files import write_whole

NEW = "task.yaml"
EXIT_CANNOT = 2


@dataclass(frozen=True)
class TaskConfig:
    """Which task is looked at, and with which model."""

    file: tyro.conf.Positional[str] = ""
    """A task file, or the name of a packaged task. With --new: the file to write, task.yaml by default."""
    new: bool = False
    """Write a commented task file to start from, the default task's, and look at nothing."""
    model: str | None = None
    """Also load a model (`bundled`, a folder or a Hub id), show what it reads, and estimate how often it complies."""
    prompt: str | None = None
    """The prompt that the model is asked with. Default: the task's first."""
    samples: int = 256
    """Sentences from which the model's base rates are estimated."""
    max_new_tokens: int = 32
    """A sentence that has not ended by then is cut off."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""

    def __post_init__(self) -> None:
        check_device(self.device)
        for name in ("samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")


def main(argv: list[str]) -> int:
    """Print what there is to say of the task. 0; 2 for a task that no sentence can meet. Raises UserError."""
    config = parse(
        TaskConfig,
        argv,
        TaskConfig(),
        prog="equipoise task",
        description="Look at a task before GPU hours are spent: prompts, leaks, feasibility; with --model, base rates.",
    )
    if config.new:
        return _write_new(Path(config.file or NEW))
    if not config.file:
        raise UserError(
            f"no task given: name a task file or a packaged task ({', '.join(packaged_tasks())}), or write a file to "
            "start from with --new"
        )
    task = read_task(config.file)
    # Only here: it reads numerical libraries, which a mistyped option need not wait for.
    from equipoise.methods.inspect_task import inspect_task, look_with_model

    found = inspect_task(task, config.max_new_tokens)
    for line in found.lines:
        _say(line)
    if not found.feasible:
        return EXIT_CANNOT
    if config.model is not None:
        quiet()
        look_with_model(task, config.model, config.prompt, config.samples, config.max_new_tokens, config.device, _say)
    return 0


def _say(line: str) -> None:
    print(printable(line), flush=True)


def _write_new(path: Path) -> int:
    if path.exists():
        raise UserError(f"{path} is there already: give another name, as in equipoise task --new mine.yaml")
    try:
        write_whole(path, packaged_tasks()["agentic-communal"].read_bytes())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another place") from None
    _say(f"{path} is the default task: change what your study needs, then equipoise task {path}")
    return 0
