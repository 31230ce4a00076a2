"""The parts of a KL against an enumerable world, in which every probability is known."""

import json
import math
import random
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.measures.decomposition import (
    FAILED,
    Outcomes,
    Pair,
    PairRates,
    Rate,
    least_variety,
    outcomes,
    outcomes_document,
    pair_rates,
    pooled,
    rates_document,
    read_outcomes,
    read_rates,
    split,
)
from equipoise.measures.shares import kl_bound

World = list[tuple[Pair | None, float, float]]
"""Texts: (pair, or None where it fails; probability under the reference; under the policy)."""

PAIRS: list[Pair] = [("bold", "kind"), ("bold", "loyal"), ("firm", "kind"), ("firm", "loyal")]


def exact(world: World) -> tuple[dict[Pair | None, Outcomes], PairRates]:
    """The world as an infinite sample shows it: counts in proportion, no variance of the rates."""
    many = 10**12
    seen: dict[Pair | None, Outcomes] = {}
    for pair in {pair for pair, _, _ in world}:
        own = [(q, math.log(q / p)) for k, p, q in world if k == pair]
        total = math.fsum(q for q, _ in own)
        mean = math.fsum(q * x for q, x in own) / total
        variance = math.fsum(q * (x - mean) ** 2 for q, x in own) / total
        seen[pair] = Outcomes(round(many * total), mean, variance)
    rates = {k: Rate(math.fsum(p for own, p, _ in world if own == k), 0.0) for k in PAIRS}
    return seen, PairRates({k: r for k, r in rates.items() if r.value}, 0.0, many)


def normal(weights: Sequence[float]) -> list[float]:
    return [w / math.fsum(weights) for w in weights]


worlds = st.lists(
    st.tuples(st.sampled_from([None, *PAIRS]), st.floats(0.01, 1.0), st.floats(0.01, 1.0)), min_size=3, max_size=20
).filter(lambda rows: {None} < {pair for pair, _, _ in rows})


def as_world(rows: Sequence[tuple[Pair | None, float, float]]) -> World:
    reference, policy = normal([p for _, p, _ in rows]), normal([q for _, _, q in rows])
    return [(pair, p, q) for (pair, _, _), p, q in zip(rows, reference, policy, strict=True)]


@given(worlds)
def test_no_policy_spends_less_than_compliance_and_variety_cost(
    rows: list[tuple[Pair | None, float, float]],
) -> None:
    world = as_world(rows)
    made = split(*exact(world))
    kl = math.fsum(q * math.log(q / p) for _, p, q in world)
    c = math.fsum(q for pair, _, q in world if pair is not None)
    p0 = math.fsum(p for pair, p, _ in world if pair is not None)
    variety = 0.0
    for k in PAIRS:
        own_q, own_p = (math.fsum(row[i] for row in world if row[0] == k) for i in (2, 1))
        variety += own_q * math.log((own_q / c) / (own_p / p0)) if own_q else 0.0
    assert made.kl.value == pytest.approx(kl, abs=1e-9)
    assert made.share == pytest.approx(c, abs=1e-9)
    assert made.compliance.value == pytest.approx(kl_bound(c, p0), abs=1e-9)
    assert made.variety.value == pytest.approx(variety, abs=1e-9) and made.variety.value > -1e-9
    assert made.waste.value == pytest.approx(kl - kl_bound(c, p0) - variety, abs=1e-9) and made.waste.value > -1e-9


@given(worlds, st.lists(st.floats(0.01, 10.0), min_size=5, max_size=5))
def test_the_target_itself_wastes_nothing(rows: list[tuple[Pair | None, float, float]], weights: list[float]) -> None:
    """π ∝ p0(x)·w(class of x): within a class it is the reference, so the inequality is an equality."""
    weight: Mapping[Pair | None, float] = dict(zip([None, *PAIRS], weights, strict=True))
    reference = normal([p for _, p, _ in rows])
    policy = normal([p * weight[pair] for (pair, _, _), p in zip(rows, reference, strict=True)])
    world = [(pair, p, q) for (pair, _, _), p, q in zip(rows, reference, policy, strict=True)]
    made = split(*exact(world))
    assert made.waste.value == pytest.approx(0.0, abs=1e-9)
    assert made.waste.high - made.waste.low == pytest.approx(0.0, abs=1e-5)


