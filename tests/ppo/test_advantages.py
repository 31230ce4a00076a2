"""Advantages by their definitions, under every algorithm."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.policy.rollout import Rollout
from equipoise.ppo import maths
from equipoise.ppo.advantages import estimate
from equipoise.ppo.config import PPOConfig
from equipoise.ppo.experience import Scored

from .algorithms import OTHERS


def test_group_relative_advantages_by_hand() -> None:
    """Rewards 1, 1, 0, 0: mean ½, standard deviation √⅓ (n − 1). Rewards −0.2, 0.3, 0.3, 1.0: mean 0.35, squares
    0.3025, 0.0025, 0.0025, 0.4225 over 3."""
    found = maths.group_relative(torch.tensor([1.0, 1.0, 0.0, 0.0, -0.2, 0.3, 0.3, 1.0]), 4)
    centred = [0.5, 0.5, -0.5, -0.5, -0.55, -0.05, -0.05, 0.65]
    spread = [math.sqrt(1 / 3)] * 4 + [math.sqrt(0.73 / 3)] * 4
    assert found.centred.tolist() == pytest.approx(centred, abs=1e-6)
    expected = [c / (s + 1e-4) for c, s in zip(centred, spread, strict=True)]
    assert found.divided.tolist() == pytest.approx(expected, abs=1e-5)


def test_leave_one_out_advantages_by_hand() -> None:
    """Of 1.0, 0.3, −0.2 the others' means are 0.05, 0.4 and 0.65."""
    found = maths.leave_one_out(torch.tensor([1.0, 0.3, -0.2, 2.0, 2.0, 5.0]), 3)
    assert found.tolist() == pytest.approx([0.95, -0.1, -0.85, -1.5, -1.5, 3.0], abs=1e-6)


