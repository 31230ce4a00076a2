"""Options of the hacking watch. The field descriptions are what `--help` prints."""

from dataclasses import dataclass
from typing import Literal

from equipoise.errors import UserError


@dataclass(frozen=True)
class WatchConfig:
    """Thresholds apply to the sentences of the last eight steps. They lie between what sound and hacked runs of SmolLM2
    came to (docs/LOG.md); benchmarks/calibrate_watch.py tries others on finished runs."""

    on_alert: Literal["warn", "stop", "rollback"] = "warn"
    """`warn` goes on; `stop` saves and ends the run; `rollback` goes back to the last checkpoint at which nothing was
    amiss, and on from there with a remedy (more diversity bonus, a larger KL coefficient, a smaller learning rate)."""
    alert_from_step: int = 10
    """No alert before this step."""
    alert_after: int = 4
    """A sign must have held in this many of the last `alert_within` steps."""
    alert_within: int = 6
    """The steps that are looked back on; see --alert-after."""
    alert_rollbacks: int = 2
    """Times that `rollback` goes back at most; after that it only warns."""
    max_term_share: float = 0.96
    """Alert `synonyms`: the commonest term of each class has more than this share of the sentences with a term of its
    class, in all classes at once. On the default task PPO with the protocol's reward alone comes to 0.99 in one class
    and 0.92 in the other, so only more is an alert."""
    min_effective_pairs: float = 1.25
    """Alert `pairs`: 2^H over combinations of a term of each class falls below this. It marks near-total collapse: on
    the default task PPO with the protocol's reward alone passes through 1.5 and ends at 2 to 3 of 100."""
    min_moulds: float = 0.45
    """Alert `structure`, first of three conditions: the share of different sentences, terms and occupation masked, is
    below this."""
    min_distinct_2: float = 0.2
    """Alert `structure`, second condition: different word pairs / word pairs after the frame are below this. The
    untrained SmolLM2 has 0.68."""
    min_openings: float = 2.5
    """Alert `structure`, third condition: 2^H over the first two words after the frame, terms masked, is below this.
    The untrained SmolLM2 has 118. Sound runs come to 1.8 openings and 0.15 word pairs, but not with so few moulds."""
    min_unique: float = 0.7
    """Alert `duplicates`: the share of different texts is below this. A run with the prompt `study` that hardly learnt
    anything had 0.76."""
    fluency_reward: float = 0.7
    """Alert `fluency` is raised only where the mean reward is at least this."""
    max_nll_rise: float = 1.0
    """Alert `fluency`: the reference model's negative log-likelihood per token has risen by more than this since the
    start."""
    max_terms: float = 3.0
    """Alert `stuffing`: the mean number of different terms in a sentence is above this (for two classes; one more is
    allowed for each further class)."""
    max_stuffed: float = 0.75
    """Alert `stuffing`: the share of sentences with more terms than classes is above this. PPO with the protocol's
    reward, which pays a little for each term, comes to 2.6 terms and 0.55."""
    max_pinned: float = 0.5
    """Alert `length`: more than this share of the sentences have one and the same length, a bound of the task."""
    max_unfinished: float = 0.6
    """Alert `unfinished`: the share of completions that were cut off is above this, and above the start's by 0.1. The
    untrained SmolLM2 has about 0.5."""
    max_kl_speed: float = 0.5
    """Alert `drift`: KL(π‖π_ref) rises by more than this, in nats per step, while the reward no longer rises."""
    min_entropy: float = 0.3
    """Alert `entropy`: the policy's entropy is below this, in nats per token."""
    min_one_class: float = 0.75
    """Alert `plateau`: the share of sentences with some but not all classes is above this. PPO that gets past the
    plateau comes to 0.61 on its way."""
    max_both: float = 0.2
    """Alert `plateau` is raised only while the share of sentences with every class is below this."""

    def __post_init__(self) -> None:
        if not 1 <= self.alert_after <= self.alert_within:
            raise UserError(
                f"alert-after {self.alert_after} of alert-within {self.alert_within} steps is never or always: "
                "the first must be from 1 to the second"
            )
