"""PPO's formulas against numbers worked by hand, sums by definition, and exact distributions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.ppo import maths

finite = st.floats(-3, 3, width=32)


def from_lengths(rows: list[list[float]], pad: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) values, and the mask of the real ones."""
    width = max(map(len, rows))
    values = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return values, torch.tensor([[t < len(row) for t in range(width)] for row in rows])


def n_step_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """GAE as it is defined: the (1−λ)λⁿ⁻¹-weighted mean of all n-step advantages, each a sum of its own. O(T³)."""
    end = len(rewards)

    def n_step(t: int, n: int) -> float:
        discounted = sum(gamma**k * rewards[t + k] for k in range(n))
        tail = gamma**n * values[t + n] if t + n < end else 0.0
        return discounted + tail - values[t]

    out = []
    for t in range(end):
        left = end - t
        mean = sum((1 - lam) * lam ** (n - 1) * n_step(t, n) for n in range(1, left))
        out.append(mean + lam ** (left - 1) * n_step(t, left))  # all longer returns are the last one
    return out


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.tuples(finite, finite), min_size=1, max_size=6), min_size=1, max_size=4),
    st.sampled_from([1.0, 0.9]),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_gae_is_the_weighted_mean_of_all_n_step_advantages(
    batch: list[list[tuple[float, float]]], gamma: float, lam: float
) -> None:
    # What lies beyond a row's end may be anything.
    rewards, mask = from_lengths([[r for r, _ in row] for row in batch], pad=math.nan)
    values, _ = from_lengths([[v for _, v in row] for row in batch], pad=math.inf)
    found = maths.gae(rewards, values, mask, gamma, lam)
    for i, row in enumerate(batch):
        expected = n_step_advantages([r for r, _ in row], [v for _, v in row], gamma, lam)
        assert found.advantages[i, : len(row)].tolist() == pytest.approx(expected, abs=1e-4)
        returns = [a + v for a, (_, v) in zip(expected, row, strict=True)]
        assert found.returns[i, : len(row)].tolist() == pytest.approx(returns, abs=1e-4)
        assert not found.advantages[i, len(row) :].any() and not found.returns[i, len(row) :].any()


def test_gae_with_lambda_one_is_the_reward_still_to_come_less_the_value() -> None:
    rewards, mask = from_lengths([[0.0, -0.1, 1.0]])
    values = torch.tensor([[0.3, 0.5, 0.2]])
    found = maths.gae(rewards, values, mask, 1.0, 1.0)
    assert found.advantages[0].tolist() == pytest.approx([0.6, 0.4, 0.8])
    assert found.returns[0].tolist() == pytest.approx([0.9, 0.9, 1.0])


def test_the_score_is_paid_on_the_last_real_token_and_the_kl_on_every_one() -> None:
    kl, mask = from_lengths([[0.5, -0.25, 1.0], [2.0], [1.0, 1.0]], pad=math.nan)
    rewards = maths.token_rewards(torch.tensor([1.0, -0.2, 0.3]), kl, mask, 0.1)
    expected = [[-0.05, 0.025, 0.9], [-0.4, 0.0, 0.0], [-0.1, 0.2, 0.0]]
    for row, wanted in zip(rewards.tolist(), expected, strict=True):
        assert row == pytest.approx(wanted)


def test_nothing_is_paid_after_the_stop_token() -> None:
    kl, mask = from_lengths([[0.0] * n for n in (1, 3, 5, 8)])
    rewards = maths.token_rewards(torch.ones(4), kl, mask, 0.05)
    assert torch.nonzero(rewards).tolist() == [[0, 0], [1, 2], [2, 4], [3, 7]]


def test_a_sequence_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one completion token"):
        maths.token_rewards(torch.ones(2), torch.zeros(2, 3), torch.tensor([[True] * 3, [False] * 3]), 0.1)


def test_whitening_sees_the_real_tokens_of_the_whole_batch_and_no_others() -> None:
    rows = [[1.0, 2.0, 3.0], [10.0], [-4.0, 0.5]]
    real = np.concatenate(rows)
    expected = (real - real.mean()) / real.std()
    for pad in (0.0, 1e6, math.nan):
        values, mask = from_lengths(rows, pad)
        white = maths.whiten(values, mask)
        np.testing.assert_allclose(white[mask].numpy(), expected, atol=1e-6)
        assert not white[~mask].any()


def test_whitening_is_blind_to_scale_and_shift_and_survives_equal_values() -> None:
    values, mask = from_lengths([[0.3, -0.7, 0.1], [0.9]])
    white = maths.whiten(values, mask)
    torch.testing.assert_close(maths.whiten(5 * values + 3, mask), white, atol=1e-5, rtol=0)
    assert maths.whiten(torch.full((2, 3), 0.7), torch.ones(2, 3, dtype=torch.bool)).abs().max() < 1e-2


def test_masked_mean_of_nothing_is_zero() -> None:
    values = torch.tensor([1.0, 2.0, math.nan])
    assert float(maths.masked_mean(values, torch.tensor([True, True, False]))) == 1.5
    assert float(maths.masked_mean(values, torch.zeros(3, dtype=torch.bool))) == 0


P, Q = [0.5, 0.25, 0.2, 0.05], [0.1, 0.3, 0.2, 0.4]
KL_PQ = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))


