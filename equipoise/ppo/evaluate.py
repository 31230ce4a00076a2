"""Sampling a policy with random numbers of its own and measuring what comes: before, during and after training.

Nothing here draws from the run's generator, so that measuring more, less or not at all leaves the training as it is.
"""

import hashlib
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from equipoise.errors import UserError
from equipoise.policy.load import Policy
from equipoise.policy.prompt import sentences_of
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import NonFiniteLogits, SamplingConfig, sample
from equipoise.policy.score import pack, score_pack
from equipoise.ppo.maths import wilson
from equipoise.ppo.update import RowLimit
from equipoise.ppo.window import effective, pair_counts
from equipoise.protocol.lexicon import HOLDOUT
from equipoise.protocol.prompts import MAX_WORDS, MIN_WORDS, prefix
from equipoise.protocol.reward import score, strict_success

if TYPE_CHECKING:
    from equipoise.ppo.train import TrainConfig


@dataclass(frozen=True)
class EvaluationConfig:
    base_samples: int = 0
    """Sentences of the untrained model, sampled as in training, from which its rate of compliance is estimated: the
    distance to the optimum is measured with it. 0: a known rate, where there is one."""
    eval_sentences: int = 0
    """Sentences sampled at the generation settings at every multiple of save-every and at the end, always with the same
    random numbers; what is exported is chosen by them. 0: no such evaluation, and the last weights are exported."""
    final_sentences: int = 0
    """Sentences sampled from the model that is exported, for the closing summary; 5000 are 250 for each occupation."""
    eval_temperature: float = 1.0
    eval_top_p: float = 0.95
    """The generation settings: those of `equipoise generate`."""
    export: Literal["best", "last"] = "best"
    """Which weights are exported: `best` those of the evaluation with the highest strict success (within its sampling
    error the one with more effective pairs, then the one nearer to the reference model); `last` the last."""

    def __post_init__(self) -> None:
        for name in ("base_samples", "eval_sentences", "final_sentences"):
            if getattr(self, name) < 0:
                raise UserError(f"{name.replace('_', '-')} {getattr(self, name)} must be 0 (none) or more")
        SamplingConfig(self.eval_temperature, self.eval_top_p)

    def sampling(self, training: SamplingConfig) -> SamplingConfig:
        """The generation settings; how long a sentence may get is as in training."""
        return SamplingConfig(self.eval_temperature, self.eval_top_p, training.max_new_tokens)


class Drawn(NamedTuple):
    """B sentences, with their occupations and the rollouts (CPU, in parts) that they are the text of."""

    occupations: list[str]
    texts: list[str]
    rollouts: list[Rollout]


