"""Rounds of importance sampling towards a target: the policy writes, its sentences are weighed and resampled, and it
learns from them; so each round's weights are more even than the last one's.

The target is π*(x) ∝ p₀(x)·[strict]·u(occupation)·v(pair), p₀ being the untrained model, u such that occupations come
alike, and v = 1 (`near`) or such that pairs do too (`even`). Adaptive importance sampling (O. Cappé, A. Guillin,
J.-M. Marin and C. Robert 2004) by maximum likelihood, as in the cross-entropy method (R. Rubinstein 1999); for language
models compare M. Khalifa, H. Elsahar and M. Dymetman (ICLR 2021).
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch

from equipoise.errors import UserError
from equipoise.learning.collect import CPU_ROWS
from equipoise.learning.supervised import Example, Supervision, supervise
from equipoise.measures.decomposition import FAILED, UNSEEN, Pair, PairRates
from equipoise.measures.raking import margins, raked, size, systematic
from equipoise.policy.config import SamplingConfig
from equipoise.policy.likelihood import continuation_nll, kl_to_reference
from equipoise.policy.load import Policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import sentences_of
from equipoise.policy.sample import sample
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task


class Target(NamedTuple):
    """What is written towards."""

    name: Literal["near", "even"]
    power: float = 0.0
    """Of `even`: pairs come in proportion to their share in `near` to this power; 0: all alike."""

    def wanted(self, near: Mapping[Pair, float]) -> dict[Hashable, float] | None:
        """Proportions of the pairs, from what they have in `near`; None for all alike."""
        return {pair: share**self.power for pair, share in near.items()} if self.power else None

    def kept(self, shares: Sequence[float], pairs: Sequence[Pair]) -> Mapping[Hashable, float] | None:
        """The same of pairs that have what is wanted already: as they are. None for all alike."""
        return margins(shares, pairs) if self.power else None

    def met(
        self,
        log_weights: Sequence[float],
        rows: Sequence[str],
        pairs: Sequence[Pair],
        wanted: Mapping[Hashable, float] | None,
    ) -> list[float]:
        """Shares with what the target wants of occupations and pairs, in proportion to the weights within each."""
        return raked(log_weights, rows, pairs, wanted) if self.name == "even" else raked(log_weights, rows)


GPU_ROWS = 2048
"""Written at a time on a GPU."""
SCORED = 512
"""Scored at a time on a GPU, at first."""


@dataclass(frozen=True)
class Rounds:
    """How many rounds there are, and of what size."""

    rounds: int
    samples: int
    """Sentences that the policy writes in each, and once more at the end."""
    learnt: int
    """Of which so many are learnt."""
    learning_rate: float
    """Highest of the first round; it falls by `FALL` from one to the next."""
    batch_size: int
    copies: int
    """A sentence is learnt so many times at most in a round."""
    seed: int = 0
    """Of the sentences and of the choice."""


class Author(NamedTuple):
    """A policy that writes and learns, and what for."""

    policy: Policy
    task: Task
    prompts: Mapping[str, list[int]]
    """Token ids of each occupation's prompt."""
    max_new_tokens: int


FALL = 0.7


class Weighed(NamedTuple):
    """A strictly successful sentence."""

    example: Example
    pair: Pair
    log_weight: float
    """log p₀(x)/π(x), π being the policy that wrote it, nats."""


class Sample(NamedTuple):
    found: list[Weighed]
    drawn: Mapping[str, int]
    """Sentences of each occupation that were written, the failing ones among them."""


class Shares(NamedTuple):
    """A sample as one of the target."""

    shares: list[float]
    """Of each sentence that was found; they sum to 1."""
    effective: float
    """Kish's effective sample size."""
    strict: float
    """Share of what was written that succeeds strictly."""
    kl: float
    """KL(π*‖π) in nats, estimated from the shares: by the sample itself, so too small where π leaves much of π* out."""
    log_ratios: list[float]
    """log π*(x)/p₀(x) of each sentence."""
    near: Mapping[Pair, float]
    """What each pair has in `near`, by the same sample."""


def draw(author: Author, count: int, generator: torch.Generator) -> Sample:
    """`count` sentences of the whole policy, top-p 1, over the occupations in turn. Raises NonFiniteLogits."""
    policy, task, prompts, max_new_tokens = author
    sampling = SamplingConfig(1.0, 1.0, max_new_tokens)
    occupations = list(itertools.islice(itertools.cycle(prompts), count))
    gpu = policy.device.type == "cuda"
    rows, limit = GPU_ROWS if gpu else CPU_ROWS, RowLimit(SCORED if gpu else CPU_ROWS, lambda _: None)
    found: list[Weighed] = []
    for first in range(0, count, rows):
        part = occupations[first : first + rows]
        # The last part is filled up: on a GPU every size has a decoder, with recordings and a cache, of its own.
        filled = [*part, *[part[0]] * (rows - len(part))] if gpu else part
        rollout = sample(policy, [prompts[o] for o in filled], sampling, generator).cpu()
        texts = sentences_of(policy.tokenizer, rollout, filled, task)[: len(part)]
        strict = [i for i, text in enumerate(texts) if task.strict(text)]
        if not strict:
            continue
        kept = rollout.select(torch.tensor(strict))
        ratios = limit.run(policy, partial(kl_to_reference, policy, [kept], sampling)).tolist()
        for i, completion, ratio in zip(strict, kept.completions(), ratios, strict=True):
            pair = task.match(texts[i]).first
            assert pair is not None, "a sentence that succeeds strictly holds every class"
            found.append(Weighed(Example(part[i], prompts[part[i]], completion, texts[i]), pair, -ratio))
    return Sample(found, Counter(occupations))


