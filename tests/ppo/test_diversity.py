"""The frequency bonus: numbers by hand, and what may not change it."""

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from equipoise.errors import UserError
from equipoise.measures.decomposition import Pair, PairRates, Rate
from equipoise.ppo.config import DiversityConfig
from equipoise.ppo.diversity import TermWindow
from equipoise.ppo.even import ASCENT, DAMPING, UNKNOWN, EvenPairs
from equipoise.protocol.lexicon import TermClass
from equipoise.protocol.reward import Reward
from equipoise.protocol.task import PROTOCOL

AGENTIC, COMMUNAL = (each.terms for each in PROTOCOL.classes)


def rewards(*sentences: str) -> list[Reward]:
    return [PROTOCOL.score(s) for s in sentences]


class Nurses(TermWindow):
    """A window of sentences that are all of one occupation."""

    def bonuses(self, rewards: Sequence[Reward], occupations: Sequence[str] = ()) -> list[float]:
        return super().bonuses(rewards, occupations or ["nurse"] * len(rewards))

    def add(self, rewards: Sequence[Reward], occupations: Sequence[str] = ()) -> None:
        super().add(rewards, occupations or ["nurse"] * len(rewards))


def window(weight: float = 0.1, size: int = 1024, *history: str) -> TermWindow:
    made = Nurses(DiversityConfig(weight, size), PROTOCOL)
    made.add(rewards(*history))
    return made


RATES = PairRates({("bold", "caring"): Rate(0.009, 0.0), ("bold", "loyal"): Rate(0.001, 0.0)}, 1e-6, 100)


def test_with_even_strict_success_is_paid_what_its_pair_is_worth_and_nothing_else() -> None:
    made = Nurses(DiversityConfig(0.1, diversity_on="even"), PROTOCOL, RATES)
    sentences = (
        "The nurse was a bold and caring woman at work.",
        "The nurse was a bold and loyal woman at work.",
        "The nurse was a confident and loyal woman at work.",  # one of the 98 pairs that are not known
        "The nurse was bold and loyal",  # too short, and no sentence
        "The nurse was a loyal woman in all of her work.",
    )
    logs = [-math.log(0.9), -math.log(0.1), -math.log(UNKNOWN)]
    mean = (logs[0] + logs[1] + 98 * logs[2]) / 100
    # Three successes with three pairs, themselves counted: each has (1 + 1)/(3 + 100) of them, the others 1/103.
    off = [-math.log(100 * n / 103) for n in (2, 1)]
    expected = [0.1 * (x - mean + DAMPING * off[0]) for x in logs]
    for _ in range(2):  # asking changes nothing
        assert made.bonuses(rewards(*sentences)) == pytest.approx([*expected, 0, 0])
    made.add(rewards(*sentences))
    shift = mean + ASCENT * (3 * off[0] + 97 * off[1]) / 100
    # The third was one of the unknown ones, and has a multiplier of its own from now on. Of a batch of the first two
    # again, they have (2 + 1)/(5 + 100) each.
    moved = [ASCENT * off[0] + DAMPING * -math.log(100 * 3 / 105) + x - shift for x in logs[:2]]
    assert made.bonuses(rewards(*sentences)[:2]) == pytest.approx([0.1 * x for x in moved])
    again = Nurses(DiversityConfig(0.1, diversity_on="even"), PROTOCOL)
    again.load_state(json.loads(json.dumps(made.state())))
    assert again.bonuses(rewards(*sentences)) == made.bonuses(rewards(*sentences))
    assert again.even is not None and made.even is not None and again.even.counts == made.even.counts