def test_the_parts_by_hand() -> None:
    # Half of four sentences succeed, with two pairs that the reference writes with probability 0.03 and 0.01.
    seen = outcomes([(PAIRS[0], 3.0), (PAIRS[1], 4.0), (None, 0.0), (None, -1.0)])
    made = split(seen, PairRates({PAIRS[0]: Rate(0.03, 0.0), PAIRS[1]: Rate(0.01, 0.0)}, 0.0, 1000))
    assert made.kl.value == pytest.approx(1.5)
    compliance = 0.5 * math.log(0.5 / 0.04) + 0.5 * math.log(0.5 / 0.96)
    variety = (
        0.25 * math.log(0.5 / 0.75) + 0.25 * math.log(0.5 / 0.25) - 1 / 8
    )  # Miller and Madow: (2 pairs − 1) / (2·4)
    assert made.compliance.value == pytest.approx(compliance)
    assert made.variety.value == pytest.approx(variety)
    assert made.waste.value == pytest.approx(1.5 - compliance - variety)


def test_pairs_never_seen_are_one_class_with_their_upper_limit() -> None:
    known = PairRates({PAIRS[0]: Rate(0.03, 0.0)}, 0.002, 1000)
    seen = {
        PAIRS[0]: Outcomes(500_000, 5.0, 0.0),
        PAIRS[1]: Outcomes(250_000, 9.0, 0.0),
        PAIRS[2]: Outcomes(250_000, 9.0, 0.0),
    }
    made = split(seen, known)
    assert made.unseen == 0.5
    bound = 0.5 * math.log(0.5 / 0.03) + 0.5 * math.log(0.5 / 0.002)
    assert made.compliance.value + made.variety.value == pytest.approx(bound, abs=1e-5)


def test_rates_by_hand() -> None:
    made = pair_rates([[(PAIRS[0], 0.1), (PAIRS[0], 0.3)], [(PAIRS[0], 0.2), (PAIRS[1], 0.4)]])
    assert made.rates[PAIRS[0]].value == pytest.approx((0.2 + 0.1) / 2)
    # Variances of the means within the occupations, 0.02/2 and 0.02/2 for the first, 0.08/2 for the second pair.
    assert made.rates[PAIRS[0]].variance == pytest.approx((0.01 + 0.01) / 4)
    # The second pair's 0.1 has a standard error of 0.1: it is not known, and one of the others.
    limit = math.log(20) / 4 * 0.4 + 0.1 + 1.64485 * 0.1
    assert set(made.rates) == {PAIRS[0]} and made.unseen == pytest.approx(limit, rel=1e-5)
    assert made.others == pytest.approx((0.1, 0.01))
    assert made.n == 4 and made.p0 == pytest.approx(0.25) and made.variance == pytest.approx(0.015)


def test_rates_of_two_samples_by_hand() -> None:
    """Of the first pair the first sample has two sentences of one weight, effectively 2, and the second one of 0.1 and
    0.3, effectively 0.16 / 0.1 = 1.6."""
    first = [[(PAIRS[0], 0.2), (PAIRS[0], 0.2), (PAIRS[1], 0.5), (FAILED, 0.0)]]
    second = [[(PAIRS[0], 0.1), (PAIRS[0], 0.3)]]
    made = pair_rates(first, second)
    share = 2 / 3.6
    assert made.rates[PAIRS[0]].value == pytest.approx(share * 0.1 + (1 - share) * 0.2)
    variances = ((0.08 / 4 - 0.01) / 3, 0.01)
    assert made.rates[PAIRS[0]].variance == pytest.approx(share**2 * variances[0] + (1 - share) ** 2 * variances[1])
    error = math.sqrt((0.25 / 4 - 0.125**2) / 3)
    limit = min(math.log(40) / 4 * 0.5, math.log(40) / 2 * 0.3) + 0.125 + 1.64485 * error
    assert set(made.rates) == {PAIRS[0]} and made.unseen == pytest.approx(limit, rel=1e-5) and made.n == 6
    assert pair_rates([[(FAILED, 0.0), (FAILED, 0.0)]]).rates == {}


def test_a_pair_that_a_writer_has_only_in_sentences_that_the_reference_hardly_writes_is_not_known() -> None:
    """A writer that has a pair a hundred times, and never as the reference would write it."""
    poor = [(PAIRS[1], math.exp(-120 + i)) for i in range(100)]
    good = [(PAIRS[0], 2e-4)] * 300
    other = [(PAIRS[0], 2e-4)] * 100 + [(PAIRS[1], 1e-5)] * 200 + [(FAILED, 0.0)] * 100
    alone, both = pair_rates([good + poor]), pair_rates([good + poor], [other])
    assert set(alone.rates) == {PAIRS[0]} and alone.unseen > 1e-6
    assert both.rates[PAIRS[1]].value == pytest.approx(5e-6, rel=0.03)


