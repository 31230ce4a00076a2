"""The options of the commands beside training: `equipoise bench`, `export` and `sweep`. They need no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from equipoise import options
from equipoise.errors import UserError
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.presets import preset
from equipoise.protocol.task import PROTOCOL


@dataclass(frozen=True)
class BenchConfig:
    bench_steps: int = 5
    """Steps that are timed."""
    bench_warmup: int = 2
    """Steps before them: compilation, graph capture, allocator."""
    full_length: bool = False
    """Let no row stop before max-new-tokens, so that every step does the same work."""
    prompt_tokens: int = 0
    """Pad every prompt in front to this many tokens; 0 leaves them as they are."""
    per_gpu: bool = False
    """With several GPUs, batch-size and mini-batch-size are those of each: work grows with their number."""
    output: str = ""
    """Write the result, as the last line shows it, into this file too."""
    memory_gb: float = 0.0
    """Let this process use no more of the GPU than that; 0 is all of it."""
    train: TrainConfig = field(default_factory=lambda: preset("bundled-gpu"))


@dataclass(frozen=True)
class ExportConfig:
    checkpoint: tyro.conf.Positional[Path]
    """The folder of a checkpoint, such as rlhf_checkpoints/checkpoint-200."""
    output_dir: Path = Path("exported")
    """The folder that gets the model: its own, not that of a run."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the base's weights are in when adapters are merged. `auto`: what the run computed in, so far as it is on
    record, else what this machine would."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    overwrite: bool = False
    """Replace the model that an earlier `equipoise export` left there."""


@dataclass(frozen=True)
class SweepConfig:
    file: tyro.conf.Positional[Path] = Path("sweep.yaml")
    """YAML with `base` (a preset and options that all runs share), `settings` (a name and options for each), `seeds`,
    and `evaluate` (n sentences for each occupation, temperature, top_p)."""
    output_dir: str = "sweep"
    """Each run gets a folder NAME-SEED in it; the tables lie beside them."""
    task: options.TaskOption = PROTOCOL
    """A task file, or the name of a packaged task, for all runs; `task` in `base` does the same."""
    jobs: int = 1
    """Runs at a time. More than one are processes of their own, in turn on the visible GPUs."""
    keep: Literal["nothing", "models", "all"] = "models"
    """What stays of a finished run besides its records: its model, or its checkpoints too."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"jobs {self.jobs} must be at least 1")
