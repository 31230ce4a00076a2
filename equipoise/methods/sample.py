"""The sentences of one method, beside other methods' in a comparison: `equipoise sample`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from equipoise.errors import UserError
from equipoise.methods.completions import COMPARED, Completions, all_keys
from equipoise.methods.costs import Costs
from equipoise.methods.gen_filter import DRAWS_PER_ROW, gen_filter
from equipoise.methods.generate import TRAINED, GenerateConfig, Outcome, check_trained, tell_of_batch, write_all
from equipoise.ppo.signals import StopSignals
from equipoise.protocol.lexicon import OCCUPATIONS
from equipoise.protocol.reward import Event, complies

if TYPE_CHECKING:
    from equipoise.methods.prompted import Prompted

SUPERVISED = "./sft_output"
"""Where supervised fine-tuning leaves its model."""

Method = Literal["prompt-only", "prompt-best", "gen-filter", "sft", "ppo"]
LABELS: dict[Method, str] = {
    "prompt-only": "Prompt-Only",
    "prompt-best": "Prompt-Best",
    "gen-filter": "Generate-and-Filter",
    "sft": "SFT",
    "ppo": "RLHF",
}
"""The column Label of each method."""
FOLDERS: dict[Method, str] = {"sft": SUPERVISED, "ppo": TRAINED}
"""Methods that need a model of their own, and where it is made."""


@dataclass(frozen=True)
class SampleConfig(GenerateConfig):
    method: Method = "prompt-only"
    """`prompt-only`: the model under its prompt. `prompt-best`: under a prompt that names the requirement.
    `gen-filter`: drawn until enough sentences comply. `sft`, `ppo`: a model that `equipoise sft` or `train` left in a
    folder."""
    model: str = "auto"
    """A Hub id, a folder, or `bundled`. `auto`: the folder in which training leaves its model for `sft` and `ppo`,
    `bundled` for the others."""
    output: Path = Path("completions.csv")
    """The CSV. Beside it, `.json` added to its name, lies the record of how it was made, and, `.costs.json` added, what
    it cost; gen-filter keeps all its draws in NAME.raw.csv."""
    best_prompt: str = "require"
    """The prompt of prompt-best. `require` asks for 8 to 15 words and a term of each list."""
    label: str | None = None
    """The column Label. Default: the method's, as in the public study's files."""
    filter: Event = "both"
    """What gen-filter keeps: sentences with terms of `both` classes, or `strict` ones, which also have 8 to 15 words
    and are one complete sentence."""
    budget: int | None = None
    """The most that gen-filter draws, all occupations together. Default: 20 for each sentence that is wanted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.budget < 1:
            raise UserError(f"--budget {self.budget} must be at least 1: it counts draws, 20 x 20 x n by default")

    @property
    def draws(self) -> int:
        return self.budget or DRAWS_PER_ROW * self.n * len(OCCUPATIONS)


def sample(
    config: SampleConfig,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Write the method's sentences, or go on with them, and what they cost. Raises UserError."""
    writer = _writer(config)
    settings: dict[str, Any] = {
        "Model": config.model_name or writer.name,
        "Label": config.label or LABELS[config.method],
        "Method": config.method,
        "Seed": config.seed,
        **writer.settings,
    }
    with StopSignals(tell_of_batch) as stop:
        if config.method == "gen-filter":
            return gen_filter(
                writer, settings, config.output, n=config.n, budget=config.draws, event=config.filter,
                overwrite=config.overwrite, stop=stop, say=say, progress=progress,
            )  # fmt: skip
        with Completions(config.output, settings, config.n, config.overwrite, COMPARED) as file:
            costs = Costs(config.output, config.method, file.texts)
            outcome = write_all(writer, file, all_keys(config.n), stop, say, progress, costs)
            if outcome.status == "done":
                accepted = sum(complies(text, "both") for text in outcome.texts.values())
                costs.close(rows=len(outcome.texts), accepted=accepted)
            return outcome


def _writer(config: SampleConfig) -> "Prompted":
    model = config.model
    if model == "auto":
        model = FOLDERS.get(config.method, "bundled")
    if config.method in FOLDERS:
        check_trained(model)
        if model == SUPERVISED and not Path(model).exists():
            raise UserError(f"there is no model in {model} yet: make it with equipoise sft, or name one with --model")
    from equipoise.methods.prompted import Prompted
    from equipoise.policy.sample import SamplingConfig

    return Prompted(
        model,
        prompt=config.best_prompt if config.method == "prompt-best" else config.prompt,
        sampling=SamplingConfig(config.temperature, config.top_p, config.max_new_tokens),
        seed=config.seed,
        device=config.device,
        dtype=config.dtype,
        use_8bit=config.use_8bit,
        batch_size=config.batch_size,
    )