def test_the_guides_weights_recover_every_pairs_probability() -> None:
    """A guide that prefers the wrong texts: its weights undo that."""
    generator = random.Random(0)
    reference = {text: p for text, p in enumerate(normal([5, 1, 3, 2, 8, 1, 1, 4]))}
    pair_of = {text: PAIRS[text % 4] for text in reference}
    success = 0.2
    guide = dict(enumerate(normal([1, 1, 1, 1, 1, 2, 2, 2])))
    groups = []
    for _ in range(4):
        texts = generator.choices(list(guide), list(guide.values()), k=20_000)
        groups.append([(pair_of[t], success * reference[t] / guide[t]) for t in texts])
    made = pair_rates(groups)
    for pair in PAIRS:
        truth = success * math.fsum(p for text, p in reference.items() if pair_of[text] == pair)
        rate = made.rates[pair]
        assert abs(rate.value - truth) < 4 * math.sqrt(rate.variance) < 0.02
    assert made.p0 == pytest.approx(success, abs=0.004)


def studies_of_rates(studies: int) -> tuple[dict[int, list[tuple[float, float]]], list[float]]:
    """For each of 40 pairs whose probabilities span five nats (estimate, standard error) of so many studies, and the
    truth: one writer follows the reference's pairs, the other has all alike and fails one time in five; weights are
    lognormal (σ 1) within a pair."""
    generator = random.Random(3)
    pairs = [(f"{i:02}", "x") for i in range(40)]
    p0, sigma = 2e-4, 1.0
    p = normal([math.exp(-i / 8) for i in range(40)])
    made: dict[int, list[tuple[float, float]]] = {i: [] for i in range(40)}
    for _ in range(studies):
        samples = []
        for writer, n, fails in ((p, 2000, 0.0), ([1 / 40] * 40, 4000, 0.2)):
            groups: list[list[tuple[Pair, float]]] = [[] for _ in range(4)]
            shares = [x * (1 - fails) for x in writer]
            for place, i in enumerate(generator.choices(range(41), [*shares, fails], k=n)):
                noise = math.exp(generator.gauss(-(sigma**2) / 2, sigma))
                groups[place % 4].append((pairs[i], p0 * p[i] / shares[i] * noise) if i < 40 else (FAILED, 0.0))
            samples.append(groups)
        rates = pair_rates(*samples).rates
        for i, pair in enumerate(pairs):
            made[i].append((rates[pair].value, math.sqrt(rates[pair].variance)))
    return made, [p0 * x for x in p]


def test_rates_of_two_writers_are_right_for_common_and_for_rare_pairs() -> None:
    made, truth = studies_of_rates(12)
    for i, estimates in made.items():
        mean = math.fsum(value for value, _ in estimates) / len(estimates)
        error = math.sqrt(math.fsum(sd**2 for _, sd in estimates)) / len(estimates)
        assert abs(mean - truth[i]) < 4.5 * error
        assert error * math.sqrt(len(estimates)) < 0.25 * truth[i]  # the rarest too, of which the first has some six


@pytest.mark.slow
def test_the_interval_of_a_pairs_rate_covers_at_its_rate() -> None:
    """300 studies: over all pairs 90 to 97 % of the intervals of 95 % hold the truth, the common ones' and the rare
    ones' alike."""
    made, truth = studies_of_rates(300)
    for part in (range(10), range(10, 30), range(30, 40)):
        held = [abs(value - truth[i]) <= 1.96 * sd for i in part for value, sd in made[i]]
        assert 0.90 <= sum(held) / len(held) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("even", [False, True])
def test_the_interval_of_the_waste_covers_at_its_rate(even: bool) -> None:
    """200 studies: 40 pairs whose probabilities span five nats, weights with a heavy tail (σ 1.5), 20,000 of the
    guide's sentences and 1,000 of the policy's. At least 90 % of the intervals hold the truth."""
    generator = random.Random(1 + even)
    pairs = [(str(i), "x") for i in range(40)]
    p0, share, sigma, waste = 2e-4, 0.97, 1.5, 1.2
    p = normal([math.exp(-i / 8) for i in range(40)])
    guided = normal([x**0.5 for x in p])
    q = normal([1.0] * 40) if even else normal([x**0.8 for x in p])
    studies, held = 200, 0
    for _ in range(studies):
        groups: list[list[tuple[Pair, float]]] = [[] for _ in range(4)]
        for place, i in enumerate(generator.choices(range(40), guided, k=20_000)):
            noise = math.exp(generator.gauss(-(sigma**2) / 2, sigma))
            groups[place % 4].append((pairs[i], p0 * p[i] / guided[i] * noise))
        level = [math.log(share * q[i] / (p0 * p[i])) for i in range(40)]
        drawn: list[tuple[Pair | None, float]] = []
        for i in generator.choices(range(41), [*(share * x for x in q), 1 - share], k=1000):
            base = level[i] if i < 40 else math.log((1 - share) / (1 - p0))
            drawn.append((pairs[i] if i < 40 else None, base + generator.gauss(waste, 2.0)))
        part = split(outcomes(drawn), pair_rates(groups)).waste
        held += part.low <= waste <= part.high
    assert 0.90 <= held / studies <= 0.99


