"""Where a run leaves what it makes: its folders, trackers, and the final model's form. Changes no number of a run."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from equipoise.errors import UserError
from equipoise.policy.out_config import OutConfig

Tracker = Literal["wandb", "trackio", "mlflow"]


@dataclass(frozen=True)
class RunConfig(OutConfig):
    output_dir: str = "rlhf_llama3_7b_output"
    """The final model, training_metrics.csv and the other records."""
    checkpoint_dir: str = "rlhf_checkpoints"
    """What continues a run that was stopped."""
    tensorboard_dir: str = "runs"
    """What TensorBoard shows, a folder in it for each run."""
    save_every: int = 100
    """PPO steps between checkpoints that are kept."""
    save_minutes: float = 10.0
    """A further checkpoint when this long has passed since the last; only the newest of these is kept."""
    keep_checkpoints: int = 0
    """Keep this many of the newest, besides the best so far; 0 keeps every multiple of save-every."""
    sample_every: int = 50
    """PPO steps between printed samples."""
    track: Annotated[tuple[Tracker, ...], tyro.conf.UseAppendAction] = ()
    """A tracker beside TensorBoard: wandb, trackio or mlflow; may be repeated. It gets what a checkpoint holds, each
    time that one is written."""

    def __post_init__(self) -> None:
        for name in ("save_every", "sample_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        object.__setattr__(self, "track", tuple(dict.fromkeys(self.track)))  # named in a file and on the line, say
        self.check_out()
        if self.keep_checkpoints < 0:
            raise UserError(f"keep-checkpoints {self.keep_checkpoints} must be 0 (keep all) or more")
