"""What changes from step to step besides the weights and the optimizer."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from equipoise.ppo.diversity import TermWindow
from equipoise.ppo.evaluate import BaseRates
from equipoise.ppo.update import RowLimit
from equipoise.ppo.window import Window

if TYPE_CHECKING:
    from equipoise.ppo.train import TrainConfig

RECENT = 512
"""Sentences over which running measures are taken: eight batches of the guide's size."""


@dataclass
class State:
    """All of it but `limit` is in every checkpoint."""

    step: int
    kl_coef: float
    window: TermWindow
    generator: torch.Generator
    limit: RowLimit
    skipped: int = 0
    bad_in_a_row: int = 0
    rollbacks: int = 0
    recent: Window = field(default_factory=lambda: Window(RECENT))
    base: BaseRates | None = None

    @classmethod
    def begin(cls, config: "TrainConfig", limit: RowLimit) -> "State":
        generator = torch.Generator().manual_seed(config.seed)
        return cls(0, config.ppo.kl_coef, TermWindow(config.diversity), generator, limit)

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
            "python_random": random.getstate(),
        }

    def random_states(self) -> dict[str, Tensor]:
        out = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            out |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
        return out

    def load(self, document: Mapping[str, Any], rng: Mapping[str, Tensor]) -> None:
        """Inverse of `document` and `random_states`."""
        self.step, self.kl_coef = document["step"], document["kl_coef"]
        self.skipped, self.bad_in_a_row = document["skipped"], document["bad_in_a_row"]
        self.rollbacks = document["rollbacks"]
        self.window.load_state(document["window"])
        self.recent.load_state(document["recent"])
        self.base = BaseRates(**document["base"]) if document["base"] else None
        version, internal, gauss = document["python_random"]
        random.setstate((version, tuple(internal), gauss))
        self.generator.set_state(rng["generator"])
        torch.set_rng_state(rng["torch"])
        cuda = [rng[k] for k in sorted(rng) if k.startswith("cuda.")]
        if torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(cuda)
