"""Over the vocabulary: log-probability and entropy of given tokens with their gradient, and drawing the next token.

A row of V logits is read where it lies, once or a few times, and never copied in float32. N rows.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _logprob_kernel(logits, targets, logprob, lse, entropy, V, inverse, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = float("-inf")
    total = 0.0
    first = 0.0  # Σ e^(z − top) · (z − top)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        z = tl.load(logits + row * V + columns, inside, float("-inf")).to(tl.float32) * inverse
        new_top = tl.maximum(top, tl.max(z, 0))
        shrink = tl.exp(top - new_top)
        e = tl.exp(z - new_top)
        distance = tl.where(e > 0.0, z - new_top, 0.0)
        # With the old top further down, every earlier term's distance grows by the difference.
        first = shrink * first + tl.where(total > 0.0, shrink * total * (top - new_top), 0.0) + tl.sum(e * distance, 0)
        total = total * shrink + tl.sum(e, 0)
        top = new_top
    log_total = tl.log(total)
    target = tl.load(logits + row * V + tl.load(targets + row)).to(tl.float32) * inverse
    tl.store(logprob + row, target - top - log_total)
    tl.store(lse + row, top + log_total)
    tl.store(entropy + row, log_total - first / total)


@triton.jit
def _logprob_backward_kernel(
    logits, targets, lse, entropy, dlogprob, dentropy, out, V, inverse, BLOCK: tl.constexpr, ENTROPY: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    z = tl.load(logits + row * V + columns, inside, float("-inf")).to(tl.float32) * inverse
    log_p = z - tl.load(lse + row)
    p = tl.exp(log_p)
    grad = tl.load(dlogprob + row) * (tl.where(columns == tl.load(targets + row), 1.0, 0.0) - p)
    if ENTROPY:
        grad -= tl.load(dentropy + row) * p * (tl.where(p > 0.0, log_p, 0.0) + tl.load(entropy + row))
    tl.store(out + row * V + columns, (grad * inverse).to(out.dtype.element_ty), inside)


class _LogProbability(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, inverse: float, with_entropy: bool) -> tuple[Tensor, Tensor]:
        rows, size = logits.shape
        logprob, lse, entropy = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
        _logprob_kernel[(rows,)](logits, targets, logprob, lse, entropy, size, inverse, BLOCK=BLOCK, num_warps=8)
        ctx.save_for_backward(logits, targets, lse, entropy)
        ctx.inverse, ctx.with_entropy = inverse, with_entropy
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, dlogprob: Tensor, dentropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, lse, entropy = ctx.saved_tensors
        rows, size = logits.shape
        out = torch.empty_like(logits)
        _logprob_backward_kernel[(rows, triton.cdiv(size, BLOCK))](
            logits, targets, lse, entropy, dlogprob.contiguous(), dentropy.contiguous(), out, size, ctx.inverse,
            BLOCK=BLOCK, ENTROPY=ctx.with_entropy, num_warps=8,
        )  # fmt: skip
        return out, None, None, None


def logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """(log-probability of each row's target, entropy of each row), (N,) float32, in nats. The second has a gradient
    only with `entropy`."""
    return _LogProbability.apply(logits_NV.contiguous(), targets_N, 1.0 / temperature, entropy)


@triton.jit
def _finite_kernel(logits, finite, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    strange = 0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * V + columns, columns < V, 0.0).to(tl.float32)
        strange += tl.sum((~(tl.abs(z) < float("inf"))).to(tl.int32), 0)
    if strange > 0:
        tl.store(finite + row, 0)


def note_finite(logits_BV: Tensor, finite_B: Tensor) -> None:
    """0 into `finite_B` (uint8) for rows whose logits are not all finite."""
    rows, size = logits_BV.shape
    _finite_kernel[(rows,)](logits_BV.contiguous(), finite_B, size, BLOCK=BLOCK, num_warps=8)


CANDIDATES = 8192
"""Among so many tokens a nucleus' least probability is looked for without reading the row again."""


@triton.jit
def _probability(logits, row, columns, V, top, total, inverse):
    """Of tokens of a row; 0 beyond its end."""
    z = tl.load(logits + row * V + columns, columns < V, float("-inf")).to(tl.float32) * inverse
    return tl.exp(z - top) / total


@triton.jit
def _three_masses(logits, row, V, top, total, inverse, t1, t2, t3, BLOCK: tl.constexpr):
    """Summed probability, in float64, and number of the tokens whose probability is at least each threshold."""
    m1 = tl.zeros((BLOCK,), tl.float64)
    m2 = tl.zeros((BLOCK,), tl.float64)
    m3 = tl.zeros((BLOCK,), tl.float64)
    c1 = tl.zeros((BLOCK,), tl.int32)
    c2 = tl.zeros((BLOCK,), tl.int32)
    c3 = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, V, BLOCK):
        p = _probability(logits, row, start + tl.arange(0, BLOCK), V, top, total, inverse)
        bits = p.to(tl.int32, bitcast=True)
        exact = p.to(tl.float64)
        m1 += tl.where(bits >= t1, exact, 0.0)
        m2 += tl.where(bits >= t2, exact, 0.0)
        m3 += tl.where(bits >= t3, exact, 0.0)
        c1 += (bits >= t1).to(tl.int32)
        c2 += (bits >= t2).to(tl.int32)
        c3 += (bits >= t3).to(tl.int32)
    return tl.sum(m1, 0), tl.sum(m2, 0), tl.sum(m3, 0), tl.sum(c1, 0), tl.sum(c2, 0), tl.sum(c3, 0)


