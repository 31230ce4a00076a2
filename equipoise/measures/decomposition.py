"""What a KL to the reference model is spent on: compliance, variety of pairs, and the rest, which is waste.

With the classes of outcomes {fails} ∪ {succeeds with pair k}, data processing gives KL(π‖π_ref) ≥ KL between the
classes' probabilities (Cover & Thomas, Elements of Information Theory, 2nd ed., section 2.8), which is

    Σ_k c·q_k·ln(c·q_k / A_k) + (1−c)·ln((1−c) / (1−p0)) = kl(c‖p0) + c·KL(q‖A/p0):

c is the policy's share of successes, q its distribution over pairs among them, A_k the reference's probability of a
success with pair k, p0 = ΣA. The first term is what compliance costs, the second what variety costs; what KL is more is
the mean of KL within the classes. Everything in nats per sentence.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from equipoise.measures.shares import Z_95, kl_bound

Pair = tuple[str, ...]
"""The first term of each class in a sentence."""


class Rate(NamedTuple):
    """A probability under the reference, and the variance of this estimate of it."""

    value: float
    variance: float


class PairRates(NamedTuple):
    """How often the reference model's sentence succeeds with each pair."""

    rates: Mapping[Pair, Rate]
    """A_k of every pair that was seen."""
    unseen: float
    """Upper limit of the probability of a success with any other pair."""
    n: int
    """Sentences that it was estimated from."""

    @property
    def p0(self) -> float:
        """The probability of a success with one of the pairs that were seen."""
        return math.fsum(rate.value for rate in self.rates.values())


class Outcomes(NamedTuple):
    """The sentences of one class of outcomes."""

    n: int
    mean: float
    """Of log π − log π_ref, nats."""
    variance: float
    """Of the same, the sum of squares divided by n."""


class Part(NamedTuple):
    """Nats per sentence with a 95 % interval."""

    value: float
    low: float
    high: float


class Split(NamedTuple):
    """A KL and what it is spent on: kl = compliance + variety + waste."""

    kl: Part
    compliance: Part
    variety: Part
    waste: Part
    share: float
    """c: successes among the sentences."""
    unseen: float
    """Share of the successes whose pair the reference was never seen to write."""
    n: int
    """Sentences of the policy."""


def pair_rates(groups: Iterable[Sequence[tuple[Pair, float]]]) -> PairRates:
    """From sentences drawn under a guide, for each occupation (pair, w) of all of them; w = p/q, the probability of the
    sentence under the reference by that under the guide. Every occupation counts alike.

    The mean of w·1[pair = k] is an unbiased estimate of A_k. Of pairs never seen it is 0, and the upper limit is
    −ln 0.05 / n times the largest weight seen: with 95 % probability the guide writes such a sentence less often than
    that, and none of them is taken to weigh more than the heaviest of all. Raises ValueError for an occupation with
    fewer than two sentences.
    """
    groups = list(groups)
    sums: dict[Pair, float] = defaultdict(float)
    variances: dict[Pair, float] = defaultdict(float)
    heaviest, n = 0.0, sum(map(len, groups))
    for group in groups:
        if len(group) < 2:
            raise ValueError("an occupation needs two sentences for a variance")
        own: dict[Pair, list[float]] = defaultdict(list)
        for pair, weight in group:
            own[pair].append(weight)
            heaviest = max(heaviest, weight)
        for pair, weights in own.items():
            mean = math.fsum(weights) / len(group)
            squares = math.fsum(w * w for w in weights) / len(group) - mean * mean
            sums[pair] += mean / len(groups)
            variances[pair] += squares / (len(group) - 1) / len(groups) ** 2
    rates = {pair: Rate(sums[pair], variances[pair]) for pair in sorted(sums) if sums[pair] > 0}
    return PairRates(rates, -math.log(0.05) / n * heaviest, n)


def outcomes(sentences: Iterable[tuple[Pair | None, float]]) -> dict[Pair | None, Outcomes]:
    """From (pair, log π − log π_ref) of each sentence, None standing for one that fails."""
    own: dict[Pair | None, list[float]] = defaultdict(list)
    for pair, ratio in sentences:
        own[pair].append(ratio)
    made = {}
    for pair, ratios in own.items():
        mean = math.fsum(ratios) / len(ratios)
        made[pair] = Outcomes(len(ratios), mean, math.fsum((x - mean) ** 2 for x in ratios) / len(ratios))
    return made


