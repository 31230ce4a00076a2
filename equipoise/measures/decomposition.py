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
UNSEEN: Pair = ()
"""Stands for all pairs whose probability under the reference is not known."""


class Rate(NamedTuple):
    """A probability under the reference, and the variance of this estimate of it."""

    value: float
    variance: float


class PairRates(NamedTuple):
    """How often the reference model's sentence succeeds with each pair."""

    rates: Mapping[Pair, Rate]
    """A_k of every pair that is known."""
    unseen: float
    """Upper limit of the probability of a success with any other pair, never seen or hardly known."""
    n: int
    """Sentences that it was estimated from."""
    others: Rate = Rate(0.0, 0.0)
    """Of a success with any other pair, as far as such were seen."""

    @property
    def p0(self) -> float:
        """The probability of a success."""
        return math.fsum(rate.value for rate in (*self.rates.values(), self.others))

    @property
    def variance(self) -> float:
        """Of the estimate of `p0`."""
        return math.fsum(rate.variance for rate in (*self.rates.values(), self.others))

    def probability(self, pair: Pair | None) -> float:
        """Of a class of outcomes: a known pair, `UNSEEN` or None, failure."""
        if pair is None:
            return 1 - self.p0
        return self.unseen if pair == UNSEEN else self.rates[pair].value


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
    """Share of the successes whose pair the reference was never seen to write, or hardly."""
    n: int
    """Sentences of the policy."""


Groups = Iterable[Sequence[tuple[Pair, float]]]
"""Of each occupation (pair, w) of all sentences of a sample, `FAILED` with weight 0 where one fails."""
FAILED: Pair = ()


def pair_rates(*samples: Groups) -> PairRates:
    """From independent samples of one or several writers, for each occupation (pair, w) of all sentences; w = p/q, the
    probability of the sentence under the reference by that under its writer. Every occupation counts alike.

    In each sample the mean of w·1[pair = k] is an unbiased estimate of A_k. Those of several are averaged, for each
    pair in proportion to the effective number (Σw)²/Σw² of its sentences in each: near the inverse of their relative
    variances.

    A pair whose estimate is off by more than `POOR` of itself (one standard error) is not known: where a writer only
    has it in sentences that the reference would hardly write, the estimate is next to nothing, and far too small. Such
    pairs, and those never seen, are the others, whose upper limit is what of them was seen and 1.645 standard errors,
    and ln(20·samples)/n times the largest weight seen, the least over samples: with 95 % probability a writer has a
    sentence of which it wrote none less often than that in each of them, and none is taken to weigh more than the
    heaviest of all. Raises ValueError for an occupation with fewer than two sentences.
    """
    made = [_Estimated.of(list(groups)) for groups in samples]
    rates = {}
    for pair in sorted({pair for each in made for pair in each.sums}):
        effective = [each.effective[pair] for each in made]
        shares = [x / math.fsum(effective) for x in effective]
        value = math.fsum(share * each.sums[pair] for share, each in zip(shares, made, strict=True))
        variance = math.fsum(share**2 * each.variances[pair] for share, each in zip(shares, made, strict=True))
        rates[pair] = Rate(value, variance)
    limits = [math.log(20 * len(made)) / each.n * each.heaviest for each in made if each.heaviest]
    return _poor_pooled(PairRates(rates, min(limits, default=0.0), sum(each.n for each in made)))


def _poor_pooled(rates: PairRates) -> PairRates:
    """With the pairs that are not known among the others, whose limit rises by what of them was seen and its error."""
    known = {pair: rate for pair, rate in rates.rates.items() if math.sqrt(rate.variance) <= POOR * rate.value}
    poor = [rate for pair, rate in rates.rates.items() if pair not in known]
    more, before = math.fsum(rate.value for rate in poor), rates.others
    others = Rate(before.value + more, before.variance + math.fsum(rate.variance for rate in poor))
    wider = math.sqrt(others.variance) - math.sqrt(before.variance)
    return PairRates(known, rates.unseen + more + Z_95_ONE_SIDED * wider, rates.n, others)