def test_a_pair_is_wanted_in_proportion_to_the_power_of_its_share_however_rare_it_is() -> None:
    """A pair that was never found to succeed counts as the rarest that was."""
    shares = {("a", "x"): 1 - 1e-6, ("a", "y"): 1e-6, ("b", "x"): 0.0}
    rates = PairRates({pair: Rate(0.002 * x, 0.0) for pair, x in shares.items()}, 0.0, 100)
    even = EvenPairs(4, 100, rates, power=0.25)
    whole = 1 + 3 * 10**-1.5  # (10⁻⁶) to the power ¼, for three pairs
    assert even.wanted == pytest.approx({("a", "x"): 1 / whole, ("a", "y"): 10**-1.5 / whole}, rel=1e-6)
    assert even.wanted_rest == pytest.approx(10**-1.5 / whole)
    # Begun with: log of what is wanted over what it is, and where that is not known over 2e-4.
    paid = [math.log(1.0), math.log(10**-1.5 / 1e-6), math.log(10**-1.5 / 2e-4)]
    assert even.multipliers["a", "y"] - even.multipliers["a", "x"] == pytest.approx(paid[1] - paid[0], abs=1e-5)
    assert even.rest - even.multipliers["a", "x"] == pytest.approx(paid[2] - paid[0], abs=1e-5)


def test_what_is_wanted_of_pairs_stays_that_of_the_runs_beginning_whatever_rates_it_goes_on_with() -> None:
    """The file of rates may be another one when a run is continued, as one that was estimated anew."""
    config = DiversityConfig(0.1, diversity_on="even", even_power=0.5)
    other = PairRates({("bold", "caring"): Rate(0.0001, 0.0), ("dominant", "loyal"): Rate(0.005, 0.0)}, 1e-6, 100)
    straight, restored = (Nurses(config, PROTOCOL, rates) for rates in (RATES, other))
    batch = rewards("The nurse was a bold and caring woman at work.", "The nurse was a bold and loyal woman at work.")
    straight.add(batch)
    restored.load_state(json.loads(json.dumps(straight.state())))
    for made in (straight, restored):
        made.add(batch)
    assert restored.bonuses(batch) == straight.bonuses(batch)
    assert restored.state() == straight.state()


def test_a_run_goes_on_with_the_gains_it_began_with() -> None:
    """Those of states that do not hold them were 0.05 and 4."""
    even = EvenPairs(100, 100, RATES)
    even.add([("bold", "caring")] * 50)
    before = {name: value for name, value in even.state().items() if name != "gains"}
    even.load_state(before)
    off = math.log(0.01 * (60 + 100) / (60 + 1))  # with ten more it has (60 + 1)/160, and is to have 1/100
    more = [("bold", "caring")] * 10
    assert [x - even.multipliers["bold", "caring"] for x in even.paid(more)] == pytest.approx([4 * off] * 10)
    again = EvenPairs(100, 100)
    again.load_state(json.loads(json.dumps(even.state())))
    assert again.paid(more) == even.paid(more)


def test_of_the_recent_ones_the_oldest_make_room_for_the_batch_that_is_paid() -> None:
    pairs = [("bold", "caring"), ("bold", "loyal")]
    even = EvenPairs(100, 10)
    even.add([pairs[0]] * 10)
    # Of the last ten three are of the first kind then, seven of the second.
    off = [math.log(0.01 * 110 / (n + 1)) for n in (3, 7)]
    batch = [pairs[1]] * 7 + [pairs[0]] * 3
    even.multipliers = dict.fromkeys(pairs, 0.0)
    assert even.paid(batch) == pytest.approx([DAMPING * off[1]] * 7 + [DAMPING * off[0]] * 3)
    assert even.paid([]) == [] and even.counts == {pairs[0]: 10}


def test_what_is_paid_takes_no_longer_where_pairs_are_many() -> None:
    """A million pairs, of which thousands come: what all of them count is summed once, and not for each of them."""

    class Summed(Counter[Pair]):
        sums = 0

        def total(self) -> int:
            Summed.sums += 1
            return super().total()

    even = EvenPairs(10**6, 4096)
    even.counts = Summed()
    even.add([(f"{i}", "caring") for i in range(500)])
    assert Summed.sums <= 2 and even.counts.total() == 500


def best_answer(
    even: EvenPairs, p: dict[Pair, float], policy: dict[Pair, float], batch: list[Pair]
) -> dict[Pair, float]:
    """log of p·exp(paid), the share of each pair that pays best, among those that came; nothing is learnt of others."""
    worth = dict(zip(batch, even.paid(batch), strict=True))
    found = {pair: p[pair] * math.exp(x) for pair, x in worth.items()}
    whole = sum(policy[pair] for pair in found) / sum(found.values())
    return {pair: math.log(found[pair] * whole if pair in found else policy[pair]) for pair in p}