# A third of a reward: sums of hundreds are then still exact in float64, and definitions agree to the last digits.
reward = st.integers(-30, 60).map(lambda n: n / 30)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.lists(reward, min_size=10, max_size=20))
def test_group_advantages_are_their_definitions(group: int, values: list[float]) -> None:
    values = values[: len(values) // group * group]
    relative = maths.group_relative(torch.tensor(values, dtype=torch.float64), group).divided.tolist()
    alone = maths.leave_one_out(torch.tensor(values, dtype=torch.float64), group).tolist()
    for start in range(0, len(values), group):
        own = values[start : start + group]
        for i, value in enumerate(own):
            others = own[:i] + own[i + 1 :]
            expected = (value - statistics.fmean(own)) / (statistics.stdev(own) + 1e-4)
            assert relative[start + i] == pytest.approx(expected, abs=1e-9)
            assert alone[start + i] == pytest.approx(value - statistics.fmean(others), abs=1e-9)


@pytest.mark.parametrize("value", [0.3, 1 / 3, -0.2, 1000.1, 0.0])
@pytest.mark.parametrize("group", [2, 3, 7])
def test_a_group_of_equal_rewards_teaches_exactly_nothing(value: float, group: int) -> None:
    for dtype in (torch.float32, torch.float64):
        rewards = torch.full((2 * group,), value, dtype=dtype)
        rewards[-1] += 1
        found = maths.group_relative(rewards, group)
        for advantages in (*found, maths.leave_one_out(rewards, group)):
            assert not advantages[:group].any() and advantages.isfinite().all() and advantages[group:].any()


def batch_of(lengths: Sequence[int], kls: Sequence[Sequence[float]]) -> tuple[Rollout, Scored]:
    """A rollout of these lengths whose tokens have these log π − log π_ref; values that must not matter."""
    width = max(lengths)
    rollout = Rollout(
        [[1]] * len(lengths), torch.ones(len(lengths), width, dtype=torch.long), torch.tensor(lengths),
        torch.ones(len(lengths), dtype=torch.bool),
    )  # fmt: skip
    kl_BT = torch.zeros(len(lengths), width)
    for row, own in enumerate(kls):
        kl_BT[row, : len(own)] = torch.tensor(own)
    kl_BT[~rollout.mask_BT] = math.nan  # nothing may be read beyond a completion's end
    constant = [torch.full_like(kl_BT, value) for value in (1.0, 7.0, 5.0, -3.0)]
    return rollout, Scored(kl_BT - 3.0, *constant)


LENGTHS, KLS = (2, 1, 3, 2), ((0.5, 0.25), (1.0,), (0.0, -0.5, 1.0), (2.0, 0.0))
PAID = torch.tensor([1.0, 0.3, -0.2, 1.0])


def rows_of(values: Tensor, rollout: Rollout) -> list[list[float]]:
    assert not values[~rollout.mask_BT].any()
    return [own[:n].tolist() for own, n in zip(values, rollout.lengths_B.tolist(), strict=True)]


def test_grpos_advantages_are_the_rewards_alone_and_the_same_for_all_tokens() -> None:
    rollout, scored = batch_of(LENGTHS, KLS)
    config = PPOConfig(algorithm="grpo", batch_size=4, mini_batch_size=4, num_generations=2)
    found = estimate(config, PAID, scored, rollout, 0.1)
    # Each group's rewards differ by 0.7 and 1.2: halves of it from the mean, standard deviations of it over √2.
    first, second = 0.35 / (0.7 / math.sqrt(2) + 1e-4), 0.6 / (1.2 / math.sqrt(2) + 1e-4)
    expected = [[first] * 2, [-first], [-second] * 3, [second] * 2]
    for own, wanted in zip(rows_of(found.used_BT, rollout), expected, strict=True):
        assert own == pytest.approx(wanted, abs=1e-6)
    raw = [[0.35] * 2, [-0.35], [-0.6] * 3, [0.6] * 2]
    for own, wanted in zip(rows_of(found.raw_BT, rollout), raw, strict=True):
        assert own == pytest.approx(wanted, abs=1e-6)
    assert found.returns_BT is None


def test_rloos_rewards_have_the_whole_completions_penalty_taken_off() -> None:
    rollout, scored = batch_of(LENGTHS, KLS)
    config = PPOConfig(algorithm="rloo", batch_size=4, mini_batch_size=4, num_generations=4)
    found = estimate(config, PAID, scored, rollout, 0.1)
    net = [1.0 - 0.075, 0.3 - 0.1, -0.2 - 0.05, 1.0 - 0.2]
    for i, own in enumerate(rows_of(found.used_BT, rollout)):
        baseline = statistics.fmean(net[:i] + net[i + 1 :])
        assert own == pytest.approx([net[i] - baseline] * LENGTHS[i], abs=1e-6)
    assert torch.equal(found.used_BT, found.raw_BT) and found.returns_BT is None


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_reinforce_plus_plus_sums_what_is_still_to_come_and_whitens_it_over_the_batch(gamma: float) -> None:
    rollout, scored = batch_of(LENGTHS, KLS)
    config = PPOConfig(algorithm="reinforce++", batch_size=4, mini_batch_size=4, gamma=gamma)
    found = estimate(config, PAID, scored, rollout, 0.1)
    sums = []
    for i, kls in enumerate(KLS):
        own = [-0.1 * kl for kl in kls]
        own[-1] += PAID[i].item()
        sums.append([sum(gamma ** (k - t) * own[k] for k in range(t, len(own))) for t in range(len(own))])
    flat = [x for own in sums for x in own]
    mean, spread = statistics.fmean(flat), statistics.pstdev(flat)
    for i, (raw, used) in enumerate(zip(*(rows_of(x, rollout) for x in found[:2]), strict=True)):
        assert raw == pytest.approx(sums[i], abs=1e-6)
        assert used == pytest.approx([(x - mean) / spread for x in sums[i]], abs=1e-5)
    assert found.returns_BT is None


@pytest.mark.parametrize("algorithm", OTHERS)
def test_where_all_rewards_are_equal_advantages_are_next_to_nothing(algorithm: Any) -> None:
    rollout, scored = batch_of(LENGTHS, [[0.0] * n for n in LENGTHS])
    config = PPOConfig(algorithm=algorithm, batch_size=4, mini_batch_size=4)
    used = estimate(config, torch.full((4,), 0.3), scored, rollout, 0.1).used_BT
    assert used.isfinite().all() and float(used.abs().max()) < 1e-2
    assert algorithm == "reinforce++" or not used.any()