def test_k1_and_k3_average_to_the_kl_under_the_distribution_that_was_sampled() -> None:
    p, logp, logq = torch.tensor(P), torch.tensor(P).log(), torch.tensor(Q).log()
    assert float((p * maths.kl_k1(logp, logq)).sum()) == pytest.approx(KL_PQ, abs=1e-6)
    assert float((p * maths.kl_k3(logp, logq)).sum()) == pytest.approx(KL_PQ, abs=1e-6)
    reverse = sum(q * math.log(q / p) for p, q in zip(P, Q, strict=True))
    assert reverse != pytest.approx(KL_PQ, abs=0.05)  # or the direction would not have been tested


@given(st.floats(-40, 0), st.floats(-40, 0))
def test_k3_is_never_negative_never_overflows_and_is_zero_for_equal_policies(a: float, b: float) -> None:
    logp, logq = torch.tensor([a]), torch.tensor([b])
    assert 0 <= float(maths.kl_k3(logp, logq)) < math.inf
    assert float(maths.kl_k3(logp, logp)) == 0 == float(maths.kl_k1(logp, logp))


def surrogate(ratio: float, advantage: float) -> tuple[float, float, bool]:
    """Loss, its gradient with respect to log π_θ, and whether it is clipped."""
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    out = maths.policy_loss(new, torch.zeros(1), torch.tensor([advantage]), 0.2)
    out.loss.backward()
    assert new.grad is not None
    assert float(out.log_ratio) == pytest.approx(math.log(ratio), abs=1e-6)
    return float(out.loss.detach()), float(new.grad), bool(out.clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),  # where policies agree it is the plain policy gradient
        (1.1, 1.0, -1.1, -1.1, False),
        (1.5, 1.0, -1.2, 0.0, True),  # a good token already likelier by more than 20 % earns nothing further
        (0.5, 1.0, -0.5, -0.5, False),  # a good token that became rare is pulled back in full
        (0.5, -1.0, 0.8, 0.0, True),
        (1.5, -1.0, 1.5, 1.5, False),
    ],
)
def test_the_clipped_surrogate_by_hand(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: bool
) -> None:
    assert surrogate(ratio, advantage) == (pytest.approx(loss), pytest.approx(gradient), clipped)


def test_huge_ratios_stay_finite() -> None:
    new, old, advantages = torch.tensor([0.0, 90.0, -90.0]), torch.zeros(3), torch.tensor([1.0, -1.0, -1.0])
    out = maths.policy_loss(new, old, advantages, 0.2)
    assert out.loss.tolist() == pytest.approx([-1.0, math.exp(20), 0.8], rel=1e-6)
    assert out.log_ratio.tolist() == [0, 20, -20]
    assert out.clipped.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [
        (0.5, 0.5, 1.0, 0.125),
        (0.6, 0.5, 1.0, 0.08),  # within the clip: half the squared error
        (1.0, 0.5, 1.0, 0.045),  # moved by 0.5, counted as if by 0.2: ½ (1 − 0.7)²
        (1.5, 0.5, 1.0, 0.125),  # plain ½·0.25 is more than ½·0.09
        (0.0, 0.5, 1.0, 0.5),
    ],
)
def test_the_value_loss_by_hand(value: float, old: float, target: float, loss: float) -> None:
    found = maths.value_loss(torch.tensor([value]), torch.tensor([old]), torch.tensor([target]), 0.2)
    assert float(found) == pytest.approx(loss)


def test_explained_variance_is_one_for_the_truth_zero_for_a_constant_and_below_for_worse() -> None:
    returns, mask = from_lengths([[1.0, 2.0, 3.0], [6.0]], pad=99.0)

    def explained(rows: list[list[float]]) -> float:
        return float(maths.explained_variance(from_lengths(rows, -77.0)[0], returns, mask))

    assert explained([[1.0, 2.0, 3.0], [6.0]]) == pytest.approx(1)
    assert explained([[0.0, 1.0, 2.0], [5.0]]) == pytest.approx(1)  # a constant error is none of variance
    assert explained([[7.0, 7.0, 7.0], [7.0]]) == pytest.approx(0)
    assert explained([[1.0, 2.0, 3.0], [2.0]]) == pytest.approx(1 - 3.0 / 3.5)  # errors 0 0 0 4; returns vary by 3.5
    assert explained([[-1.0, -2.0, -3.0], [-6.0]]) == pytest.approx(-3)


def test_explained_variance_is_zero_where_returns_do_not_vary() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert float(maths.explained_variance(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3), mask)) == 0


@pytest.mark.parametrize(
    ("kl", "coefficient"),
    [
        (4.0, 0.05),  # on target
        (4.2, 0.05 * 1.00032),  # 5 % above, of which 64/10000 is applied
        (6.0, 0.05 * 1.00128),  # 50 % above counts as 20 %
        (0.0, 0.05 * 0.99872),
        (-1.0, 0.05 * 0.99872),
    ],
)
def test_the_kl_coefficient_follows_its_target_by_hand(kl: float, coefficient: float) -> None:
    assert maths.adapt_kl_coef(0.05, kl, 4.0, 64, 10_000) == pytest.approx(coefficient, rel=1e-9)


def test_without_a_target_the_kl_coefficient_stays() -> None:
    assert maths.adapt_kl_coef(0.05, 100.0, None, 64, 10_000) == 0.05
