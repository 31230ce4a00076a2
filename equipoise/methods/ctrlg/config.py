"""What is demanded of a sentence, and how the hidden Markov model is made."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from equipoise.errors import UserError

if TYPE_CHECKING:
    from equipoise.protocol.task import Task


@dataclass(frozen=True)
class CtrlGConfig:
    """The constraint, the guidance, and the distillation of the language model into a hidden Markov model (HMM)."""

    terms: Literal["both", "any"] = "both"
    """`both`: a term of every class; `any`: at least one term of any."""
    shape: Literal["strict", "free"] = "strict"
    """`strict`: one complete sentence of min-words to max-words words; `free`: only the terms are demanded."""
    min_words: int | None = None
    """Fewest words, the sentence's beginning (`The X was`) counted. Default: the task's."""
    max_words: int | None = None
    """Most words, the beginning counted. Default: the task's."""
    guidance: float = 1.0
    """Exponent of the look-ahead. 1 is Ctrl-G; 0 only forbids what can no longer become a valid sentence. Weights stay
    correct for any value."""
    candidates: int = 1
    """Sentences drawn for each one that is kept, with a probability in proportion to its importance weight. More of
    them come closer to the model's own sentences that comply, which are fluent and have few different terms (two: 58
    pairs in 5,000 sentences of the bundled model on the default task), and cost as many times the tokens."""
    hidden_states: int | None = None
    """States of the HMM. Default: 1024 on a GPU, 256 on a CPU."""
    distil_sentences: int | None = None
    """Sentences that are sampled freely from the model to make the HMM. Default: 100,000 on a GPU, 2,000 on a CPU."""
    em_passes: int = 10
    """Passes of expectation maximisation over those sentences."""
    distil_seed: int = 0
    """Seed of the sentences and the first clusters of the distillation."""

    def __post_init__(self) -> None:
        if self.min_words is not None and self.max_words is not None and self.min_words > self.max_words:
            raise UserError(
                f"min-words {self.min_words} and max-words {self.max_words} leave no length: lower the first or raise "
                "the second"
            )
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UserError(f"guidance {self.guidance} must be 0 or more; 1 is Ctrl-G")
        for name in ("min_words", "max_words", "candidates", "hidden_states", "distil_sentences", "em_passes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name.replace('_', '-')} {value} must be at least 1")

    def resolved(self, task: "Task", *, on_gpu: bool) -> "CtrlGConfig":
        """With the defaults of the task and the device filled in."""
        # On two CPU cores sampling takes 0.11 s a sentence, most of the method's time: 2,000 leave a small study of all
        # methods within a quarter of an hour. A worse HMM costs likelihood only, not compliance or unbiased weights.
        return replace(
            self,
            min_words=task.min_words if self.min_words is None else self.min_words,
            max_words=task.max_words if self.max_words is None else self.max_words,
            hidden_states=self.hidden_states or (1024 if on_gpu else 256),
            distil_sentences=self.distil_sentences or (100_000 if on_gpu else 2_000),
        )