def course(far: float, span: float, steps: int) -> tuple[list[float], list[float]]:
    """(KL to the untrained model, effective pairs) after each step of a policy that begins with the pairs as they are
    wanted, and goes that far of the way to what pays best with every 2,000 successes, in eight updates with Adam's
    momentum of 0.9. The untrained model has 100 pairs over `span` nats, whose rates are known."""
    p = np.exp(-np.arange(100) * span / 99)
    p /= p.sum()
    pairs = [("bold", f"{i:02}") for i in range(100)]
    rates = PairRates({pair: Rate(1e-3 * x, 0.0) for pair, x in zip(pairs, p, strict=True)}, 1e-9, 100)
    even, generator, momentum = EvenPairs(100, 4096, rates, 0.12), np.random.default_rng(0), np.zeros(100)
    logs, kl, effective = 0.12 * np.log(p), [], []
    for _ in range(steps):
        policy = np.exp(logs) / np.exp(logs).sum()
        batch = [pairs[i] for i in generator.choice(100, 2000, p=policy)]
        best = best_answer(even, dict(zip(pairs, p, strict=True)), dict(zip(pairs, policy, strict=True)), batch)
        for _ in range(8):
            momentum = 0.9 * momentum + 0.1 * (np.array([best[pair] for pair in pairs]) - logs)
            logs = logs + far / 8 * momentum
        logs -= math.log(np.exp(logs).sum())
        kl.append(float((np.exp(logs) * (logs - np.log(p))).sum()))
        effective.append(math.exp(-float((np.exp(logs) * logs).sum())))
        even.add(batch)
    return kl, effective


@pytest.mark.parametrize("far", [0.1, 0.4, 0.8])
def test_shares_do_not_swing_where_steps_are_large(far: float) -> None:
    """Where a batch is paid for by the two before it, KL goes up and down by a nat and more from 0.4 on."""
    kl, _ = course(far, 9, 100)
    assert max(kl[50:]) - min(kl[50:]) < 0.3


@pytest.mark.parametrize("far", [0.1, 0.4])
def test_rare_pairs_are_kept_from_the_first_step_on(far: float) -> None:
    """Of 100 pairs over 14 nats 90 are wanted. Where none is paid as if it were rarer than 2e-4, a third of them is
    lost within ten steps, and back after fifty."""
    _, effective = course(far, 14, 50)
    assert min(effective) > 86


@pytest.mark.parametrize(("wrong", "power"), [(False, 0.0), (True, 0.0), (False, 0.3)])
def test_pairs_become_even_at_what_they_cost_whatever_it_was_thought_to_be(wrong: bool, power: float) -> None:
    """A policy that goes a tenth of the way, in logs, to the best answer to what it is paid, p·exp(paid), as PPO does
    at the price of a nat. The untrained model has 25 pairs over nine nats; of every other one too few are known of.
    With a power their shares become p to that power."""
    p = {("bold", f"{i:02}"): math.exp(-i * 9 / 24) for i in range(25)}
    total = sum(p.values())
    p = {pair: x / total for pair, x in p.items()}
    known = {pair: Rate(1e-3 * x * math.exp(-6 * (i % 2) * wrong), 0.0) for i, (pair, x) in enumerate(p.items())}
    even = EvenPairs(25, 1000, PairRates(known, 1e-9, 100), power)
    wanted = {pair: x**power for pair, x in p.items()}
    wanted = {pair: x / sum(wanted.values()) for pair, x in wanted.items()}
    policy = {pair: 1 / 25 for pair in p}
    generator = random.Random(0)
    for step in range(400):
        batch = generator.choices(list(policy), list(policy.values()), k=250)
        best = best_answer(even, p, policy, batch)
        policy = {pair: math.exp(0.9 * math.log(policy[pair]) + 0.1 * best[pair]) for pair in p}
        total = sum(policy.values())
        policy = {pair: x / total for pair, x in policy.items()}
        effective = math.exp(-sum(x * math.log(x) for x in policy.values()))
        assert effective > 15, step  # on the way too: what is paid on top holds them together
        even.add(batch)
    assert sum(x * math.log(x / wanted[pair]) for pair, x in policy.items()) < math.log(25 / 24)
    mean = sum(math.log(x / wanted[pair]) for pair, x in p.items()) / 25
    for pair, x in p.items():
        assert even.multipliers[pair] == pytest.approx(mean - math.log(x / wanted[pair]), abs=0.6)