def split(seen: Mapping[Pair | None, Outcomes], reference: PairRates) -> Split:
    """The parts of the KL of one and the same sample of sentences.

    Pairs that the reference was never seen to write are one class, with its upper limit: the variety is then the least
    that it can be, and the waste the most. Both estimates of a logarithm are corrected for their first-order bias (of q
    as Miller 1955 and Madow 1948 do, of A by the delta method), and the intervals are the delta method's: of the
    sentences, and of A. Raises ValueError where the policy has fewer than two sentences, and where the reference was
    never or always seen to succeed.
    """
    n = sum(each.n for each in seen.values())
    if n < 2:
        raise ValueError("two sentences are needed")
    if not 0 < reference.p0 < 1:
        raise ValueError(f"the reference succeeds with probability {reference.p0:g}: nothing can be compared with that")
    pooled: dict[Pair | None, int] = defaultdict(int)
    for pair, each in seen.items():
        pooled[pair if pair is None or pair in reference.rates else ()] += each.n
    share = 1 - pooled.get(None, 0) / n
    p0, kl = reference.p0, math.fsum(each.n * each.mean for each in seen.values()) / n
    compliance = kl_bound(share, p0)
    known = {pair: m / n for pair, m in pooled.items() if pair}
    # ℓ of a class, ln π(class)/π_ref(class): its mean is the bound, and that of log π − log π_ref − ℓ the waste.
    level: dict[Pair | None, float] = {pair: math.log(m / reference.rates[pair].value) for pair, m in known.items()}
    if pooled.get(()):
        level[()] = math.log(pooled[()] / n / reference.unseen)
    if pooled.get(None):
        level[None] = math.log((1 - share) / (1 - p0))
    bound = math.fsum(pooled[pair] / n * level[pair] for pair in level)

    spread = {pair: reference.rates[pair].variance for pair in known}
    of_p0 = math.fsum(rate.variance for rate in reference.rates.values())
    curve = share / p0**2 + (1 - share) / (1 - p0) ** 2
    bias_compliance = of_p0 / 2 * curve
    relative = {pair: spread[pair] / reference.rates[pair].value ** 2 for pair in known}
    pairs = sum(1 for pair in pooled if pair is not None)
    bias_bound = math.fsum(m * relative[pair] for pair, m in known.items()) / 2 + max(0, pairs - 1) / (2 * n)
    bias_bound += of_p0 / 2 * (1 - share) / (1 - p0) ** 2
    compliance -= bias_compliance
    bound -= bias_bound

    # Slopes by A_k, those of p0 in them.
    of_rest = (1 - share) / (1 - p0)
    slope_c = of_rest - share / p0
    slopes = {pair: of_rest - known.get(pair, 0.0) / rate.value for pair, rate in reference.rates.items()}
    of_rates = reference.rates.values()
    error_c = math.sqrt(math.fsum(slope_c**2 * r.variance for r in of_rates))
    error_b = math.fsum(slopes[pair] ** 2 * rate.variance for pair, rate in reference.rates.items())
    error_v = math.fsum((slopes[pair] - slope_c) ** 2 * rate.variance for pair, rate in reference.rates.items())
    succeeded = compliance_level(share, p0)
    at = {pair: level[pair if pair is None or pair in reference.rates else ()] for pair in seen}
    over_kl = _variance({pair: each.mean for pair, each in seen.items()}, seen, within=True)
    over_v = _variance({pair: at[pair] - succeeded[pair is not None] for pair in seen}, seen, within=False)
    over_w = _variance({pair: each.mean - at[pair] for pair, each in seen.items()}, seen, within=True)
    over_c = _variance({pair: succeeded[pair is not None] for pair in seen}, seen, within=False)
    return Split(
        _part(kl, math.sqrt(over_kl)),
        _part(compliance, math.hypot(error_c, math.sqrt(over_c))),
        _part(bound - compliance, math.sqrt(error_v + over_v)),
        _part(kl - bound, math.sqrt(error_b + over_w)),
        share,
        pooled.get((), 0) / (n * share) if share else 0.0,
        n,
    )


