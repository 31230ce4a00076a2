"""The options of the commands beside training: `equipoise bench`, `equipoise export`. Needs no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from equipoise.ppo.config import TrainConfig
from equipoise.ppo.presets import preset


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
    overwrite: bool = False
    """Replace the model that an earlier `equipoise export` left there."""