def test_samples_put_together_are_one_sample() -> None:
    drawn = [(PAIRS[0], 3.0), (PAIRS[1], 4.0), (None, 0.5), (PAIRS[0], 7.0), (PAIRS[0], 1.0), (None, -1.0)]
    together, parts = outcomes(drawn), pooled([outcomes(drawn[:1]), {}, outcomes(drawn[1:4]), outcomes(drawn[4:])])
    assert parts.keys() == together.keys()
    for pair, each in together.items():
        assert parts[pair] == pytest.approx(each)


@given(st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4), st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4))
def test_no_distribution_over_pairs_is_below_the_curve(p: list[float], q: list[float]) -> None:
    p, q = normal(p), normal(q)
    curve = least_variety(PairRates({k: Rate(0.1 * x, 0.0) for k, x in zip(PAIRS, p, strict=True)}, 1e-9, 100), 2001)
    assert curve[0][1] == pytest.approx(0.0, abs=1e-12) and curve[-1][0] == pytest.approx(4.0)
    effective = math.exp(-math.fsum(x * math.log(x) for x in q))
    cost = math.fsum(x * math.log(x / y) for x, y in zip(q, p, strict=True))
    reachable = [nats for x, nats in curve if x <= effective]
    assert cost >= max(reachable, default=0.0) - 1e-9


def test_records_hold_what_they_were_given_and_refuse_what_is_none() -> None:
    seen = outcomes([(PAIRS[0], 3.0), (None, 0.0), (PAIRS[0], 1.0)])
    rates = pair_rates([[(PAIRS[0], 0.1), (PAIRS[0], 0.3)], [(PAIRS[0], 0.2), (PAIRS[1], 0.2), (PAIRS[1], 0.2)]])
    assert read_outcomes(json.loads(json.dumps(outcomes_document(seen)))) == seen
    assert read_rates(json.loads(json.dumps(rates_document(rates)))) == rates
    for wrong in (3, [1], [{"pair": ["a"], "n": 0, "mean": 0.0, "variance": 0.0}], [{"pair": "ab", "n": 1}]):
        with pytest.raises(ValueError, match="outcomes"):
            read_outcomes(wrong)
    for wrong in (3, {}, {"pairs": [], "unseen": 0.1, "n": 4}, rates_document(rates) | {"unseen": -1.0}):
        with pytest.raises(ValueError, match="pairs"):
            read_rates(wrong)


def test_pairs_of_a_file_that_are_hardly_known_are_among_the_others() -> None:
    """Off by 0.6 of itself, and by ten times itself."""
    values = {PAIRS[0]: (0.01, 4e-6), PAIRS[1]: (1e-3, 3.6e-7), PAIRS[2]: (1e-14, 1e-26), PAIRS[3]: (1e-100, 0.0)}
    rows = [{"pair": list(pair), "value": value, "variance": variance} for pair, (value, variance) in values.items()]
    others = {"value": 2e-4, "variance": 1e-8}
    rates = read_rates({"pairs": rows, "unseen": 5e-4, "n": 1000, "others": others})
    assert set(rates.rates) == {PAIRS[0], PAIRS[3]}
    assert rates.others == pytest.approx((1.2e-3, 3.7e-7)) and rates.p0 == pytest.approx(0.0112)
    spread = math.sqrt(3.7e-7) - 1e-4
    assert rates.unseen == pytest.approx(5e-4 + 1e-3 + 1.6448536 * spread)
    assert read_rates(rates_document(rates)) == rates
    seen = outcomes([(PAIRS[0], 3.0), (PAIRS[3], 700.0), (PAIRS[1], 7.0), (None, 0.0), (PAIRS[0], 1.0)])
    assert math.isfinite(split(seen, rates).waste.high)
    with pytest.raises(ValueError, match="between 1e-100 and 1"):
        read_rates({"pairs": [rows[0], rows[3] | {"value": 1e-300}], "unseen": 5e-4, "n": 1000})


def test_what_nothing_can_be_compared_with_is_refused() -> None:
    rates = PairRates({PAIRS[0]: Rate(0.03, 0.0)}, 0.001, 1000)
    with pytest.raises(ValueError, match="two sentences"):
        split(outcomes([(None, 0.0)]), rates)
    with pytest.raises(ValueError, match="probability 0"):
        split(outcomes([(None, 0.0), (None, 0.0)]), PairRates({}, 0.001, 1000))