@triton.jit
def _nucleus(
    logits, candidates, row, V, top, total, inverse, top_p, floor, BLOCK: tl.constexpr, SMALL: tl.constexpr,
    CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The largest float32 t such that the tokens of probability t or more reach top_p; 0 if all together do not.

    Non-negative floats are ordered as their bits are. The interval of bits that holds t is cut in four, each time by
    reading the row, until it holds few tokens; among these it is halved until it holds one number.
    """
    low = 0  # reaches top_p, or is 0
    high = (1.0 / total).to(tl.int32, bitcast=True) + 8  # above the likeliest token, whatever the division's rounding
    above = tl.zeros((), tl.float64)  # mass from `high` on
    at_low = V
    at_high = 0
    # Tokens below `floor` have less than half of what a nucleus may leave out.
    t1 = floor
    t2 = floor + (high - floor) // 3
    t3 = floor + (high - floor) // 3 * 2
    while (high - low > 1) & (at_low - at_high > CANDIDATES):
        m1, m2, m3, c1, c2, c3 = _three_masses(logits, row, V, top, total, inverse, t1, t2, t3, SMALL)
        e1 = m1 >= top_p
        e2 = m2 >= top_p
        e3 = m3 >= top_p
        high = tl.where(e3, high, tl.where(e2, t3, tl.where(e1, t2, t1)))
        above = tl.where(e3, above, tl.where(e2, m3, tl.where(e1, m2, m1)))
        at_high = tl.where(e3, at_high, tl.where(e2, c3, tl.where(e1, c2, c1)))
        low = tl.where(e3, t3, tl.where(e2, t2, tl.where(e1, t1, low)))
        at_low = tl.where(e3, c3, tl.where(e2, c2, tl.where(e1, c1, at_low)))
        step = tl.maximum((high - low) // 4, 1)
        t1 = low + step
        t2 = tl.minimum(t1 + step, high - 1)
        t3 = tl.minimum(t2 + step, high - 1)
    if high - low > 1:
        count = 0
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            p = _probability(logits, row, columns, V, top, total, inverse)
            bits = p.to(tl.int32, bitcast=True)
            keep = ((columns < V) & (bits >= low) & (bits < high)).to(tl.int32)
            place = count + tl.cumsum(keep, 0) - 1
            tl.store(candidates + row * CANDIDATES + place, p, (keep > 0) & (place < CANDIDATES))
            count += tl.sum(keep, 0)
        tl.debug_barrier()
        columns = tl.arange(0, CANDIDATES)
        bits = tl.load(candidates + row * CANDIDATES + columns, columns < count, 0.0).to(tl.int32, bitcast=True)
        while high - low > 1:
            middle = low + (high - low) // 2
            p = bits.to(tl.float32, bitcast=True).to(tl.float64)
            enough = above + tl.sum(tl.where(bits >= middle, p, 0.0), 0) >= top_p
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    return low.to(tl.float32, bitcast=True)


@triton.jit
def _draw_kernel(
    logits, uniform, candidates, token, logprob, finite, V, inverse, top_p, floor, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, SMALL: tl.constexpr, CANDIDATES: tl.constexpr, NUCLEUS: tl.constexpr, LOGPROB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top = float("-inf")
    total = 0.0
    strange = 0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        raw = tl.load(logits + row * V + columns, inside, 0.0).to(tl.float32)
        strange += tl.sum((inside & ~(tl.abs(raw) < float("inf"))).to(tl.int32), 0)
        z = tl.where(inside, raw * inverse, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new_top
    if strange > 0:
        tl.store(finite + row, 0)
    least = 0.0
    if NUCLEUS:
        least = _nucleus(
            logits, candidates, row, V, top, total, inverse, top_p, floor, BLOCK, SMALL, CANDIDATES
        )  # fmt: skip
    # The mass of each block says in which one the token lies; only that one is read again.
    blocks = tl.arange(0, BLOCKS)
    masses = tl.zeros((BLOCKS,), tl.float64)
    for block in range(0, tl.cdiv(V, BLOCK)):
        p = _probability(logits, row, block * BLOCK + tl.arange(0, BLOCK), V, top, total, inverse)
        masses = tl.where(blocks == block, tl.sum(tl.where(p >= least, p, 0.0).to(tl.float64), 0), masses)
    reached = tl.cumsum(masses, 0)
    mass = tl.sum(masses, 0)
    point = tl.load(uniform + row) * mass
    # The product, or another order of adding, may lead past the last token that has a probability.
    chosen = tl.minimum(tl.sum((reached <= point).to(tl.int32), 0), tl.max(tl.where(masses > 0, blocks, 0), 0))
    before = tl.max(tl.where(blocks < chosen, reached, 0.0), 0)
    places = tl.arange(0, BLOCK)
    p = _probability(logits, row, chosen * BLOCK + places, V, top, total, inverse)
    p = tl.where(p >= least, p, 0.0)
    index = tl.sum((before + tl.cumsum(p.to(tl.float64), 0) <= point).to(tl.int32), 0)
    index = chosen * BLOCK + tl.minimum(index, tl.max(tl.where(p > 0, places, 0), 0))
    tl.store(token + row, index.to(tl.int64))
    if LOGPROB:
        found = tl.load(logits + row * V + index).to(tl.float32) * inverse - top - tl.log(total)
        if NUCLEUS:
            found -= tl.log(mass).to(tl.float32)
        tl.store(logprob + row, found)


def draw(
    logits_BV: Tensor,
    uniform_B: Tensor,
    temperature: float,
    top_p: float,
    finite_B: Tensor | None = None,
    logprob_B: Tensor | None = None,
) -> Tensor:
    """(B,) token ids, as `sample.draw` describes them. `finite_B` gets 0 where a row's logits are not all finite;
    `logprob_B` (float32) gets the log of the probability with which each token was drawn."""
    rows, size = logits_BV.shape
    device, nucleus = logits_BV.device, top_p < 1
    token = torch.empty(rows, dtype=torch.long, device=device)
    finite = torch.empty(rows, dtype=torch.uint8, device=device) if finite_B is None else finite_B
    candidates = torch.empty(rows, CANDIDATES if nucleus else 1, dtype=torch.float32, device=device)
    floor = int(np.array((1 - top_p) / (2 * size), dtype=np.float32).view(np.int32))
    _draw_kernel[(rows,)](
        logits_BV.contiguous(), uniform_B, candidates, token, token if logprob_B is None else logprob_B, finite, size,
        1.0 / temperature, top_p, floor, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(triton.cdiv(size, BLOCK)),
        SMALL=min(BLOCK, 2048), CANDIDATES=CANDIDATES, NUCLEUS=nucleus, LOGPROB=logprob_B is not None, num_warps=8,
    )  # fmt: skip
    return token
