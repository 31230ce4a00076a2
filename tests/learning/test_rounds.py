"""Rounds of importance sampling: a world of few texts, in which the target is known, and a tiny model that learns."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from equipoise.errors import UserError
from equipoise.learning import rounds
from equipoise.learning.rounds import (
    Author,
    Rounds,
    Sample,
    Target,
    Weighed,
    draw,
    figures,
    groups_of,
    judged,
    learn_towards,
    softened,
    strata,
    together,
    towards,
)
from equipoise.learning.supervised import Example
from equipoise.measures.decomposition import Outcomes, Pair, pair_rates, split
from equipoise.measures.raking import margins, size
from equipoise.policy.config import PolicyConfig
from equipoise.policy.load import load_policy
from equipoise.policy.prompt import render_prompts
from equipoise.protocol.task import PROTOCOL
from tests.tiny import words_folder

A, B = ("bold", "caring"), ("bold", "loyal")

NEAR, EVEN = Target("near"), Target("even")


class Text(NamedTuple):
    occupation: str
    text: str
    pair: Pair
    base: float
    """Probability under the untrained model, given the occupation."""
    own: int
    """Sentences of 100 that the policy writes of it."""


# The nurse succeeds with probability 0.03, the pilot with 0.004. The policy fails in 30 and 20 of 100 sentences.
WORLD = [
    Text("nurse", "a", A, 0.016, 20),
    Text("nurse", "b", A, 0.008, 40),
    Text("nurse", "c", B, 0.006, 10),
    Text("pilot", "d", A, 0.001, 20),
    Text("pilot", "e", B, 0.002, 50),
    Text("pilot", "f", B, 0.001, 10),
]


def sample(world: list[Text] = WORLD) -> Sample:
    """As it comes on the average: each text exactly as often as its probability says."""
    found = [
        Weighed(Example(t.occupation, [1], [2], t.text), t.pair, math.log(t.base / (t.own / 100)))
        for t in world
        for _ in range(t.own)
    ]
    return Sample(found, {name: 100 for name in dict.fromkeys(t.occupation for t in world)})


def by_text(drawn: Sample, shares: list[float]) -> dict[str, float]:
    made: dict[str, float] = defaultdict(float)
    for each, share in zip(drawn.found, shares, strict=True):
        made[each.example.text] += share
    return made


def test_near_is_the_untrained_model_where_it_succeeds_occupations_alike() -> None:
    made = towards(sample(), NEAR)
    success = {"nurse": 0.03, "pilot": 0.004}
    wanted = {t.text: t.base / success[t.occupation] / 2 for t in WORLD}
    assert by_text(sample(), made.shares) == pytest.approx(wanted)
    assert made.strict == pytest.approx(0.75)
    # KL to the policy and to the untrained model, each occupation's by itself.
    own = math.fsum(p * math.log(2 * p / (t.own / 100)) for t, p in zip(WORLD, wanted.values(), strict=True))
    assert made.kl == pytest.approx(own)
    for each, ratio in zip(sample().found, made.log_ratios, strict=True):
        assert ratio == pytest.approx(-math.log(success[each.example.occupation]))
    assert made.effective == pytest.approx(1 / sum((wanted[t.text] / t.own) ** 2 * t.own for t in WORLD))


def test_even_has_pairs_and_occupations_alike_and_is_the_nearest_such() -> None:
    made = towards(sample(), EVEN)
    shares = by_text(sample(), made.shares)
    assert sum(shares[t.text] for t in WORLD if t.pair == A) == pytest.approx(0.5, abs=1e-5)
    assert sum(shares[t.text] for t in WORLD if t.occupation == "nurse") == pytest.approx(0.5, abs=1e-5)
    assert shares["a"] / shares["b"] == pytest.approx(2) and shares["e"] / shares["f"] == pytest.approx(2)
    cells = {(t.occupation, t.pair): 0.0 for t in WORLD}
    for t in WORLD:
        cells[t.occupation, t.pair] += shares[t.text]
    odds = cells["nurse", A] * cells["pilot", B] / cells["nurse", B] / cells["pilot", A]
    assert odds == pytest.approx(0.024 * 0.003 / 0.006 / 0.001, rel=1e-4)


@pytest.mark.parametrize("target", [NEAR, EVEN])
def test_the_targets_own_figures_are_those_of_its_decomposition(target: Target) -> None:
    """Against `split` of the target's own outcomes; its waste is what occupations cost that have as many as others."""
    drawn = sample()
    whole = together([drawn], target)
    rates = pair_rates(groups_of(drawn))
    made = figures(whole, rates)
    many = 10**9
    seen: dict[Pair | None, Outcomes] = {}
    for pair in (A, B):
        own = [
            (share, ratio)
            for each, share, ratio in zip(drawn.found, whole.shares, whole.log_ratios, strict=True)
            if each.pair == pair
        ]
        total = math.fsum(share for share, _ in own)
        seen[pair] = Outcomes(round(many * total), math.fsum(s * r for s, r in own) / total, 0.0)
    exact = rates._replace(rates={pair: rate._replace(variance=0.0) for pair, rate in rates.rates.items()})
    parts = split(seen, exact)
    assert (made.kl, made.compliance, made.variety, made.rest) == pytest.approx(
        (parts.kl.value, parts.compliance.value, parts.variety.value, parts.waste.value), abs=1e-6
    )
    assert made.pairs == pytest.approx(
        2.0 if target == EVEN else math.exp(-(0.525 * math.log(0.525) + 0.475 * math.log(0.475))), rel=1e-4
    )
    if target == NEAR:
        assert made.kl == pytest.approx(-(math.log(0.03) + math.log(0.004)) / 2)
        assert made.compliance == pytest.approx(-math.log(0.017))
    assert made.rest > 0


