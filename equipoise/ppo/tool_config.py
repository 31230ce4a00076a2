"""The options of the commands beside training: `equipoise bench`, `export` and `sweep`. They need no torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from equipoise import options
from equipoise.errors import UserError
from equipoise.policy.out_config import OutConfig
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
class ExportConfig(OutConfig):
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

    def __post_init__(self) -> None:
        self.check_out()


@dataclass(frozen=True)
class SweepConfig:
    file: tyro.conf.Positional[Path] = Path("sweep.yaml")
    """YAML with `base` (a preset and options that all runs share), `settings` (a name and options for each), `seeds`,
    and `evaluate` (n sentences for each occupation, temperature, top_p)."""
    output_dir: str = "sweep"
    """Each run gets a folder NAME-SEED in it; the tables lie beside them."""
    task: options.TaskOption = PROTOCOL
    """A task file, or the name of a packaged task, for all runs; `task` in `base` does the same."""
    jobs: int | None = None
    """Runs at a time. More than one are processes of their own, in turn on the visible GPUs. Default: 1 here, and with
    --executor as many as there are."""
    keep: Literal["nothing", "models", "all"] = "models"
    """What stays of a finished run besides its records: its model, or its checkpoints too."""
    commands: bool = False
    """Run nothing: print the command of each run that is not finished, a line each, for an array job, GNU parallel or
    whatever starts processes."""
    only: str | None = None
    """Run this one alone, as the commands say that `commands` prints: NAME-SEED."""
    executor: Literal["here", "slurm", "local", "debug"] = "here"
    """Where the runs go. `slurm`: a job each, through submitit; `local` (processes here) and `debug` (in this one) try
    that without Slurm. The folder of the sweep has to be one that all machines share."""
    job_minutes: int = 1440
    """Time limit of a job. A run that needs longer is queued again, and continues."""
    job_gpus: int = 1
    """GPUs of a job."""
    job_cpus: int = 8
    """CPU cores of a job."""
    slurm: tuple[str, ...] = ()
    """What else Slurm's sbatch is to be told, as KEY=VALUE: partition=gpu account=lab constraint=h100."""

    def __post_init__(self) -> None:
        for name in ("jobs", "job_minutes", "job_gpus", "job_cpus"):
            least = 0 if name == "job_gpus" else 1
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        if sum((self.commands, self.only is not None, self.executor != "here")) > 1:
            raise UserError("--commands, --only and --executor are three ways to run a sweep: give one of them")
        _ = self.sbatch

    @property
    def sbatch(self) -> dict[str, str]:
        """`slurm` by name. Raises UserError."""
        found = {}
        for given in self.slurm:
            name, equals, value = given.lstrip("-").partition("=")
            if not (name and equals and value):
                raise UserError(f"--slurm {given!r:.60} is no option of sbatch: write KEY=VALUE, as in partition=gpu")
            found[name] = value
        return found

    @property
    def elsewhere(self) -> bool:
        """Whether a run may be started on another machine than this one."""
        return self.commands or self.only is not None or self.executor != "here"
