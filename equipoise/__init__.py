"""PPO fine-tuning of language models toward balanced occupational descriptions, and the tools to measure it.

What is named here is the public interface, described in docs/API.md. Each name is loaded when it is first used, so that
`import equipoise` needs no library.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equipoise.dataframes import Results, evaluate, score
    from equipoise.errors import UserError
    from equipoise.ppo.config import TrainConfig
    from equipoise.ppo.presets import preset
    from equipoise.ppo.train import Outcome, train
    from equipoise.protocol.reward import Reward, RewardWeights
    from equipoise.protocol.task import PROTOCOL, Task, packaged_tasks, read_task

__version__ = "0.1.0"
__all__ = [
    "PROTOCOL",
    "Outcome",
    "Results",
    "Reward",
    "RewardWeights",
    "Task",
    "TrainConfig",
    "UserError",
    "__version__",
    "evaluate",
    "packaged_tasks",
    "preset",
    "read_task",
    "score",
    "train",
]

_HOMES = {
    "dataframes": ("Results", "evaluate", "score"),
    "errors": ("UserError",),
    "ppo.config": ("TrainConfig",),
    "ppo.presets": ("preset",),
    "ppo.train": ("Outcome", "train"),
    "protocol.reward": ("Reward", "RewardWeights"),
    "protocol.task": ("PROTOCOL", "Task", "packaged_tasks", "read_task"),
}
"""In which module each name is."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
