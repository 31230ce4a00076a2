"""What changes from step to step besides the weights and the optimizer."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from equipoise.measures.decomposition import PairRates
from equipoise.policy.memory import RowLimit
from equipoise.ppo import maths
from equipoise.ppo.base import BaseRates, distance
from equipoise.ppo.choice import Choice
from equipoise.ppo.config import DiversityConfig, PPOConfig, TrainConfig
from equipoise.ppo.diversity import TermWindow
from equipoise.ppo.functions import FunctionFailed
from equipoise.ppo.watch import Alert, Watch
from equipoise.ppo.window import Sentence, Window

RECENT = 8
"""Steps over whose sentences running measures are taken: 512 sentences at the guide's batch size."""
MOST = 2048
"""Of these sentences at most the last so many: the more texts there are, the more of their words and moulds were there
before, so that with large batches `watch/distinct_2` would be below its threshold whatever is written."""


@dataclass(frozen=True)
class Remedies:
    """What rollbacks after alerts have changed of the configuration so far."""

    rollbacks: int = 0
    diversity: float = 0.0
    """Added to the diversity weight; `opening` likewise to the opening weight."""
    opening: float = 0.0
    rate: float = 1.0
    """Factor of the policy's learning rate."""

    def describe(self) -> str:
        return f"diversity weight +{self.diversity:g}, opening weight +{self.opening:g}, learning rate ×{self.rate:g}"


@dataclass
class State:
    """All of it but `limit` and `diversity` is in every checkpoint."""

    step: int
    kl_coef: float
    window: TermWindow
    generator: torch.Generator
    limit: RowLimit
    diversity: DiversityConfig
    """As configured, without remedies."""
    watch: Watch
    recent: Window
    skipped: int = 0
    bad_in_a_row: int = 0
    rollbacks: int = 0
    base: BaseRates | None = None
    choice: Choice = field(default_factory=Choice)
    remedies: Remedies = field(default_factory=Remedies)
    unmarked: bool = False
    """Whether the evaluation that is due at this step is still to be made: a function of the user's failed in it."""

    @classmethod
    def begin(
        cls, config: TrainConfig, limit: RowLimit, leaked: Sequence[str] = (), rates: PairRates | None = None
    ) -> "State":
        """`leaked`: the terms in the prompt, for the watch; `rates`: of the untrained model's pairs, for the bonus."""
        generator = torch.Generator().manual_seed(config.seed)
        window, watch = TermWindow(config.diversity, config.task, rates), Watch(config.watch, config.task, leaked)
        recent = Window(min(RECENT * config.ppo.batch_size, MOST))
        return cls(0, config.ppo.kl_coef, window, generator, limit, config.diversity, watch, recent)

    def apply_remedies(self) -> None:
        """Have the diversity bonus pay what the remedies add to its weights."""
        more = self.remedies
        weight, opening = self.diversity.diversity_weight + more.diversity, self.diversity.opening_weight + more.opening
        self.window.config = replace(self.diversity, diversity_weight=weight, opening_weight=opening)

    def look_back(self, batch: Sequence[Sentence], entropy: float) -> dict[str, float]:
        """Take in the step's sentences; the running measures over the last ones, `entropy` being the step's (nats)."""
        self.recent.add(batch)
        return distance(self.recent, self.base) | self.watch.measure(self.recent, batch, entropy)

    def judge(self, metrics: dict[str, float]) -> list[Alert]:
        """The alerts that the step raises; how many stand afterwards is added to `metrics`."""
        raised = self.watch.judge(self.step, metrics)
        alerts = [self.watch.explain(sign, metrics, self.recent) for sign in raised]
        metrics["watch/standing"] = len(self.watch.standing)
        return alerts

    def adapt_kl_coef(self, kl: float, ppo: PPOConfig) -> None:
        """Steer the KL coefficient by the step's mean KL to the reference, nats per sentence."""
        self.kl_coef = maths.adapt_kl_coef(self.kl_coef, kl, ppo.ref_kl_target, ppo.batch_size, ppo.kl_horizon)

    @contextmanager
    def undone_where_a_function_fails(self, drawn: Tensor) -> Iterator[None]:
        """Count the step as not taken where the user's reward fails; `drawn`: the generator's state before it."""
        try:
            yield
        except FunctionFailed:
            self.step -= 1
            self.generator.set_state(drawn)
            raise

    def document(self) -> dict[str, Any]:
        """The part that is JSON."""
        return {
            "step": self.step,
            "kl_coef": self.kl_coef,
            "window": self.window.state(),
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "rollbacks": self.rollbacks,
            "recent": self.recent.state(),
            "base": self.base.document() if self.base else None,
            "watch": self.watch.state(),
            "choice": self.choice.state(),
            "remedies": asdict(self.remedies),
            "unmarked": self.unmarked,
            "python_random": random.getstate(),
        }

    def random_states(self) -> dict[str, Tensor]:
        out = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            out["cuda.0"] = torch.cuda.get_rng_state(0)  # nothing of a step is drawn from it
        return out

    def load(self, document: Mapping[str, Any], rng: Mapping[str, Tensor]) -> None:
        """Inverse of `document` and `random_states`."""
        self.step, self.kl_coef = document["step"], document["kl_coef"]
        self.skipped, self.bad_in_a_row = document["skipped"], document["bad_in_a_row"]
        self.rollbacks = document["rollbacks"]
        self.window.load_state(document["window"])
        self.recent.load_state(document["recent"])
        self.base = BaseRates(**document["base"]) if document["base"] else None
        self.watch.load_state(document["watch"])
        self.choice.load_state(document["choice"])
        self.remedies = Remedies(**document["remedies"])
        self.unmarked = document.get("unmarked", False)
        self.apply_remedies()
        version, internal, gauss = document["python_random"]
        random.setstate((version, tuple(internal), gauss))
        self.generator.set_state(rng["generator"])
        torch.set_rng_state(rng["torch"])
        if torch.cuda.is_available() and "cuda.0" in rng:
            torch.cuda.set_rng_state(rng["cuda.0"], 0)