def groups_of(sample: Sample) -> list[list[tuple[Pair, float]]]:
    """As `pair_rates` takes them."""
    own: dict[str, list[tuple[Pair, float]]] = defaultdict(list)
    for each in sample.found:
        own[each.example.occupation].append((each.pair, math.exp(each.log_weight)))
    return [own[name] + [(FAILED, 0.0)] * (n - len(own[name])) for name, n in sample.drawn.items()]


def towards(sample: Sample, target: Target) -> Shares:
    """The sample weighed as one of the target. Raises ValueError where nothing was found."""
    found, drawn = sample
    rows = [each.example.occupation for each in found]
    logs = [each.log_weight - math.log(drawn[row]) for each, row in zip(found, rows, strict=True)]
    pairs = [each.pair for each in found]
    near = raked(logs, rows)
    of_pairs = margins(near, pairs)
    shares = near if target.name == "near" else target.met(logs, rows, pairs, target.wanted(of_pairs))
    # With O occupations, of each of which n were written: share = π*(x) / (O·n·π(x)).
    places = [math.log(share) + math.log(len(drawn) * drawn[row]) for share, row in zip(shares, rows, strict=True)]
    kl = math.fsum(share * place for share, place in zip(shares, places, strict=True))
    ratios = [place - each.log_weight for place, each in zip(places, found, strict=True)]
    return Shares(shares, size(shares), len(found) / sum(drawn.values()), kl, ratios, of_pairs)


def softened(found: Sequence[Weighed], shares: list[float], target: Target, least: float) -> tuple[float, list[float]]:
    """(exponent, shares): the weights to the highest power, at most 1, that leaves an effective sample size of `least`;
    occupations, and for `even` pairs, as before. What is learnt is then on the way from the policy to the target,
    and not a few sentences that happen to be heavy."""
    rows, columns = [each.example.occupation for each in found], [each.pair for each in found]
    logs = [math.log(share) for share in shares]

    def at(exponent: float) -> list[float]:
        return target.met([exponent * x for x in logs], rows, columns, target.kept(shares, columns))

    if size(shares) >= least:
        return 1.0, shares
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(middle)) >= least else (low, middle)
    return low, at(low)


HALVINGS = 6


class Whole(NamedTuple):
    """Samples of several rounds as one of the target."""

    found: list[Weighed]
    shares: list[float]
    effective: float
    log_ratios: list[float]
    nll: Sequence[float] = ()
    """`continuation_nll` of each, where it was measured."""


def together(samples: Sequence[Sample], target: Target) -> Whole:
    """The samples as one, each in proportion to its effective sample size. Occupations and pairs are then given once
    more what the target wants of them, by what pairs have in `near` over all samples, since a round may have missed
    some of them."""
    parts = [towards(sample, target) for sample in samples]
    effective = math.fsum(part.effective for part in parts)
    found = [each for sample in samples for each in sample.found]
    logs = [math.log(share * part.effective / effective) for part in parts for share in part.shares]
    rows, pairs = [each.example.occupation for each in found], [each.pair for each in found]
    near: dict[Pair, float] = defaultdict(float)
    for part in parts:
        for pair, share in part.near.items():
            near[pair] += share * part.effective / effective
    shares = target.met(logs, rows, pairs, target.wanted(near))
    ratios = [ratio for part in parts for ratio in part.log_ratios]
    ratios = [ratio + math.log(share) - old for ratio, share, old in zip(ratios, shares, logs, strict=True)]
    return Whole(found, shares, size(shares), ratios)


def judged(author: Author, whole: Whole, target: Target, tilt: float, count: int, copies: int, seed: int) -> Whole:
    """Some `count` of the sentences with their `nll`, and the target with a factor exp(−tilt·nll) more; occupations,
    and for `even` pairs, come as before. Of all such with so small a mean nll it is the nearest to the untrained
    model."""
    policy, task, *_ = author
    taken = systematic(whole.shares, strata(whole.found), count, copies, seed)
    times = Counter(taken.places)
    found = [whole.found[i] for i in times]
    occupations = [each.example.occupation for each in found]
    limit = RowLimit(SCORED if policy.device.type == "cuda" else CPU_ROWS, lambda _: None)
    texts = [each.example.text for each in found]
    nll = limit.run(policy, partial(continuation_nll, policy, texts, occupations, task))
    assert len(nll) == len(found), "strict sentences all continue the prefix"
    logs = [math.log(n) - tilt * value for n, value in zip(times.values(), nll, strict=True)]
    pairs = [each.pair for each in found]
    shares = target.met(logs, occupations, pairs, target.kept(whole.shares, [each.pair for each in whole.found]))
    before = {i: n / len(taken.places) for i, n in times.items()}
    ratios = [whole.log_ratios[i] + math.log(share / before[i]) for i, share in zip(times, shares, strict=True)]
    return Whole(found, shares, size(shares), ratios, nll)


