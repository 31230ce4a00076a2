"""The sentences of one method, beside other methods' in a comparison: `equipoise sample`."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from equipoise.errors import UserError
from equipoise.methods.completions import COMPARED, Completions, Key
from equipoise.methods.costs import Costs
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.estimates import yields
from equipoise.methods.gen_filter import DRAWS_PER_ROW, Wanted, gen_filter
from equipoise.methods.generate import (
    TRAINED,
    Caller,
    GenerateConfig,
    Outcome,
    check_trained,
    dealt,
    led,
    tell_of_batch,
    write_all,
)
from equipoise.methods.shared import SharedWriter, have_done, made_alike
from equipoise.protocol.plural import plural
from equipoise.protocol.reward import Event
from equipoise.protocol.task import Task
from equipoise.runs.ranks import Ranks, joined
from equipoise.runs.signals import StopSignals

if TYPE_CHECKING:
    from equipoise.methods.prompted import Prompted

SUPERVISED = "./sft_output"
"""Where supervised fine-tuning leaves its model."""

Method = Literal["prompt-only", "prompt-best", "gen-filter", "ctrlg", "sft", "ppo"]
LABELS: dict[Method, str] = {
    "prompt-only": "Prompt-Only",
    "prompt-best": "Prompt-Best",
    "gen-filter": "Generate-and-Filter",
    "ctrlg": "Ctrl-G",
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
    `gen-filter`: drawn until enough sentences comply. `ctrlg`: each token drawn so that the sentence will comply.
    `sft`, `ppo`: a model that `equipoise sft` or `equipoise train` left in a folder."""
    model: str = "auto"
    """A Hub id, a folder, or `bundled`. `auto`: the folder in which training leaves its model for `sft` and `ppo`,
    `bundled` for the others."""
    output: Path = Path("completions.csv")
    """The CSV. Beside it, `.json` added to its name, lies the record of how it was made, and, `.costs.json` added, what
    it cost; gen-filter keeps all its draws in NAME.raw.csv."""
    best_prompt: str = "require"
    """The prompt of prompt-best. `require`, which every task has, names the terms of each class."""
    top_p: float | None = None
    """Only the likeliest tokens whose probabilities reach this sum are drawn. Default: 0.95, but 1 for ctrlg: what a
    nucleus keeps out its constraint keeps out, and its weights tell the base model's compliance only where every
    sentence that complies can come up."""
    label: str | None = None
    """The column Label. Default: the method's, as in the public study's files."""
    filter: Event = "both"
    """What gen-filter keeps. `both`: sentences with a term of every class, however many classes the task has. `strict`:
    those among them that keep within the task's bounds of length and are one complete sentence."""
    budget: int | None = None
    """The most that gen-filter draws, all occupations together. Default: 5 for each sentence that is wanted."""
    base_model: str | None = None
    """The model that the KL is measured to. Default: the one that a trained model was trained from, else the model."""
    base_prompt: str | None = None
    """The prompt of the base model. Default: --prompt, or the one that the model was trained with."""
    kl_sentences: int | None = None
    """Sentences from which the KL to the base model is estimated. Default: 25 of each occupation, or n where that is
    less; 0 leaves it out. ctrlg takes its own sentences instead where no more are asked for, all of them, if they
    are drawn at temperature 1 and top-p 1."""

    ctrlg: CtrlGConfig = field(default_factory=CtrlGConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part is not None and self.method == "gen-filter":
            raise UserError(
                "--part does not go with --method gen-filter: which sentences it draws next depends on all that it has "
                "drawn before. Leave --part out, or give each job occupations of its own in a task file"
            )
        if self.kl_sentences is not None and self.kl_sentences < 0:
            raise UserError(f"--kl-sentences {self.kl_sentences} must be 0 or more; 500 is usual")
        if self.budget is not None and self.budget < 1:
            raise UserError(
                f"--budget {self.budget} must be at least 1: it counts draws, by default {DRAWS_PER_ROW} for each "
                "sentence that is wanted"
            )

    def kl_runs(self, task: Task) -> int:
        """Sentences of each occupation for the estimate of the KL."""
        return min(25, self.n) if self.kl_sentences is None else -(-self.kl_sentences // len(task.names))

    @property
    def nucleus(self) -> float:
        return 1.0 if self.top_p is None and self.method == "ctrlg" else super().nucleus

    def draws(self, task: Task) -> int:
        """The most that gen-filter draws."""
        return self.budget or DRAWS_PER_ROW * self.n * len(task.names)


def sample(
    config: SampleConfig,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Write the method's sentences, or go on with them, and what they cost. Raises UserError.

    Of several processes the first one keeps the files; all get its outcome."""
    with joined() as ranks, StopSignals(tell_of_batch, ranks) as stop:
        writer = made_alike(lambda: _writer(config, ranks), ranks)
        caller = Caller(stop, say, progress)
        return led(writer, ranks, caller, lambda through: _into_files(config, writer, through, caller))


def _into_files(
    config: SampleConfig, writer: "Prompted", through: "Prompted | SharedWriter", caller: Caller
) -> Outcome:
    """Have the sentences of `writer` written by `through`."""
    settings: dict[str, Any] = {
        "Model": config.model_name or writer.name,
        "Label": config.label or LABELS[config.method],
        "Method": config.method,
        "Seed": config.seed,
        **writer.settings,
    }
    task, stop, say = writer.task, caller.stop, caller.say
    if config.method == "gen-filter":
        wanted = Wanted(task, config.filter, config.n, config.draws(task))
        return gen_filter(through, settings, config.output, wanted, caller, overwrite=config.overwrite)
    keys, part = dealt(config, writer)
    with Completions(config.path, settings, task, config.n, config.overwrite, COMPARED, part) as file:
        candidates = config.ctrlg.candidates if config.method == "ctrlg" else 1
        costs = Costs(config.path, config.method, task, file.texts, candidates)
        outcome = write_all(through, file, keys, caller, costs)
        if outcome.status != "done" or part is not None:
            return outcome  # what only the whole file tells, the same command adds once the parts are joined
        known = _distance(config, writer, through, outcome, costs, say)
        accepted = sum(task.complies(text, "both") for text in outcome.texts.values())
        known["training_seconds"] = writer.training_seconds
        costs.close(rows=len(outcome.texts), accepted=accepted, **known)
        if stop.received is not None:
            say(f"stopped by {stop.received.name}; {config.output} is complete")
            return Outcome("stopped", outcome.texts, stop.exit_code, task)
        return outcome


BASE_ITSELF = "it is the base model under the base prompt, a nucleus left out"


def _distance(
    config: SampleConfig,
    writer: "Prompted",
    through: "Prompted | SharedWriter",
    outcome: Outcome,
    costs: Costs,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What is known of the way to the base model: `kl`, and where the method tells it `p0` and `ess`."""
    from equipoise.methods.guided import Guided  # only here: it needs torch

    kl_runs = config.kl_runs(writer.task)
    if kl_runs == 0:
        return {}
    # Ctrl-G's file may be such sentences as would be drawn, each with its weight: then no others need be.
    own_do = isinstance(writer, Guided) and writer.covers_all and kl_runs <= config.n
    runs = config.n if own_do else kl_runs
    wanted = runs * len(writer.task.names)
    if costs.document.get("kl_sentences") == wanted:
        return {}
    own = (outcome.texts, costs.log_weights) if own_do else None
    known = have_done(through, partial(_measured, replace(config, task=writer.task), runs, own), say)
    if known is None:
        kl = {"value": 0.0, "low": 0.0, "high": 0.0, "how": BASE_ITSELF}
        return {"kl": kl, **{name: yields(outcome.texts, writer.task, "both")[name] for name in ("p0", "yield")}}
    return known


def _measured(
    config: SampleConfig,
    runs: int,
    own_sentences: tuple[Mapping[Key, str], Mapping[Key, float]] | None,
    writer: "Prompted",
    ranks: Ranks,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """The writer's KL to the base model from `runs` sentences of each occupation; None where it is that itself, nothing
    where there is no telling. `own_sentences`: the writer's, with their log weights, where they do."""
    # Only here: they need torch.
    from equipoise.methods.guided import Guided
    from equipoise.methods.kl import kl_to_base
    from equipoise.policy.sample import NonFiniteLogits

    # A trained model belongs to the prompt it was trained with; whatever prompt-best asks, its base has --prompt.
    own = config.prompt if config.method == "prompt-best" else config.prompt or writer.prompt_spec
    model = config.base_model or writer.base_model or writer.source.given
    base = made_alike(lambda: _prompted(config, model, config.base_prompt or own, ranks), ranks)
    if base.settings == writer.settings:
        return None
    wanted = runs * len(writer.task.names)
    say(f"estimating the KL to {base.name} under the prompt {base.prompt.name} from {plural(wanted, 'sentence')}")
    began = time.perf_counter()
    try:
        if isinstance(writer, Guided):
            known = writer.distance(runs, say, own_sentences, ranks)
        else:
            known = kl_to_base(writer, base, runs, say, ranks)
    except (UserError, NonFiniteLogits) as error:
        say(f"the KL is left out: {error}")
        return {}
    kl = known["kl"]
    say(f"KL {kl['value']:z.2f} nats per sentence ({kl['low']:z.2f} to {kl['high']:z.2f})")
    return {**known, "kl_sentences": wanted, "kl_seconds": round(time.perf_counter() - began, 3)}


def check_task(config: SampleConfig) -> None:
    """Raises UserError for a task that the method cannot meet with any model, where the task is given."""
    if config.method == "ctrlg" and config.task is not None:
        # Only here: the automaton needs a numerical library.
        from equipoise.methods.ctrlg.feasible import check_without_model

        check_without_model(config.ctrlg, config.task, config.max_new_tokens)


def _writer(config: SampleConfig, ranks: Ranks) -> "Prompted":
    check_task(config)
    model = config.model
    if model == "auto":
        model = FOLDERS.get(config.method, "bundled")
    if config.method in FOLDERS:
        check_trained(model)
        if model == SUPERVISED and not Path(model).exists():
            raise UserError(f"there is no model in {model} yet: make it with equipoise sft, or name one with --model")
    return _prompted(
        config,
        model,
        config.best_prompt if config.method == "prompt-best" else config.prompt,
        ranks,
        config.ctrlg if config.method == "ctrlg" else None,
    )


def _prompted(
    config: SampleConfig, model: str, prompt: str | None, ranks: Ranks, guidance: CtrlGConfig | None = None
) -> "Prompted":
    from equipoise.methods.guided import Guided
    from equipoise.methods.prompted import Prompted
    from equipoise.policy.load import own_device

    policy = config.policy_of(model)
    policy = replace(policy, device=own_device(policy.device, ranks))
    options: dict[str, Any] = {
        "prompt": prompt,
        "sampling": config.sampling,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "task": config.task,
    }
    return Prompted(policy, **options) if guidance is None else Guided(policy, guidance, **options)