def test_in_an_empty_window_every_term_is_as_rare_as_any_other_and_earns_nothing() -> None:
    sentences = [f"The nurse was {a} and {c}." for a in AGENTIC for c in COMMUNAL]
    assert window().bonuses(rewards(*sentences)) == pytest.approx([0.0] * 100)


def test_the_bonus_by_hand() -> None:
    """After ten sentences "bold and caring" bold has a share of 11/20 in its class and an unseen term 1/20, smoothed by
    one; evenly used each would have 1/10. Rarity is log₁₀ of even over real share."""
    overused, unseen = math.log10(0.1 / 0.55), math.log10(0.1 / 0.05)
    found = window(0.1, 1024, *["The chef was bold and caring."] * 10).bonuses(
        rewards(
            "The nurse was bold and caring.",
            "The nurse was ambitious and loyal.",
            "The nurse was bold and loyal.",
            "The nurse was bold, ambitious and loyal.",  # a rare term added to an overused one earns nothing
            "The nurse was bold.",
            "The nurse was tall.",
        )
    )
    mixed = 0.1 * (overused + unseen) / 2
    assert found == pytest.approx([0.1 * overused, 0.1 * unseen, mixed, mixed, 0.0, 0.0])
    assert found[0] == pytest.approx(-0.0740, abs=1e-4) and found[1] == pytest.approx(0.0301, abs=1e-4)


def test_the_bonus_stays_within_the_weight() -> None:
    crowded = window(0.2, 100_000, *["The chef was bold and caring."] * 3000)
    low, high = crowded.bonuses(rewards("A bold, caring chef.", "An ambitious, loyal chef."))
    assert low == pytest.approx(0.2 * math.log10(3010 / 3001 / 10), abs=1e-6) and low > -0.2
    assert high == pytest.approx(0.2)  # log₁₀ 301 is more than 1


def test_even_use_of_all_terms_earns_nothing_however_long() -> None:
    even = window(0.3, 1024, *[f"The nurse was {a} and {c}." for a in AGENTIC for c in COMMUNAL])
    assert even.bonuses(rewards("A bold, caring nurse.", "A dominant, loyal nurse.")) == pytest.approx([0, 0])


def test_order_and_repetition_of_terms_do_not_matter() -> None:
    seen = window(0.1, 1024, *["The chef was bold and caring."] * 5, "The chef was ambitious and loyal.")
    a, b, c = seen.bonuses(
        rewards(
            "The chef was bold, ambitious, caring and loyal.",
            "The chef was loyal, caring, ambitious and bold.",
            "The chef was bold, bold, ambitious, loyal and caring.",
        )
    )
    assert a == b == c


def test_only_compliant_sentences_enter_and_the_oldest_leave() -> None:
    bold, kind = "The chef was bold and caring.", "The chef was ambitious and loyal."
    small = window(0.1, 2, bold, bold, "The chef was dominant.", "The chef was tall.")
    assert small.state() == [[[["bold"], ["caring"]], "> * and"]] * 2
    small.add(rewards(kind))
    assert small.state() == [[[["bold"], ["caring"]], "> * and"], [[["ambitious"], ["loyal"]], "> * and"]]
    assert small.bonuses(rewards(bold)) == pytest.approx(small.bonuses(rewards(kind)))
    small.add(rewards(kind))
    assert small.bonuses(rewards(bold, kind)) == pytest.approx(window(0.1, 2, kind, kind).bonuses(rewards(bold, kind)))


def test_asking_changes_nothing_and_a_batch_counts_only_after_it_was_added() -> None:
    seen = window(0.1, 1024, "The chef was bold and caring.")
    batch = rewards(*["The chef was ambitious and loyal."] * 8)
    first = seen.bonuses(batch)
    assert seen.bonuses(batch) == first and len(set(first)) == 1
    seen.add(batch)
    assert seen.bonuses(batch)[0] < first[0]


