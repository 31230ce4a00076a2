"""How often the untrained model complies, before it learns anything."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from equipoise.measures.shares import kl_bound, wilson
from equipoise.policy.config import SamplingConfig
from equipoise.policy.load import Policy
from equipoise.policy.packaged import SMOLLM2
from equipoise.policy.sample import NonFiniteLogits
from equipoise.policy.source import resolve
from equipoise.ppo.evaluate import draw_sentences, fluency
from equipoise.ppo.window import Window
from equipoise.protocol.plural import plural
from equipoise.protocol.task import PROTOCOL, Task
from equipoise.runs.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from equipoise.ppo.config import TrainConfig


@dataclass(frozen=True)
class BaseRates:
    """How often the untrained model complies, sampled as in training: counts of `n` sentences."""

    n: int
    both: int
    strict: int
    source: str
    """Where the counts come from."""
    nll: float | None = None
    """Median `continuation_nll` of sentences sampled at the generation settings."""

    def rate(self, kind: Literal["both", "strict"]) -> float:
        """The share of `kind`; where none was seen, the upper end of its 95 % interval, so that a bound computed from
        it is one that holds."""
        hits: int = getattr(self, kind)
        return hits / self.n if hits else wilson(0, self.n).high

    def describe(self, task: Task) -> str:
        """One line, with 95 % intervals."""
        parts = []
        for kind, hits in ((task.all_classes, self.both), ("strict", self.strict)):
            low, high = wilson(hits, self.n)
            parts.append(f"{kind} {100 * hits / self.n:.2f} % (95 % interval {100 * low:.2f}–{100 * high:.2f})")
        return f"untrained model: {', '.join(parts)}, of {plural(self.n, 'sentence')} ({self.source})"

    def document(self) -> dict[str, Any]:
        return asdict(self)


# (prompt, system, temperature, top-p, new tokens) → counts of the bundled model on all occupations of the default task.
KNOWN: dict[tuple[str, str, float, float, int], BaseRates] = {
    ("describe", "", 1.0, 1.0, 32): BaseRates(3072, 13, 1, "measured before, bfloat16 on a CPU, 2026-11-25"),
}


def known_rates(config: "TrainConfig") -> BaseRates | None:
    """What was measured before of the very model, task, occupations, prompt and decoding; None for any other."""
    own = resolve(config.policy.model).packaged == SMOLLM2 and not config.policy.use_8bit
    if not own or config.task != PROTOCOL or set(config.occupations) != set(PROTOCOL.names):
        return None
    sampling = config.sampling
    return KNOWN.get(
        (config.prompt, config.system, sampling.temperature, sampling.top_p, sampling.max_new_tokens),
    )


def measure_base(
    policy: Policy,
    task: Task,
    prompts: Mapping[str, Sequence[int]],
    sampling: SamplingConfig,
    generation: SamplingConfig,
    sizes: tuple[int, int],
    tick: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> BaseRates:
    """Sample the policy as it is loaded, before it learns anything. `sizes`: how many sentences, and how many at a
    time. `tick` is called before each batch (see `draw_sentences`), and may raise to end it. Raises NonFiniteLogits."""
    count, rows = sizes
    texts = draw_sentences(policy, task, prompts, sampling, count, "base", rows, tick, ranks).texts
    name = "base at generation settings"
    natural = draw_sentences(policy, task, prompts, generation, min(count, 1000), name, rows, tick, ranks)
    return BaseRates(
        n=count,
        both=sum(task.match(text).complete for text in texts),
        strict=sum(map(task.strict, texts)),
        source="sampled at the start of the run",
        nll=fluency(policy, natural, task, ranks),
    )


def base_rates(
    config: "TrainConfig",
    policy: Policy,
    prompts: Mapping[str, Sequence[int]],
    say: Callable[[str], None],
    tick: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> BaseRates | None:
    """How often the model complies before it learns anything, measured or known from before; None where neither.
    `tick` is called between batches (see `draw_sentences`), and may raise to end it."""
    count, sampling = config.evaluation.base_samples, config.sampling
    if not count:
        rates = known_rates(config)
    else:
        say(f"sampling {plural(count, 'sentence')} of the untrained model")
        generation = config.evaluation.sampling(sampling)
        try:
            rows = config.ppo.batch_size if count <= 1000 else 512
            rates = measure_base(policy, config.task, prompts, sampling, generation, (count, rows), tick, ranks)
        except NonFiniteLogits as error:  # the first step will meet them too, and be kept for inspection
            say(f"the untrained model's rates are unknown: {error}")
            return None
    if rates is not None:
        say(rates.describe(config.task))
        say(two_distances(rates, config.task, config.ppo.target_kl))
    return rates


def two_distances(rates: BaseRates, task: Task, target_kl: float) -> str:
    """What the two numbers are that go by the name of KL, and where each of them should be."""
    least = kl_bound(1.0, rates.rate("both"))
    return (
        f"two KLs: a step's update stays about {target_kl:g} nats per token (--target-kl); the distance to the "
        f"reference grows with what is learnt, and is at least {least:.1f} nats per sentence once all have "
        f"{task.all_classes}"
    )


def distance(recent: Window, base: BaseRates | None) -> dict[str, float]:
    """KL(π‖π_ref) of the last sentences beyond what their compliance needs; nothing where the base is unknown."""
    if base is None:
        return {}
    kl = recent.mean(s.kl for s in recent.sentences)
    bound = kl_bound(recent.mean(s.complete for s in recent.sentences), base.rate("both"))
    strict = kl_bound(recent.mean(s.strict for s in recent.sentences), base.rate("strict"))
    return {"kl/bound": bound, "kl/excess": kl - bound, "kl/excess_strict": kl - strict}
