"""Every option of `equipoise study`. Needs no torch."""

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from equipoise.errors import UserError
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.sample import Method, SampleConfig
from equipoise.options import OptionalTask
from equipoise.protocol.reward import Event

METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class StudyConfig:
    n: int = 250
    """Sentences per occupation, of every method."""
    output_dir: Path = Path("study")
    """One completions file a method, with what it cost, and study.json."""
    task: OptionalTask = None
    """A task file, or the name of a packaged task, for all methods: occupations, classes of terms, frame, bounds and
    prompts. Default: the task that the trained model was trained on, if it says."""
    methods: str = ""
    """Which, separated by commas: prompt-only, prompt-best, gen-filter, ctrlg, sft, ppo. Default: all, ppo where a
    trained model is found."""
    trained: str | None = None
    """The folder of the model trained with PPO. Default: the one in which training leaves it, if there is a model."""
    model: str = "auto"
    """The base model of all methods. `auto`: the one that the trained model was trained from, else `bundled`."""
    prompt: str | None = None
    """The base model's prompt: the name of one of the task's, or NAME=INSTRUCTION. Default: the one that the trained
    model was trained with, else the task's first."""
    best_prompt: str = "require"
    """The prompt of prompt-best. `require`, which every task has, names the terms of each class."""
    temperature: float = 1.0
    """Of all methods: divides the logits."""
    top_p: float | None = None
    """Of all methods. Default: 0.95, but 1 for ctrlg."""
    max_new_tokens: int = 32
    """A sentence that has not ended by then is cut off."""
    seed: int = 0
    """Of all methods: of everything that is random."""
    filter: Event = "both"
    """What gen-filter keeps. `both`: sentences with a term of every class. `strict`: those among them that keep within
    the task's bounds of length and are one complete sentence."""
    budget: int | None = None
    """The most that gen-filter draws, all occupations together. Default: 5 for each sentence that is wanted."""
    kl_sentences: int | None = None
    """Sentences for the estimate of each method's KL. Default: 25 of each occupation, or n where that is less."""
    sft_data: str = "forced"
    """Where sft's sentences come from. `forced`: the base model writes them after a term of each class, as the public
    study learnt from template sentences, which they are like; for a task without openings, its free samples that
    comply. `ctrlg`: a run of it with another seed. `gen-filter`: this study's file. Or a completions file."""
    sft_sentences: int | None = None
    """Sentences that are written for sft, by `forced` or `ctrlg`. Default: n for each occupation, but 300 to 750."""
    sft_epochs: int = 5
    """Times that sft goes through its sentences."""
    sft_learning_rate: float | None = None
    """Highest of sft. Default: as `equipoise sft` has it."""
    pieces: int = 0
    """Into how many each batch of sft's is cut; see `equipoise sft`. 0: as many as processes."""
    batch_size: int | None = None
    """Sentences at a time. Default: by device; halved where memory does not suffice."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What models compute in. `auto`: bfloat16 where the hardware is faster in it."""
    use_8bit: bool = False
    """Keep base weights in 8 bits."""
    overwrite: bool = False
    """Make the selected methods' files anew."""
    ctrlg: CtrlGConfig = field(default_factory=CtrlGConfig)

    def __post_init__(self) -> None:
        for name in self.methods.split(",") if self.methods else ():
            if name.strip() not in METHODS:
                raise UserError(f"there is no method {name.strip()!r}: choose among {', '.join(METHODS)}")
        for name in ("sft_sentences", "sft_epochs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.pieces < 0:
            raise UserError(f"--pieces {self.pieces} must be at least 0")
        self.sampling("prompt-only")  # which checks the numbers

    @property
    def selected(self) -> tuple[Method, ...]:
        """The methods asked for, in the study's order; without ppo by default, since that needs a trained model."""
        asked = {name.strip() for name in self.methods.split(",")} if self.methods else set(METHODS) - {"ppo"}
        return tuple(method for method in METHODS if method in asked)

    def sampling(self, method: Method, **changes: Any) -> SampleConfig:
        """How the method's file is made."""
        shared = {f.name for f in dataclasses.fields(SampleConfig)} & {f.name for f in dataclasses.fields(self)}
        config = SampleConfig(method=method, output=self.output_dir / f"{method}.csv")
        return replace(config, **{name: getattr(self, name) for name in shared} | changes)