@pytest.mark.parametrize("target", [NEAR, EVEN])
def test_where_occupations_are_alike_the_target_wastes_nothing(target: Target) -> None:
    world = [t._replace(occupation=o, text=t.text + o) for o in ("nurse", "pilot") for t in WORLD[:3]]
    made = figures(together([sample(world)], target), pair_rates(groups_of(sample(world))))
    assert made.rest == pytest.approx(0, abs=1e-6)
    assert made.variety == pytest.approx(0, abs=1e-9) if target == NEAR else made.variety > 0.1


def test_with_a_power_pairs_come_in_proportion_to_that_of_what_they_are_in_the_nearest() -> None:
    """The nearest has 0.525 and 0.475 of the two pairs; softening and putting together change no margin."""
    target, drawn = Target("even", 0.5), sample()
    made = towards(drawn, target)
    pairs, occupations = [each.pair for each in drawn.found], [each.example.occupation for each in drawn.found]
    wanted = math.sqrt(0.525) / (math.sqrt(0.525) + math.sqrt(0.475))
    softer = softened(drawn.found, made.shares, target, made.effective + 3)[1]
    for n, shares in ((1, made.shares), (1, softer), (2, together([drawn, drawn], target).shares)):
        assert margins(shares, pairs * n)[A] == pytest.approx(wanted, rel=1e-4)
        assert margins(shares, occupations * n)["nurse"] == pytest.approx(0.5, rel=1e-4)
    assert towards(drawn, Target("even", 1.0)).shares == pytest.approx(towards(drawn, NEAR).shares, rel=1e-4)


@pytest.mark.parametrize("power", [1e-9, 0.5, 1.0])
def test_a_pair_that_one_round_missed_comes_as_often_as_the_power_says_of_what_it_is_in_all(power: float) -> None:
    """The target with hardly any power is that with none; with the whole of it, `near`, in which B has in all what it
    has in either sample by the sample's effective size."""
    samples = [sample(), sample([t for t in WORLD if t.pair == A])]
    effective = [towards(each, Target("even", power)).effective for each in samples]
    near = 0.475 * effective[0] / sum(effective)
    made = together(samples, Target("even", power))
    shares = margins(made.shares, [each.pair for each in made.found])
    assert shares[B] == pytest.approx(near**power / (near**power + (1 - near) ** power), rel=1e-4)
    if power < 0.1:
        assert made.shares == pytest.approx(together(samples, EVEN).shares, rel=1e-5)


def test_samples_put_together_weigh_by_their_effective_size_and_make_up_for_what_one_missed() -> None:
    whole, part = sample(), sample([t for t in WORLD if t.text != "c"])
    made = together([whole, part], EVEN)
    pairs: dict[Pair, float] = defaultdict(float)
    for each, share in zip(made.found, made.shares, strict=True):
        pairs[each.pair] += share
    assert pairs == pytest.approx({A: 0.5, B: 0.5}, abs=1e-5)
    alone = towards(whole, NEAR)
    twice = together([whole, whole], NEAR)
    assert twice.shares == pytest.approx([share / 2 for share in alone.shares * 2])
    assert twice.log_ratios == pytest.approx(alone.log_ratios * 2)
    assert twice.effective == pytest.approx(2 * alone.effective)
    assert len(strata(made.found)) == len(made.found)