def learn_towards(
    author: Author, first: Sequence[Example], target: Target, how: Rounds, say: Callable[[str], None]
) -> list[Sample]:
    """The sample of each round and of the end. The policy, which begins with `first`, is left as the last round has
    made it. Raises NonFiniteLogits, NonFiniteError; UserError where the policy never succeeds."""
    policy, seed = author.policy, how.seed
    generator = torch.Generator().manual_seed(seed)
    samples: list[Sample] = []
    examples = list(first)
    for number in range(how.rounds + 1):
        rate = how.learning_rate * FALL**number
        supervision = Supervision(1, rate, how.batch_size, warmup=0.1, decay=True)
        name = f"round {number} of {how.rounds}"

        def told(line: str, name: str = name) -> None:
            say(f"{name}: learning, {line}")

        supervise(policy, examples, generator, supervision, packed=True, say=told)
        policy.forget_recordings()
        samples.append(draw(author, how.samples, generator))
        if not samples[-1].found:
            raise UserError(
                f"{name} of the warm start's target: none of {plural(how.samples, 'sentence')} that the policy wrote "
                "succeeds strictly, so that there is nothing to learn from: raise --warm-start-target-samples or "
                "--warm-start-pool, or use --warm-start-target-rounds 0, Ctrl-G's sentences alone"
            )
        made = towards(samples[-1], target)
        exponent, shares = softened(samples[-1].found, made.shares, target, how.learnt / 2)
        taken = systematic(shares, strata(samples[-1].found), how.learnt, how.copies, seed + number)
        examples = [samples[-1].found[i].example for i in taken.places]
        say(
            f"{name}: {plural(how.samples, 'sentence')}, {100 * made.strict:.1f} % succeed, effective sample size "
            f"{made.effective:,.0f} ({100 * made.effective / how.samples:.1f} %), KL(target‖policy) {made.kl:.2f} "
            f"nats; weights to the power {exponent:.2f}, {100 * taken.cut:.1f} % cut off at {how.copies} copies"
        )
    return samples


def strata(found: Iterable[Weighed]) -> list[tuple[Pair, str]]:
    return [(each.pair, each.example.occupation) for each in found]


class Figures(NamedTuple):
    """Of the target itself, in nats per sentence: kl = compliance + variety + rest."""

    kl: float
    compliance: float
    variety: float
    rest: float
    """What success costs more in some occupations than in others, each having as many sentences as any, and what a
    factor for fluency costs."""
    pairs: float
    """Effective pairs."""
    different: float
    """Share of different texts in `DIFFERENT` sentences, too small where the sample is: it has no others than its
    own."""
    nll: float | None
    """Median nats per token, where it was measured."""


DIFFERENT = 5000


def figures(whole: Whole, rates: PairRates) -> Figures:
    """Of a target, from a sample of it."""
    found, shares = whole.found, whole.shares
    q: dict[Pair, float] = defaultdict(float)
    texts: dict[tuple[str, str], float] = defaultdict(float)
    for each, share in zip(found, shares, strict=True):
        q[each.pair] += share
        texts[each.example.occupation, each.example.text] += share
    kl = math.fsum(share * ratio for share, ratio in zip(shares, whole.log_ratios, strict=True))
    compliance = -math.log(rates.p0)
    of_class: dict[Pair, float] = defaultdict(float)
    for pair, x in q.items():
        of_class[pair if pair in rates.rates else UNSEEN] += x
    variety = math.fsum(x * math.log(x * rates.p0 / rates.probability(pair)) for pair, x in of_class.items())
    pairs = math.exp(-math.fsum(x * math.log(x) for x in q.values()))
    different = math.fsum(-math.expm1(DIFFERENT * math.log1p(-min(x, 1 - 1e-12))) for x in texts.values()) / DIFFERENT
    nll = _median(whole.nll, shares) if whole.nll else None
    return Figures(kl, compliance, variety, kl - compliance - variety, pairs, different, nll)


def _median(values: Sequence[float], shares: Sequence[float]) -> float:
    passed = 0.0
    for value, share in sorted(zip(values, shares, strict=True)):
        passed += share
        if passed >= 0.5:
            return value
    return max(values)


def described(made: Figures, effective: float) -> str:
    """A line for the person who waits."""
    nll = "" if made.nll is None else f", {made.nll:.2f} nats per token"
    return (
        f"the target itself: KL {made.kl:.2f} nats = {made.compliance:.2f} compliance + {made.variety:.2f} variety + "
        f"{made.rest:.2f} more; {made.pairs:.1f} effective pairs{nll}, at least {100 * made.different:.0f} % different "
        f"texts of {DIFFERENT:,} (effective sample size {effective:,.0f})"
    )
