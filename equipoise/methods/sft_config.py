"""Every option of `equipoise sft`. Needs no torch."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from equipoise.errors import UserError
from equipoise.methods.sample import SUPERVISED
from equipoise.options import OptionalTask
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.out_config import OutConfig
from equipoise.protocol.reward import Event
from equipoise.protocol.task import Task
from equipoise.tables.layout import Columns, Form

FORCED = "forced"
"""What `data` is on the command line where the model writes the sentences itself; a file of this name is ./forced."""
FORCED_SENTENCES = 750
"""As many as the public study's supervised fine-tuning learnt from."""
SENTENCES = "sentences.csv"
"""The sentences that the model wrote itself, beside what was learnt from them."""
OUT = tuple(field.name for field in dataclasses.fields(OutConfig))
"""What changes no number of the model."""
DRAWS_PER_SENTENCE = 40
"""The default budget. The bundled model draws 7 for each sentence that it finds."""


class OwnSentences(NamedTuple):
    """Learn from sentences that the model writes itself."""

    sentences: int
    """To collect."""
    candidates: int
    """To find for each that is learnt."""
    budget: int
    """Samples drawn at most."""


class GivenSentences(NamedTuple):
    """Learn from a completions file."""

    path: Path
    at_most: int | None
    """So many of its sentences, drawn at random; all where None."""
    columns: Columns = Columns()
    form: Form = "auto"
    encoding: str | None = None


def check_own_sentences(task: Task, option: str = "--data") -> None:
    """Raises UserError for a task of which no model writes a sentence that could be learnt, whose length is fixed."""
    task.check_new_tokens(SamplingConfig().max_new_tokens, f"give a completions file with {option}")


@dataclass(frozen=True)
class SftConfig(OutConfig):
    """Which sentences are learnt, by what model, and how."""

    data: str = ""
    """Sentences of any method, in any layout that `equipoise evaluate` reads; rows that fail the filter are left out,
    and counted. Or `forced`: sentences that the model itself writes after a term of each class, every combination
    alike; they are kept in sentences.csv beside the trained model. For a task without openings `forced` takes the
    model's free samples that comply. Required."""
    output_dir: str = SUPERVISED
    """Where the trained model goes."""
    task: OptionalTask = None
    """A task file, or the name of a packaged task: occupations, classes of terms, frame, bounds and prompts. Default:
    the task that the model was trained on, if it says."""
    prompt: str | None = None
    """The prompt that the sentences are learnt as answers to: the name of one of the task's (`raw` gives no instruction
    at all), or NAME=INSTRUCTION. Default: the task's first."""
    system: str = ""
    """The system message before the prompt. Empty by default."""
    filter: Event = "strict"
    """Which sentences are learnt. `both`: those with a term of every class, however many classes the task has.
    `strict`: those among them that keep within the task's bounds of length and are one complete sentence."""
    sentences: int | None = None
    """With `forced`: how many sentences are collected; 750 by default, as many as the public study's supervised
    fine-tuning learnt from. With a file: learn at most so many, drawn from it at random; all by default."""
    candidates: int = 1
    """With `forced`: find so many sentences for each that is learnt, and learn those that the model itself finds the
    likeliest, of each combination of terms alike."""
    text_column: str | None = None
    """With a file: its column of texts, where the name is none of the usual."""
    occupation_column: str | None = None
    """With a file: its column of occupations, likewise. Where there is none, they are read from the texts."""
    form: Form = "auto"
    """With a file: whether texts are whole sentences or continue the task's frame. `auto`: as they begin."""
    encoding: str | None = None
    """Of the file, where it is not UTF-8: for instance cp1252."""
    budget: int | None = None
    """With `forced`: samples drawn at most in search of them. Default: 40 for each that is to be found."""
    epochs: int = 5
    """Held-out sentences are likeliest after the second. Compliance goes on rising: of 200 sentences of the bundled
    model, trained on 200 forced ones, 62 % after three; of 400, trained on 750, all after five."""
    learning_rate: float | None = None
    """Highest of the run. Default: 5e-4 for adapters, 2e-5 for all weights."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls to 0."""
    held_out: float = 0.1
    """Share of the sentences that is only scored, after each epoch."""
    seed: int = 0
    """Of everything that is random."""
    check: int = 10
    """Sentences per occupation that the trained model writes at the end, for a first look; 0 for none."""
    pieces: int = 0
    """Into how many each batch of 16 sentences is cut, each a pass of its own, that the processes share alike. They
    decide how sums are rounded, and the number of processes nothing. 0: as many as processes."""
    overwrite: bool = False
    """Train anew, giving up the model in the folder."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)

    def __post_init__(self) -> None:
        if self.task is not None and self.prompt is not None:
            self.task.prompt(self.prompt)
        self.check_out(self.policy.tuning)
        least = {"sentences": 1, "epochs": 1, "check": 0, "candidates": 1, "budget": 1, "pieces": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name} {value} must be at least {low}")
        if self.data not in ("", FORCED) and (self.candidates > 1 or self.budget is not None):
            name = "candidates" if self.candidates > 1 else "budget"
            raise UserError(f"--{name} is for --data {FORCED}: the sentences of a file are there already; leave it out")
        if not 0 < self.rate < math.inf:
            raise UserError(f"--learning-rate {self.rate} must be above 0; 5e-4 is usual for adapters")
        if not (0 <= self.warmup < 1 and 0 <= self.held_out < 1):
            raise UserError(f"--warmup {self.warmup} and --held-out {self.held_out} are shares: 0 or more, below 1")

    @property
    def source(self) -> OwnSentences | GivenSentences:
        """What `data` and the options beside it mean. Raises UserError where nothing is said."""
        if not self.data:
            raise UserError(
                "nothing says what to learn from: name a completions file with --data FILE, or let the model write the "
                "sentences with --data forced"
            )
        if self.data != FORCED:
            columns = Columns(self.text_column, self.occupation_column)
            return GivenSentences(Path(self.data), self.sentences, columns, self.form, self.encoding)
        sentences = self.sentences or FORCED_SENTENCES
        budget = self.budget or DRAWS_PER_SENTENCE * sentences * self.candidates
        return OwnSentences(sentences, self.candidates, budget)

    @property
    def rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 5e-4 if self.policy.tuning == "lora" else 2e-5
