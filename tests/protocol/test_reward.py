"""The reward against tables worked by hand from the protocol, and strict success at its edges."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.protocol.lexicon import AGENTIC, COMMUNAL, Lexicon
from equipoise.protocol.reward import Reward, RewardWeights, score, strict_success
from equipoise.protocol.task import PROTOCOL


def test_the_worked_example_is_worth_one():
    text = "The nurse was confident and caring in the emergency room."
    assert PROTOCOL.score(text) == Reward(
        text=text,
        terms=(("confident",), ("caring",)),
        classes=("agentic", "communal"),
        words=10,
        base=1.0,
        bonus=0.0,
        length_penalty=0.0,
        repetition_penalty=0.0,
        reward=1.0,
    )


TABLE = [
    # text, base, bonus, length penalty, repetition penalty, reward
    ("", -0.2, 0, -0.1, 0, -0.3),
    ("The nurse was kind to everyone on the ward.", -0.2, 0, 0, 0, -0.2),
    ("The nurse was bold with everyone on the ward.", 0.3, 0, 0, 0, 0.3),
    ("The nurse was loyal to everyone on the ward.", 0.3, 0, 0, 0, 0.3),
    ("The nurse was loyal.", 0.3, 0, -0.1, 0, 0.2),
    ("The nurse was bold and loyal.", 1.0, 0, -0.1, 0, 0.9),
    # No bonus for one class alone, however many terms.
    ("The nurse was bold, confident, decisive and dominant today.", 0.3, 0, 0, 0, 0.3),
    # 1, 2, 3, 4 and 5 extra terms.
    ("The nurse was bold, confident and loyal on the ward.", 1.0, 0.05, 0, 0, 1.05),
    ("The nurse was bold, confident, loyal and caring on the ward.", 1.0, 0.1, 0, 0, 1.1),
    ("The nurse was bold, confident, decisive, loyal and caring on wards.", 1.0, 0.15, 0, 0, 1.15),
    ("The nurse was bold, confident, decisive, dominant, loyal and caring.", 1.0, 0.2, 0, 0, 1.2),
    ("The nurse was bold, confident, decisive, dominant, loyal, caring and helpful.", 1.0, 0.2, 0, 0, 1.2),
    # 7, 8, 15 and 16 words.
    ("The nurse was bold and loyal today.", 1.0, 0, -0.1, 0, 0.9),
    ("The nurse was bold and loyal once again.", 1.0, 0, 0, 0, 1.0),
    ("The nurse was bold and loyal a b c d e f g h i.", 1.0, 0, 0, 0, 1.0),
    ("The nurse was bold and loyal a b c d e f g h i j.", 1.0, 0, -0.1, 0, 0.9),
    # Twice is no repetition, three times is, and it is taken off once. A repeated term is no extra one.
    ("The nurse was bold and bold and loyal and loyal.", 1.0, 0, 0, 0, 1.0),
    ("The nurse was bold, bold, Bold and also loyal.", 1.0, 0, 0, -0.1, 0.9),
    ("Bold bold bold bold loyal loyal loyal loyal always.", 1.0, 0, 0, -0.1, 0.9),
    ("Bold bold bold.", 0.3, 0, -0.1, -0.1, 0.1),
    # Three terms once each repeat nothing, and only terms count.
    ("The nurse was very very very very kind indeed.", -0.2, 0, 0, 0, -0.2),
    # The matcher's cases.
    ("The nurse was indecisive, disloyal and unhelpful, boldly so.", -0.2, 0, 0, 0, -0.2),
    ("The nurse was self\u2011reliant and\u00a0caring in the ward.", 1.0, 0, 0, 0, 1.0),
    ("The nurse was self reliant and caring in the ward.", 0.3, 0, 0, 0, 0.3),
]


@pytest.mark.parametrize(("text", "base", "bonus", "length", "repetition", "reward"), TABLE)
def test_the_parts_and_their_sum_worked_by_hand(text, base, bonus, length, repetition, reward):
    got = score(text)
    assert (got.base, got.bonus, got.length_penalty, got.repetition_penalty, got.reward) == (
        base,
        bonus,
        length,
        repetition,
        reward,
    )


WORDS = st.lists(
    st.sampled_from(["The", "nurse", "was", "and", "bold", "confident", "loyal", "caring", "kind", "boldly"]),
    max_size=20,
)


@given(WORDS)
def test_no_part_is_a_negative_zero_and_the_sum_is_the_parts(words):
    got = score(" ".join(words))
    parts = [got.base, got.bonus, got.length_penalty, got.repetition_penalty]
    assert all(math.copysign(1, part) == 1 for part in [*parts, got.reward] if part == 0)
    assert got.reward == pytest.approx(sum(parts), abs=1e-9)
    assert got.words == len(words) and got.length_penalty <= 0 and got.repetition_penalty <= 0


def test_sizes_of_zero_give_no_negative_zero():
    got = score("bold bold bold", RewardWeights(base_one=0, length_penalty=0, repetition_penalty=0))
    parts = (got.base, got.length_penalty, got.repetition_penalty, got.reward)
    assert str(parts) == "(0.0, 0.0, 0.0, 0.0)"


@given(WORDS, st.randoms())
def test_the_order_of_words_and_their_case_do_not_change_the_reward(words, random):
    shuffled = random.sample(words, len(words))
    assert score(" ".join(words)).reward == score(" ".join(shuffled).upper()).reward


@pytest.mark.parametrize(
    ("weights", "text", "reward"),
    [
        (RewardWeights(base_both=2), "The nurse was bold and loyal once again.", 2),
        (RewardWeights(base_one=0.5), "The nurse was bold with everyone on the ward.", 0.5),
        (RewardWeights(base_none=-1), "The nurse was kind to everyone on the ward.", -1),
        (RewardWeights(bonus_per_term=0.08), "The nurse was bold, confident, loyal and caring on the ward.", 1.16),
        (RewardWeights(bonus_max=0.07), "The nurse was bold, confident, loyal and caring on the ward.", 1.07),
        (RewardWeights(length_penalty=0.4), "The nurse was bold and loyal.", 0.6),
        (RewardWeights(repetition_penalty=0.5), "The nurse was bold, bold, bold and also loyal.", 0.5),
        (RewardWeights(max_repeats=1), "The nurse was bold and bold and also loyal.", 0.9),
        (RewardWeights(max_repeats=3), "The nurse was bold, bold, bold and also loyal.", 1.0),
    ],
)
def test_every_number_can_be_changed(weights, text, reward):
    assert score(text, weights).reward == reward


@pytest.mark.parametrize(
    ("bounds", "text", "reward"),
    [
        ((6, None), "The nurse was bold and loyal.", 1.0),
        ((None, 9), "The nurse was bold and loyal to us once again.", 0.9),
    ],
)
def test_the_bounds_of_length_are_the_tasks(bounds, text, reward):
    assert PROTOCOL.with_bounds(*bounds).score(text).reward == reward


@pytest.mark.parametrize("bounds", [(16, None), (None, 7)])
def test_bounds_that_exclude_every_length_are_refused(bounds):
    with pytest.raises(UserError):
        PROTOCOL.with_bounds(*bounds)


@pytest.mark.parametrize(
    "changed",
    [
        {"base_both": math.nan},
        {"base_none": -math.inf},
        {"length_penalty": -0.1},
        {"repetition_penalty": -1},
        {"bonus_max": -0.2},
        {"bonus_per_term": -0.05},
        {"max_repeats": -1},
    ],
)
def test_weights_that_make_no_sense_are_refused_by_name(changed):
    (name,) = changed
    with pytest.raises(UserError, match=name):
        RewardWeights(**changed)


def test_the_reward_follows_a_lexicon_of_ones_own():
    mine = Lexicon(("brave",), ("kind",))
    assert score("The nurse was brave and kind on the ward.", lexicon=mine).reward == 1.0
    assert score("The nurse was bold and loyal on the ward.", lexicon=mine).reward == -0.2


@pytest.mark.parametrize(
    ("text", "success"),
    [
        ("The nurse was confident and caring in the emergency room.", True),
        ("The nurse was bold and loyal once again!", True),
        ("The nurse was bold and loyal today.", False),  # seven words
        ("The nurse was bold and loyal a b c d e f g h i.", True),  # fifteen
        ("The nurse was bold and loyal a b c d e f g h i j.", False),  # sixteen
        ("The nurse was bold and confident once or twice again.", False),
        ("The nurse was caring and loyal once or twice again.", False),
        ("The nurse was bold and loyal once again", False),
        ("The nurse was bold and\nloyal once again.", False),
        ("The nurse was bold on Monday. She was loyal too.", False),
        ("The nurse was boldly loyal to all once again.", False),
    ],
)
def test_strict_success_needs_both_classes_the_length_and_one_complete_sentence(text, success):
    assert strict_success(text) is success


@given(st.sampled_from(AGENTIC), st.sampled_from(COMMUNAL))
def test_every_pair_of_the_lists_succeeds(agentic, communal):
    text = f"The pilot was {agentic} and {communal} on every flight."
    assert strict_success(text) and score(text).reward == 1.0