POOR = 0.5
LEAST = 1e-100
"""Of a file's probabilities: no sample knows a smaller one, and squares of them are numbers still."""
Z_95_ONE_SIDED = 1.6448536269514722


class _Estimated(NamedTuple):
    """One sample's estimates of A_k."""

    sums: Mapping[Pair, float]
    variances: Mapping[Pair, float]
    effective: Mapping[Pair, float]
    heaviest: float
    n: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[tuple[Pair, float]]]) -> "_Estimated":
        sums: dict[Pair, float] = defaultdict(float)
        variances: dict[Pair, float] = defaultdict(float)
        weights: dict[Pair, list[float]] = defaultdict(list)
        for group in groups:
            if len(group) < 2:
                raise ValueError("an occupation needs two sentences for a variance")
            own: dict[Pair, list[float]] = defaultdict(list)
            for pair, weight in group:
                if weight > 0:
                    own[pair].append(weight)
            for pair, found in own.items():
                mean = math.fsum(found) / len(group)
                squares = math.fsum(w * w for w in found) / len(group) - mean * mean
                sums[pair] += mean / len(groups)
                variances[pair] += squares / (len(group) - 1) / len(groups) ** 2
                weights[pair] += found
        effective: dict[Pair, float] = defaultdict(float)
        effective |= {pair: _effective(found) for pair, found in weights.items()}
        heaviest = max((max(found) for found in weights.values()), default=0.0)
        return cls(sums, variances, effective, heaviest, sum(map(len, groups)))