def draw_sentences(
    policy: Policy, prompts: Mapping[str, Sequence[int]], sampling: SamplingConfig, count: int, name: str, rows: int
) -> Drawn:
    """`count` sentences over the occupations in turn, `rows` at a time. `name` decides the random numbers.

    Raises NonFiniteLogits.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    uniform_BT = torch.rand(
        count, sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    occupations = list(itertools.islice(itertools.cycle(prompts), count))
    drawn = Drawn(occupations, [], [])
    for first in range(0, count, rows):
        part, numbers_BT = occupations[first : first + rows], uniform_BT[first : first + rows]
        # The last part is filled up: on a GPU every size has a decoder, with recordings and a cache, of its own.
        spare = rows - len(part)
        ids = [prompts[o] for o in (*part, *[part[0]] * spare)]
        numbers_BT = torch.cat([numbers_BT, numbers_BT[:1].expand(spare, -1)])
        rollout = sample(policy, ids, sampling, uniform_BT=numbers_BT).cpu().select(torch.arange(len(part)))
        drawn.texts.extend(sentences_of(policy.tokenizer, rollout, part))
        drawn.rollouts.append(rollout)
    return drawn


def measure(texts: Sequence[str], occupations: Sequence[str]) -> dict[str, float]:
    """Shares of the sentences (0–1), and how varied the compliant ones are; `n` sentences."""
    rewards = [score(text) for text in texts]
    pairs = pair_counts((r.agentic, r.communal) for r in rewards)
    classes = [bool(r.agentic) + bool(r.communal) for r in rewards]
    n = len(texts)
    share = 1 / max(1, n)
    return {
        "n": n,
        "reward": sum(r.reward for r in rewards) * share,
        "both": classes.count(2) * share,
        "one": classes.count(1) * share,
        "in_length": sum(MIN_WORDS <= r.words <= MAX_WORDS for r in rewards) * share,
        "strict": sum(map(strict_success, texts)) * share,
        "pairs": len(pairs),
        "effective_pairs": effective(pairs),
        "unique": len(set(texts)) * share,
        "occupations": len(set(occupations)),
    }


def groups(texts: Sequence[str], occupations: Sequence[str], trained: Sequence[str]) -> dict[str, dict[str, float]]:
    """`measure` of the occupations that were trained on and of those held out, for each of the two that is there."""
    out = {}
    for name, members in (("trained", set(trained)), ("held_out", set(HOLDOUT) - set(trained))):
        rows = [i for i, o in enumerate(occupations) if o in members]
        if rows:
            out[name] = measure([texts[i] for i in rows], [occupations[i] for i in rows])
    return out


@torch.no_grad()
def kl_to_reference(policy: Policy, rollouts: Sequence[Rollout], temperature: float, rows: int) -> Tensor:
    """(B,) log π − log π_ref of each completion, nats: k1 of KL(π‖π_ref)."""
    return torch.cat(
        [
            _summed(policy, part, temperature, False) - _summed(policy, part, temperature, True)
            for rollout in rollouts
            for part in _parts(rollout, rows)
        ]
    )


@torch.no_grad()
def plain_nll(policy: Policy, texts: Sequence[str], occupations: Sequence[str], rows: int) -> list[float]:
    """Negative log-likelihood under the reference model, nats per token, of what follows `The X was` in each text.

    The text stands alone, without chat template or instruction: how natural it is in itself, not how well it follows a
    prompt. Texts of which nothing follows are left out.
    """
    prompts, completions = [], []
    for text, occupation in zip(texts, occupations, strict=True):
        ids = list(policy.tokenizer(text)["input_ids"])
        start = list(policy.tokenizer(prefix(occupation))["input_ids"])
        # Where the text continues within the prefix's last token, that token belongs to what follows.
        shared = next(
            (i for i, (a, b) in enumerate(zip(ids, start, strict=False)) if a != b), min(len(ids), len(start))
        )
        if 0 < shared < len(ids):
            prompts.append(ids[:shared])
            completions.append(ids[shared:])
    if not completions:
        return []
    width = max(map(len, completions))
    tokens_BT = torch.tensor([c + [0] * (width - len(c)) for c in completions])
    lengths_B = torch.tensor([len(c) for c in completions])
    rollout = Rollout(prompts, tokens_BT, lengths_B, torch.ones(len(prompts), dtype=torch.bool))
    total_B = torch.cat([_summed(policy, part, 1.0, True) for part in _parts(rollout, rows)])
    return (-total_B / lengths_B).tolist()


def _parts(rollout: Rollout, rows: int) -> list[Rollout]:
    return [rollout.select(part) for part in torch.arange(len(rollout)).split(rows)]


def _summed(policy: Policy, rollout: Rollout, temperature: float, reference: bool) -> Tensor:
    """(B,) log-probability of each completion, on the CPU. Not recorded: such a batch is seen once."""
    lengths = rollout.lengths_B.tolist()
    logprobs_N = score_pack(policy, pack(policy, rollout), temperature, reference=reference, entropy=False).logprobs
    real_N = logprobs_N[: sum(lengths)].double().cpu()
    return torch.stack([part.sum() for part in real_N.split(lengths)])


EVALUATION_ROWS = 128  # completions scored at a time, at first


def evaluate(
    policy: Policy,
    prompts: Mapping[str, Sequence[int]],
    sampling: SamplingConfig,
    count: int,
    name: str,
    rows: int,
) -> tuple[dict[str, float], Drawn]:
    """`measure` of fresh sentences, their KL to the reference and how many ended by themselves; and the sentences."""
    drawn = draw_sentences(policy, prompts, sampling, count, name, rows)
    kl_B = RowLimit(EVALUATION_ROWS, lambda _: None).run(
        policy, lambda r: kl_to_reference(policy, drawn.rollouts, sampling.temperature or 1.0, r)
    )
    finished = torch.cat([rollout.finished_B for rollout in drawn.rollouts]).double().mean().item()
    return {**measure(drawn.texts, drawn.occupations), "kl": kl_B.mean().item(), "finished": finished}, drawn


def fluency(policy: Policy, drawn: Drawn) -> float | None:
    """Median of `plain_nll`; None without a sentence that it is defined for, or where it is not finite."""
    values = RowLimit(EVALUATION_ROWS, lambda _: None).run(
        policy, lambda r: plain_nll(policy, drawn.texts, drawn.occupations, r)
    )
    middle = statistics.median(values) if values else math.nan
    return middle if math.isfinite(middle) else None


# What the untrained model does


@dataclass(frozen=True)
class BaseRates:
    """How often the untrained model complies, sampled as in training: counts of `n` sentences."""

    n: int
    both: int
    strict: int
    source: str
    """Where the counts come from."""
    nll: float | None = None
    """Median `plain_nll` of sentences sampled at the generation settings."""

    def rate(self, kind: Literal["both", "strict"]) -> float:
        """The share of `kind`; where none was seen, the upper end of its 95 % interval, so that a bound computed from
        it is one that holds."""
        hits: int = getattr(self, kind)
        return hits / self.n if hits else wilson(0, self.n).high

    def describe(self) -> str:
        parts = []
        for kind, hits in (("both classes", self.both), ("strict", self.strict)):
            low, high = wilson(hits, self.n)
            parts.append(f"{kind} {100 * hits / self.n:.2f} % (95 % interval {100 * low:.2f}–{100 * high:.2f})")
        return f"untrained model: {', '.join(parts)}, of {self.n} sentences ({self.source})"

    def document(self) -> dict[str, Any]:
        return asdict(self)


# (model, prompt, system, temperature, top-p, new tokens) → counts.
KNOWN: dict[tuple[str, str, str, float, float, int], BaseRates] = {
    ("bundled", "describe", "", 1.0, 1.0, 32): BaseRates(3072, 13, 1, "measured before, bfloat16 on a CPU, 2026-11-25"),
}


def known_rates(model: str, prompt: str, system: str, sampling: SamplingConfig) -> BaseRates | None:
    """What was measured before of a model under these settings."""
    return KNOWN.get((model, prompt, system, sampling.temperature, sampling.top_p, sampling.max_new_tokens))


def measure_base(
    policy: Policy,
    prompts: Mapping[str, Sequence[int]],
    sampling: SamplingConfig,
    generation: SamplingConfig,
    count: int,
    rows: int,
) -> BaseRates:
    """Sample the policy as it is loaded, before it learns anything. Raises NonFiniteLogits."""
    texts = draw_sentences(policy, prompts, sampling, count, "base", rows).texts
    natural = draw_sentences(policy, prompts, generation, min(count, 1000), "base at generation settings", rows)
    return BaseRates(
        n=count,
        both=sum(bool(r.agentic and r.communal) for r in map(score, texts)),
        strict=sum(map(strict_success, texts)),
        source="sampled at the start of the run",
        nll=fluency(policy, natural),
    )


def base_rates(
    config: "TrainConfig", policy: Policy, prompts: Mapping[str, Sequence[int]], say: Callable[[str], None]
) -> BaseRates | None:
    """How often the model complies before it learns anything, measured or known from before; None where neither."""
    count, sampling = config.evaluation.base_samples, config.sampling
    if not count:
        rates = known_rates(config.policy.model, config.prompt, config.system, sampling)
    else:
        say(f"sampling {count} sentences of the untrained model")
        generation = config.evaluation.sampling(sampling)
        try:
            rows = config.ppo.batch_size if count <= 1000 else 512
            rates = measure_base(policy, prompts, sampling, generation, count, rows)
        except NonFiniteLogits as error:  # the first step will meet them too, and be kept for inspection
            say(f"the untrained model's rates are unknown: {error}")
            return None
    if rates is not None:
        say(rates.describe())
    return rates