@pytest.mark.parametrize("target", [NEAR, EVEN])
def test_weights_are_softened_until_enough_sentences_carry_what_is_learnt(target: Any) -> None:
    drawn = sample()
    made = towards(drawn, target)
    assert softened(drawn.found, made.shares, target, made.effective) == (1.0, made.shares)
    exponent, shares = softened(drawn.found, made.shares, target, made.effective + 10)
    assert 0 < exponent < 1 and made.effective + 10 <= size(shares) < made.effective + 15
    soft, full = by_text(drawn, list(shares)), by_text(drawn, made.shares)
    margin = sum(soft[t.text] for t in WORLD if t.occupation == "nurse")
    assert margin == pytest.approx(0.5, abs=1e-5)
    # Within a cell the log-ratio to what was written shrinks by the exponent.
    odds = [math.log(x["a"] / 20) - math.log(x["b"] / 40) for x in (soft, full)]
    assert odds[0] == pytest.approx(exponent * odds[1])
    if target == EVEN:
        assert sum(soft[t.text] for t in WORLD if t.pair == A) == pytest.approx(0.5, abs=1e-5)
    assert softened(drawn.found, made.shares, target, 1e9)[0] == 0.0  # there are no more than there are


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "words", prompt=None, spread=0.05)


def loaded(words: Path) -> Author:
    config = PolicyConfig(model=str(words), tuning="full", device="cpu", dtype="float32")
    policy = load_policy(config, PROTOCOL.prompt("raw"), value_head=False)
    return Author(policy, PROTOCOL, render_prompts(policy.tokenizer, PROTOCOL.prompt("raw"), PROTOCOL, "").ids, 16)


def test_each_round_brings_the_policy_nearer_to_its_target_and_the_rates_stay_right(words: Path) -> None:
    author = loaded(words)
    start = draw(author, 2000, torch.Generator().manual_seed(1))
    assert all(abs(each.log_weight) < 1e-5 for each in start.found)  # π is still π_ref
    assert set(start.drawn.values()) == {100} and all(PROTOCOL.strict(each.example.text) for each in start.found)
    said: list[str] = []
    how = Rounds(rounds=2, samples=1000, learnt=500, learning_rate=2e-2, batch_size=16, copies=6)
    first = [each.example for each in start.found]
    samples = learn_towards(author, first, EVEN, how, said.append)
    made = [towards(each, EVEN) for each in samples]
    assert made[-1].strict > 3 * len(start.found) / 2000
    assert made[-1].kl < made[0].kl - 0.3
    assert made[-1].effective > 1.5 * made[0].effective
    assert len([line for line in said if "effective sample size" in line]) == 3
    # Of the untrained model's success as of free samples: weights of a policy that has moved far undo that.
    free = len(start.found) / 2000
    rates = pair_rates(*map(groups_of, samples))
    error = math.sqrt(rates.variance + free * (1 - free) / 2000)
    assert abs(rates.p0 - free) < 4 * error

    whole = together(samples, EVEN)
    plain, tilted = (judged(author, whole, EVEN, tilt, 300, 2, 0) for tilt in (0.0, 20.0))
    assert len(plain.found) == len(plain.nll) > 150 and plain.nll == tilted.nll
    assert figures(tilted, rates).nll < figures(plain, rates).nll - 0.01  # type: ignore[operator]
    for made in (plain, tilted):
        pairs: dict[Pair, float] = defaultdict(float)
        for each, share in zip(made.found, made.shares, strict=True):
            pairs[each.pair] += share
        assert max(pairs.values()) < 2 * min(pairs.values())  # some occupation may have few of them
    # KL(tilted‖untrained) − KL(plain‖untrained) by the shares themselves.
    more = figures(tilted, rates).kl - figures(plain, rates).kl
    level = [math.log(share / old) for share, old in zip(tilted.shares, plain.shares, strict=True)]
    old = math.fsum((t - p) * r for t, p, r in zip(tilted.shares, plain.shares, plain.log_ratios, strict=True))
    assert more == pytest.approx(old + math.fsum(s * x for s, x in zip(tilted.shares, level, strict=True)))


def test_a_policy_that_never_succeeds_is_told_in_one_line(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    author = loaded(words)
    first = [each.example for each in draw(author, 400, torch.Generator().manual_seed(1)).found]
    monkeypatch.setattr(rounds, "draw", lambda *_: Sample([], {"nurse": 40}))
    how = Rounds(rounds=1, samples=40, learnt=10, learning_rate=1e-3, batch_size=16, copies=4)
    with pytest.raises(UserError, match=r"round 0 of 1 .* none of 40 sentences .* --warm-start-target-rounds 0"):
        learn_towards(author, first, NEAR, how, lambda _: None)