def _effective(weights: Sequence[float]) -> float:
    top = max(weights)
    scaled = [w / top for w in weights]  # squares of tiny ones would be 0
    return math.fsum(scaled) ** 2 / math.fsum(x * x for x in scaled)


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

    Pairs that the reference was never seen to write, or hardly, are one class, with its upper limit: the variety is
    then the least that it can be, and the waste the most. Both estimates of a logarithm are corrected for their
    first-order bias (of q as Miller 1955 and Madow 1948 do, of A by the delta method), and the intervals are the delta
    method's: of the sentences, and of A. Raises ValueError where the policy has fewer than two sentences, and where the
    reference was never or always seen to succeed.
    """
    n, p0 = sum(each.n for each in seen.values()), reference.p0
    if n < 2:
        raise ValueError("two sentences are needed")
    if not 0 < p0 < 1:
        raise ValueError(f"the reference succeeds with probability {p0:g}: nothing can be compared with that")
    shares: dict[Pair | None, float] = defaultdict(float)
    for pair, each in seen.items():
        shares[pair if pair is None or pair in reference.rates else UNSEEN] += each.n / n
    share = 1 - shares[None]
    level = {pair: math.log(m / reference.probability(pair)) for pair, m in shares.items() if m}
    coarse = {fails: math.log(m / p) for fails, m, p in ((True, 1 - share, 1 - p0), (False, share, p0)) if m > 0}
    of_pair = {pair: level[pair if pair is None or pair in reference.rates else UNSEEN] for pair in seen}
    of_outcome = {pair: coarse[pair is None] for pair in seen}

    kl = math.fsum(each.n * each.mean for each in seen.values()) / n
    compliance = kl_bound(share, p0)
    bound = math.fsum(shares[pair] * x for pair, x in level.items())
    errors = _Errors.of(shares, reference, n)
    compliance, bound = compliance - errors.bias_compliance, bound - errors.bias_bound
    means = {pair: each.mean for pair, each in seen.items()}
    spread = [
        _variance(means, seen, within=True),
        _variance(of_outcome, seen, within=False),
        _variance({pair: of_pair[pair] - of_outcome[pair] for pair in seen}, seen, within=False),
        _variance({pair: means[pair] - of_pair[pair] for pair in seen}, seen, within=True),
    ]
    of_rates = [0.0, errors.compliance, errors.variety, errors.bound]
    values = [kl, compliance, bound - compliance, kl - bound]
    total, first, second, rest = (_part(x, v + w) for x, v, w in zip(values, spread, of_rates, strict=True))
    return Split(total, first, second, rest, share, shares[UNSEEN] / share if share else 0.0, n)


class _Errors(NamedTuple):
    """What the estimates of the reference's probabilities do to the parts: biases, and variances by the delta method.
    That q is estimated biases the bound too, by (pairs − 1)/2n."""

    bias_compliance: float
    bias_bound: float
    compliance: float
    variety: float
    bound: float

    @classmethod
    def of(cls, shares: Mapping[Pair | None, float], reference: PairRates, n: int) -> "_Errors":
        share, p0 = 1 - shares.get(None, 0.0), reference.p0
        rates = reference.rates
        of_p0 = reference.variance
        fails = (1 - share) / (1 - p0)
        by_p0 = fails - share / p0
        by_rate = {pair: fails - shares.get(pair, 0.0) / rate.value for pair, rate in rates.items()}
        relative = math.fsum(shares.get(pair, 0.0) * rate.variance / rate.value**2 for pair, rate in rates.items())
        pairs = sum(1 for pair, m in shares.items() if pair is not None and m)
        curve = fails / (1 - p0)
        return cls(
            of_p0 / 2 * (share / p0**2 + curve),
            relative / 2 + of_p0 / 2 * curve + max(0, pairs - 1) / (2 * n),
            by_p0**2 * of_p0,
            # That of the others is known by its limit alone: it moves the bound through p0, by failure.
            math.fsum((by_rate[pair] - by_p0) ** 2 * rate.variance for pair, rate in rates.items())
            + (fails - by_p0) ** 2 * reference.others.variance,
            math.fsum(by_rate[pair] ** 2 * rate.variance for pair, rate in rates.items())
            + fails**2 * reference.others.variance,
        )


def _variance(values: Mapping[Pair | None, float], seen: Mapping[Pair | None, Outcomes], *, within: bool) -> float:
    """Of the mean over sentences of what has these means in the classes, and with `within` the ratios' variance."""
    n = sum(each.n for each in seen.values())
    mean = math.fsum(each.n * values[pair] for pair, each in seen.items()) / n
    total = math.fsum(
        each.n * ((values[pair] - mean) ** 2 + (each.variance if within else 0.0)) for pair, each in seen.items()
    )
    return total / n / (n - 1)


def _part(value: float, variance: float) -> Part:
    half = Z_95 * math.sqrt(variance)
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
    return {"pairs": pairs, "unseen": rates.unseen, "n": rates.n, "others": rates.others._asdict()}


def read_rates(document: Any) -> PairRates:
    """Raises ValueError for what is no such document."""
    try:
        rates = {
            tuple(map(str, row["pair"])): Rate(float(row["value"]), float(row["variance"])) for row in document["pairs"]
        }
        others = document.get("others", {"value": 0.0, "variance": 0.0})  # of before they were told apart
        rest = Rate(float(others["value"]), float(others["variance"]))
        read = PairRates(rates, float(document["unseen"]), int(document["n"]), rest)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"no probabilities of pairs ({error})") from None
    if not (0 <= read.others.value < 1 and 0 <= read.others.variance < math.inf):
        raise ValueError("the probability of other pairs lies between 0 and 1, its variance is 0 or more")
    if not all(LEAST <= rate.value < 1 and 0 <= rate.variance < math.inf for rate in rates.values()):
        raise ValueError(f"probabilities of pairs lie between {LEAST:g} and 1, their variances are 0 or more")
    if not (0 < read.unseen < math.inf and 0 < read.p0 < 1):
        raise ValueError("probabilities of pairs must have a sum below 1, and an upper limit for others")
    return _poor_pooled(read)  # of before poor ones were pooled a file may hold such