def compliance_level(share: float, p0: float) -> tuple[float, float]:
    """ln π(class)/π_ref(class) of failing and of succeeding."""
    fails = math.log((1 - share) / (1 - p0)) if share < 1 else 0.0
    return fails, math.log(share / p0) if share and p0 else 0.0


def _variance(values: Mapping[Pair | None, float], seen: Mapping[Pair | None, Outcomes], *, within: bool) -> float:
    """Of the mean over sentences of what has these means in the classes, and with `within` the ratios' variance."""
    n = sum(each.n for each in seen.values())
    mean = math.fsum(each.n * values[pair] for pair, each in seen.items()) / n
    total = math.fsum(
        each.n * ((values[pair] - mean) ** 2 + (each.variance if within else 0.0)) for pair, each in seen.items()
    )
    return total / n / (n - 1)


def _part(value: float, error: float) -> Part:
    half = Z_95 * error
    return Part(value, value - half, value + half)


def pooled(samples: Iterable[Mapping[Pair | None, Outcomes]]) -> dict[Pair | None, Outcomes]:
    """Several samples as one."""
    together: dict[Pair | None, Outcomes] = {}
    for sample in samples:
        for pair, each in sample.items():
            n, mean, variance = together.get(pair, Outcomes(0, 0.0, 0.0))
            total, step = n + each.n, each.mean - mean
            squares = n * variance + each.n * each.variance + step * step * n * each.n / total
            together[pair] = Outcomes(total, mean + step * each.n / total, squares / total)
    return together


def least_variety(reference: PairRates, points: int = 61) -> list[tuple[float, float]]:
    """(effective pairs, least KL(q‖p) of any q over the pairs seen with so many), from p itself to all pairs alike.

    Among all q of one entropy the nearest to p is proportional to a power of it (Lagrange; here from 1 down to 0)."""
    p = [rate.value / reference.p0 for rate in reference.rates.values()]
    curve = []
    for i in range(points):
        powers = [x ** (1 - i / (points - 1)) for x in p]
        q = [x / math.fsum(powers) for x in powers]
        entropy = -math.fsum(x * math.log(x) for x in q)
        kl = math.fsum(x * math.log(x / y) for x, y in zip(q, p, strict=True))
        curve.append((math.exp(entropy), max(0.0, kl)))
    return curve


# As records hold them


def outcomes_document(seen: Mapping[Pair | None, Outcomes]) -> list[dict[str, Any]]:
    return [{"pair": pair and list(pair), **each._asdict()} for pair, each in seen.items()]


def read_outcomes(document: Any) -> dict[Pair | None, Outcomes]:
    """Raises ValueError for what is no such document."""
    try:
        read = {
            None if row["pair"] is None else tuple(map(str, row["pair"])): Outcomes(
                int(row["n"]), float(row["mean"]), float(row["variance"])
            )
            for row in document
        }
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"no outcomes of sentences ({error})") from None
    if any(each.n < 1 or not math.isfinite(each.mean) or not 0 <= each.variance < math.inf for each in read.values()):
        raise ValueError("outcomes need counts of 1 or more, finite means and variances of 0 or more")
    return read


def rates_document(rates: PairRates) -> dict[str, Any]:
    pairs = [{"pair": list(pair), **rate._asdict()} for pair, rate in rates.rates.items()]
    return {"pairs": pairs, "unseen": rates.unseen, "n": rates.n}


def read_rates(document: Any) -> PairRates:
    """Raises ValueError for what is no such document."""
    try:
        rates = {
            tuple(map(str, row["pair"])): Rate(float(row["value"]), float(row["variance"])) for row in document["pairs"]
        }
        read = PairRates(rates, float(document["unseen"]), int(document["n"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"no probabilities of pairs ({error})") from None
    if not all(0 < rate.value < 1 and 0 <= rate.variance < math.inf for rate in rates.values()):
        raise ValueError("probabilities of pairs lie between 0 and 1, their variances are 0 or more")
    if not (0 < read.unseen < math.inf and 0 < read.p0 < 1):
        raise ValueError("probabilities of pairs must have a sum below 1, and an upper limit for others")
    return read
