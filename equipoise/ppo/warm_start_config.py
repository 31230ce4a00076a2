"""Options of the warm start. Needs no torch, as options do not."""

from dataclasses import dataclass
from typing import Literal

from equipoise.errors import UserError
from equipoise.learning.search import BATCH, Search
from equipoise.runs.targets import is_target_file


@dataclass(frozen=True)
class WarmStartConfig:
    warm_start: Literal["off", "forced", "samples", "samples-if-found"] = "off"
    """`forced` begins each sentence with a term of each class, every combination alike, and lets the model go on at
    top-p 0.95; it needs a task with openings. `samples` keeps those of the model's free samples that comply, unchanged
    but rare. `samples-if-found` does the same, and where too few are found the run goes on without a warm start."""
    warm_start_file: str = ""
    """Take the sentences from this completions file, of any method, whatever --warm-start says: those that succeed
    strictly. It takes the place of those of --warm-start-target too."""
    warm_start_target: Literal["off", "near", "even"] = "off"
    """Begin with sentences of a target, the untrained model where it succeeds strictly: `near`, just so; `even`, all
    pairs of terms alike, or as --even-power says. Ctrl-G writes them, and its importance weights choose among them;
    they are kept for the next run of this model, task and prompt. It takes the place of --warm-start's first round."""
    warm_start_pool: int = 100_000
    """Sentences of Ctrl-G among which the first of the target are chosen."""
    warm_start_target_rounds: int = 3
    """Rounds in which a policy learns the target's sentences and writes others, among which its importance weights
    choose again; with 0 all are Ctrl-G's."""
    warm_start_target_samples: int = 100_000
    """Sentences that are written in each of these rounds."""
    warm_start_fluency: float = 0.0
    """The target has a factor exp(−this × a sentence's nats per token under the untrained model) more: sentences are
    more fluent, at the price of some KL. It takes rounds."""
    warm_start_copies: int = 1
    """A sentence of the file is learnt as often as it stands there, but no more often than this."""
    warm_start_sentences: int = 256
    """Distinct sentences to learn from."""
    warm_start_candidates: int = 1
    """Find so many sentences for each that is learnt, and keep some of them as `--warm-start-keep` says."""
    warm_start_keep: Literal["likeliest", "conditional", "even"] = "likeliest"
    """`likeliest`: of each pair of terms alike, those that the untrained model finds the likeliest, no two of one
    mould: variety, at the least price in fluency. `conditional`: resampled in proportion to π_ref/π, towards what the
    untrained model itself writes where it complies: nearness, from the second round on. `even`: the same within each
    pair, all pairs alike."""
    warm_start_rounds: int = 1
    """Rounds of finding and learning. After the first the sentences are the policy's own, as the last round left it."""
    warm_start_batch_size: int = BATCH
    """Sentences of one optimizer step."""
    warm_start_epochs: int = 2
    """Times that the stage goes through its sentences."""
    warm_start_learning_rate: float = 1e-4
    """Highest of the stage: it rises over a tenth of the steps and then falls to 0."""
    warm_start_budget: int = 20_000
    """Samples drawn at most in search of them."""

    @property
    def wanted(self) -> bool:
        return self.warm_start != "off" or self.given

    @property
    def given(self) -> bool:
        """Whether the first round's sentences come from a file."""
        return bool(self.warm_start_file) or self.warm_start_target != "off"

    @property
    def target(self) -> Literal["off", "near", "even"]:
        """The target whose sentences the first round learns: none where another file has them."""
        file = self.warm_start_file
        return "off" if file and not is_target_file(self.warm_start_target, file) else self.warm_start_target

    @property
    def search(self) -> Search:
        """How the sentences are found."""
        return Search(
            forced=self.warm_start == "forced",
            sentences=self.warm_start_sentences,
            candidates=self.warm_start_candidates,
            keep=self.warm_start_keep,
            budget=self.warm_start_budget,
        )

    def __post_init__(self) -> None:
        if self.warm_start_sentences < BATCH:
            raise UserError(f"warm-start-sentences {self.warm_start_sentences} must be at least {BATCH}")
        for name in ("warm_start_copies", "warm_start_candidates", "warm_start_rounds", "warm_start_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        resampled, forced = self.warm_start_keep != "likeliest", self.warm_start == "forced" and not self.given
        if resampled and forced and self.warm_start_rounds == 1:
            raise UserError(
                f"--warm-start-keep {self.warm_start_keep} needs sentences that the policy wrote freely, and one "
                "round of --warm-start forced has none: use --warm-start samples, or --warm-start-rounds 2"
            )
        if self.target != "off" and self.warm_start_pool < self.warm_start_sentences:
            raise UserError(
                f"warm-start-pool {self.warm_start_pool} is less than the {self.warm_start_sentences} sentences that "
                "--warm-start-sentences asks for: raise the first or lower the second"
            )
        if self.warm_start_target_rounds < 0 or self.warm_start_target_samples < BATCH:
            raise UserError(
                f"warm-start-target-rounds {self.warm_start_target_rounds} must be 0 (Ctrl-G's sentences alone) or "
                f"more, and warm-start-target-samples {self.warm_start_target_samples} at least {BATCH}"
            )
        if self.warm_start_fluency < 0:
            raise UserError(f"warm-start-fluency {self.warm_start_fluency} must be 0 (none) or more")
        if self.warm_start_epochs < 1 or self.warm_start_learning_rate <= 0:
            raise UserError(
                f"warm-start-epochs {self.warm_start_epochs} must be at least 1 and warm-start-learning-rate "
                f"{self.warm_start_learning_rate} above 0: --warm-start off leaves the stage out"
            )