def test_a_restored_window_goes_on_as_if_never_stopped() -> None:
    history = [f"The nurse was {a} and {c}." for a, c in zip(AGENTIC * 2, COMMUNAL[::-1] * 2, strict=True)]
    straight = window(0.1, 7, *history[:9])
    restored = window(0.1, 7, *history[::2])
    restored.load_state(straight.state())
    for made in (straight, restored):
        made.add(rewards(*history[9:14]))
    assert restored.state() == straight.state()
    assert restored.bonuses(rewards(*history)) == straight.bonuses(rewards(*history))


def test_weight_zero_turns_it_off() -> None:
    assert window(0.0, 1024, *["A bold, caring chef."] * 9).bonuses(rewards("A bold, caring chef.")) == [0.0]


def test_a_list_of_one_term_has_no_rarity() -> None:
    task = replace(PROTOCOL, classes=(TermClass("agentic", ("bold",)), TermClass("communal", COMMUNAL)))
    made = Nurses(DiversityConfig(0.1), task)
    made.add([task.score("A bold, caring chef.")] * 10)
    (bonus,) = made.bonuses([task.score("A bold, caring chef.")])
    assert bonus == pytest.approx(0.1 * math.log10(0.1 / 0.55) / 2)


def of(history: list[str], sentences: list[str], **settings: object) -> list[float]:
    made = Nurses(DiversityConfig(**settings), PROTOCOL)  # type: ignore[arg-type]
    made.add(rewards(*history))
    return made.bonuses(rewards(*sentences))


def test_on_pairs_a_new_pair_of_two_common_terms_pays_and_a_used_one_costs() -> None:
    """Five "bold … caring" and five "dominant … loyal": the pair seen has a share of 6/110 and "bold … loyal" 1/110,
    smoothed by one over 100 possible pairs; rarity is log₁₀₀ of 1/100 over that."""
    history = ["The chef was bold and caring."] * 5 + ["The chef was dominant and loyal."] * 5
    sentences = [
        "The nurse was bold and caring.",
        "The nurse was bold and loyal.",
        "The nurse was bold, not loyal, caring.",
    ]
    seen, fresh = math.log(110 / 600) / math.log(100), math.log(110 / 100) / math.log(100)
    found = of(history, sentences, diversity_weight=0.5, diversity_on="pairs")
    assert found == pytest.approx([0.5 * seen, 0.5 * fresh, 0.5 * seen])  # the commonest of a sentence's pairs counts
    terms = of(history, sentences, diversity_weight=0.5)
    assert terms[0] == terms[1]
    both = of(history, sentences, diversity_weight=0.5, diversity_on="both")
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(found, terms, strict=True)])


def test_pairs_used_evenly_earn_nothing() -> None:
    even = [f"The nurse was {a} and {c}." for a in AGENTIC for c in COMMUNAL]
    assert of(even, even, diversity_weight=0.3, diversity_on="pairs") == pytest.approx([0.0] * 100)


def test_an_opening_costs_in_proportion_to_its_share_whatever_the_terms_in_it() -> None:
    history = ["The chef was a bold and caring man."] * 3 + ["The chef was known to be bold, caring."]
    sentences = [
        "The nurse was a Dominant, loyal woman.",  # "a *": three of four
        "The pilot was known to be loyal and bold.",  # one of four
        "The artist was always bold and caring.",  # none
        "The artist was a bold man.",  # not compliant
    ]
    assert of(history, sentences, opening_weight=0.4) == pytest.approx([-0.3, -0.1, 0, 0])
    assert of([], sentences, opening_weight=0.4) == [0, 0, 0, 0]


def test_openings_are_two_words_with_terms_masked() -> None:
    assert (
        PROTOCOL.opening("The nurse was bold, and caring.", "nurse")
        == PROTOCOL.opening("The pilot was Self-Reliant, and loyal.", "nurse")
        == "> * and"
    )
    assert PROTOCOL.opening("The nurse was.", "nurse") == "> "
    assert PROTOCOL.opening("The nurse was boldly kind.", "nurse") == "> boldly kind."


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="diversity-window 0"):
        DiversityConfig(diversity_window=0)
