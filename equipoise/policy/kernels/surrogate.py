"""PPO's losses of a mini-batch and their gradients in one pass, where PyTorch takes a hundred kernels for a few hundred
numbers. The plain twin, and where each formula is from: `ppo.maths`.

N tokens laid flat; everything is float32.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


class Limits(NamedTuple):
    clip: float
    """Of the ratio, around 1."""
    value_clip: float
    """Of the values, around the old ones."""
    entropy: float
    """Coefficient of the entropy."""
    log_ratio: float
    """Beyond it a log-ratio counts as this much."""


@triton.jit
def _k3(x):
    """exp(x) − 1 − x, by its series where the difference would lose digits."""
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0 - x)


@triton.jit
def _least(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _most(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamp(x, limit):
    return _least(_most(x, -limit), limit)


@triton.jit(do_not_specialize=["N"])
def _surrogate_kernel(
    logp, values, real, old_logp, advantages, weight, share, old_values, returns, reference, kl_weight,
    dlogp, dvalues, dentropy, stats, N, clip, value_clip, entropy, limit,
    VALUES: tl.constexpr, REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    policy_sum = tl.zeros((BLOCK,), tl.float32)
    value_sum = tl.zeros((BLOCK,), tl.float32)
    reference_sum = tl.zeros((BLOCK,), tl.float32)
    kl_sum = tl.zeros((BLOCK,), tl.float32)
    clipped_sum = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < N
        is_real = tl.load(real + at, inside, 0) != 0
        w, own = tl.load(weight + at, inside, 0.0), tl.load(share + at, inside, 0.0)
        # A spare token's score is a number like any other: it is put to 0, and weighs nothing.
        new = tl.where(is_real, tl.load(logp + at, inside, 0.0), 0.0)
        raw = new - tl.load(old_logp + at, inside, 0.0)
        log_ratio = _clamp(raw, limit)
        ratio, a = tl.exp(log_ratio), tl.load(advantages + at, inside, 0.0)
        unclipped, clipped = ratio * a, _least(_most(ratio, 1.0 - clip), 1.0 + clip) * a
        grad = tl.where((unclipped <= clipped) & (tl.abs(raw) <= limit), -unclipped, 0.0) * own
        policy_sum += tl.where(inside, -_least(unclipped, clipped) * own, 0.0)
        clipped_sum += tl.where(inside & (clipped < unclipped), own, 0.0)
        kl_sum += tl.where(inside, _k3(log_ratio) * w, 0.0)
        size = tl.where(inside, tl.abs(log_ratio), 0.0)
        largest = _most(largest, size)
        if REFERENCE:
            price, apart = tl.load(kl_weight + at, inside, 0.0), tl.load(reference + at, inside, 0.0) - new
            held = _clamp(apart, limit)
            reference_sum += tl.where(inside, _k3(held) * price, 0.0)
            grad += tl.where(tl.abs(apart) <= limit, 1.0 - tl.exp(held), 0.0) * price
        tl.store(dlogp + at, tl.where(is_real, grad, 0.0), inside)
        tl.store(dentropy + at, -entropy * w, inside)
        if VALUES:
            v = tl.where(is_real, tl.load(values + at, inside, 0.0), 0.0)
            old, target = tl.load(old_values + at, inside, 0.0), tl.load(returns + at, inside, 0.0)
            near = old + _clamp(v - old, value_clip)
            free, bound = (v - target) * (v - target), (near - target) * (near - target)
            value_sum += tl.where(inside, 0.5 * _most(free, bound) * w, 0.0)
            slope = tl.where(tl.abs(v - old) <= value_clip, near - target, 0.0)
            slope = tl.where(free > bound, v - target, tl.where(free == bound, 0.5 * (v - target + slope), slope))
            tl.store(dvalues + at, tl.where(is_real, slope * w, 0.0), inside)
    tl.store(stats, tl.sum(policy_sum, 0))
    tl.store(stats + 1, tl.sum(value_sum, 0))
    tl.store(stats + 2, tl.sum(reference_sum, 0))
    tl.store(stats + 3, tl.sum(kl_sum, 0))
    tl.store(stats + 4, tl.sum(clipped_sum, 0))
    tl.store(stats + 5, tl.max(largest, 0) + 0.0 * tl.sum(largest, 0))


class Surrogate(NamedTuple):
    """Gradients (N,) of the loss, and its parts."""

    logprobs: Tensor
    values: Tensor
    """0 without a value head."""
    entropies: Tensor
    stats: Tensor
    """(6,) sums of policy loss, value loss and KL to the reference, KL to the old policy, share that was clipped;
    largest log-ratio."""


def surrogate(
    logprobs_N: Tensor, values_N: Tensor, real_N: Tensor, columns: Mapping[str, Tensor], limits: Limits
) -> Surrogate:
    """`columns` (N,) each, as in `ppo.update`, but for `row` and `exact_weight`."""
    count, device = len(logprobs_N), logprobs_N.device
    gradients = torch.zeros(3, count, device=device)
    stats = torch.empty(6, device=device)
    none = columns["weight"]
    names = ("old_logp", "advantages", "weight", "share", "old_values", "returns", "reference", "kl_weight")
    _surrogate_kernel[(1,)](
        logprobs_N, values_N, real_N, *(columns.get(name, none) for name in names), *gradients, stats, count,
        limits.clip, limits.value_clip, limits.entropy, limits.log_ratio,
        VALUES="returns" in columns, REFERENCE="reference" in columns, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    dlogprobs, dvalues, dentropies = gradients
    return Surrogate(dlogprobs, dvalues, dentropies, stats)
