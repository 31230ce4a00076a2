"""What every tracker is told and asked, and which of them are installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from equipoise.errors import UserError


class Row(NamedTuple):
    """Everything that one step logged."""

    step: int
    values: Mapping[str, float]
    """By the keys of `docs/METRICS.md`: the step's own, and those of an evaluation after it."""
    samples: Sequence[Mapping[str, Any]] = ()
    """The scored sentences of a sampled step, by column."""


@dataclass(frozen=True)
class Start:
    """Which run of a tracker is opened, begun or continued."""

    name: str
    """What a person sees: the output folder's name."""
    id: str
    """Unique, of letters, digits and dashes; the same after a resume."""
    config: Mapping[str, Any]
    """The configuration, in groups; empty where the run has it already."""
    continues: bool
    """Whether a run of this id may be there."""


class Opened(NamedTuple):
    """A tracker's run, ready to be written to."""

    last: int | None
    """The last step of which it holds anything; 0 for none, None where that cannot be told."""
    where: str
    """Where it can be looked at, in a few words."""
    whole: int | None = None
    """The last step up to which it surely holds everything, where that may be an earlier one."""


class Tracker(Protocol):
    """One tracker's run. All calls come from one thread, one after the other; any exception ends its use."""

    def open(self, start: Start) -> Opened: ...

    def send(self, row: Row) -> None:
        """A step after those before it, and none twice but those above `Opened.whole`."""

    def files(self, paths: Sequence[Path], kind: str) -> None:
        """Finished files, as an artifact of that kind: `summary` or `report`."""

    def close(self, finished: bool) -> None:
        """Have everything arrive. `finished`: the run is complete; it is otherwise to be continued."""


PACKAGES = {"wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""What has to be installed for each, by the name that both pip and `import` know."""


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError, with the command that mends it, where a tracker's package is missing."""
    missing = [PACKAGES[name] for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        raise UserError(f"--track needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}")


def flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The leaves of nested settings, named as in `ppo.learning_rate`."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        out |= flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return out


COLUMNS = ("step", "text", "reward")


def columns(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a table of sentences: what every one of them has, the text and its reward before the rest."""
    first = [name for name in COLUMNS if samples and name in samples[0]]
    return [*first, *(name for name in (samples[0] if samples else ()) if name not in first)]


def cell(value: Any) -> str | float | int | None:
    """A sentence's value as a table's cell: lists of terms are joined."""
    if isinstance(value, bool):
        return int(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
