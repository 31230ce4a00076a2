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
        out = logits  # which nothing reads any more; a second tensor of that size would be a layer's activations
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


CANDIDATES = 4096
"""Among so many tokens a nucleus' least probability is looked for without reading the row again."""
ROUNDS = 8
"""So many times the row is read to find them."""
SLACK = 2e-5
"""More than what sums of a row's probabilities in float32 are wrong by."""


@triton.jit
def _probability(logits, row, columns, V, top, share, inverse):
    """Of tokens of a row; 0 beyond its end. share: 1 / Σ exp(z − top)."""
    z = tl.load(logits + row * V + columns, columns < V, float("-inf")).to(tl.float32) * inverse
    return tl.exp(z - top) * share


@triton.jit
def _peaks_kernel(logits, peaks, sums, finite, V, inverse, BLOCK: tl.constexpr):
    """Of each block of a row the largest z, and Σ e^(z − largest)."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    raw = tl.load(logits + row * V + columns, inside, 0.0).to(tl.float32)
    if tl.sum((inside & ~(tl.abs(raw) < float("inf"))).to(tl.int32), 0) > 0:
        tl.store(finite + row, 0)
    z = tl.where(inside, raw * inverse, float("-inf"))
    peak = tl.max(z, 0)
    place = row * tl.num_programs(1) + block
    tl.store(peaks + place, peak)
    # Where nothing in a block can be drawn, the sum is 0.
    tl.store(sums + place, tl.sum(tl.exp(z - tl.where(peak > float("-inf"), peak, 0.0)), 0))


@triton.jit
def _normaliser(peaks, sums, row, blocks, BLOCKS: tl.constexpr):
    """(largest z of a row, 1 / Σ e^(z − largest)). The second's last bit may be another in each thread: the product of
    one and the first addition of the sum become one operation, which rounds once, while the other's is rounded twice.
    """
    each = tl.arange(0, BLOCKS)
    peak = tl.load(peaks + row * blocks + each, each < blocks, float("-inf"))
    top = tl.max(peak, 0)
    return top, 1.0 / tl.sum(tl.load(sums + row * blocks + each, each < blocks, 0.0) * tl.exp(peak - top), 0)


@triton.jit
def _normaliser_of(shares, peaks, sums, row, blocks, BLOCKS: tl.constexpr, NUCLEUS: tl.constexpr):
    """The same; of a nucleus as the first kernel has stored it, for one bit can be enough to lose its only token."""
    if NUCLEUS:
        return tl.load(shares + 2 * row), tl.load(shares + 2 * row + 1)
    else:
        return _normaliser(peaks, sums, row, blocks, BLOCKS)


@triton.jit
def _count_from(p, bits, least, mass, count):
    """The mass and the number of tokens so far whose probability has `least` bits or more, each thread its own."""
    enough = bits >= least
    return mass + tl.where(enough, p, 0.0), count + enough.to(tl.int32)


@triton.jit
def _nearer(mass, count, at, top_p, low, at_low, high, at_high, SLACK: tl.constexpr):
    """The interval cut at `at`, where it is plain on which side of it the nucleus ends."""
    mass_ = tl.sum(mass.to(tl.float64), 0)
    count_ = tl.sum(count, 0)
    raised = (mass_ >= top_p + SLACK) & (at > low)
    lowered = (mass_ < top_p - SLACK) & (at < high)
    low = tl.where(raised, at, low)
    at_low = tl.where(raised, count_, at_low)
    high = tl.where(lowered, at, high)
    at_high = tl.where(lowered, count_, at_high)
    return low, at_low, high, at_high


@triton.jit
def _narrow_kernel(
    logits, peaks, sums, shares, lows, highs, counts, V, inverse, blocks, top_p, floor, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr, ROUNDS: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """An interval of bits with the least probability of the nucleus, and how many tokens lie in it.

    Non-negative floats are ordered as their bits are. The interval is cut at seven places, each time by reading the
    row, until it holds few tokens. Sums are float32's, so it is cut only where they are clear of top_p by SLACK.
    """
    row = tl.program_id(0).to(tl.int64)
    top, share = _normaliser(peaks, sums, row, blocks, BLOCKS)
    tl.store(shares + 2 * row, top)
    tl.store(shares + 2 * row + 1, share)
    tl.debug_barrier()
    top, share = tl.load(shares + 2 * row), tl.load(shares + 2 * row + 1)
    low = 0  # reaches top_p, or is 0
    high = share.to(tl.int32, bitcast=True) + 8  # above the likeliest token
    at_low = V
    at_high = 0
    begin = floor  # tokens below have less than half of what a nucleus may leave out
    rounds = 0
    while (high - low > 1) & (at_low - at_high > CANDIDATES) & (rounds < ROUNDS):
        step = tl.maximum((high - begin) // 7, 1)
        m1 = tl.zeros((BLOCK,), tl.float32)
        m2 = tl.zeros((BLOCK,), tl.float32)
        m3 = tl.zeros((BLOCK,), tl.float32)
        m4 = tl.zeros((BLOCK,), tl.float32)
        m5 = tl.zeros((BLOCK,), tl.float32)
        m6 = tl.zeros((BLOCK,), tl.float32)
        m7 = tl.zeros((BLOCK,), tl.float32)
        c1 = tl.zeros((BLOCK,), tl.int32)
        c2 = tl.zeros((BLOCK,), tl.int32)
        c3 = tl.zeros((BLOCK,), tl.int32)
        c4 = tl.zeros((BLOCK,), tl.int32)
        c5 = tl.zeros((BLOCK,), tl.int32)
        c6 = tl.zeros((BLOCK,), tl.int32)
        c7 = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, V, BLOCK):
            p = _probability(logits, row, start + tl.arange(0, BLOCK), V, top, share, inverse)
            bits = p.to(tl.int32, bitcast=True)
            m1, c1 = _count_from(p, bits, begin, m1, c1)
            m2, c2 = _count_from(p, bits, begin + step, m2, c2)
            m3, c3 = _count_from(p, bits, begin + 2 * step, m3, c3)
            m4, c4 = _count_from(p, bits, begin + 3 * step, m4, c4)
            m5, c5 = _count_from(p, bits, begin + 4 * step, m5, c5)
            m6, c6 = _count_from(p, bits, begin + 5 * step, m6, c6)
            m7, c7 = _count_from(p, bits, begin + 6 * step, m7, c7)
        low, at_low, high, at_high = _nearer(m1, c1, begin, top_p, low, at_low, high, at_high, SLACK)
        low, at_low, high, at_high = _nearer(m2, c2, begin + step, top_p, low, at_low, high, at_high, SLACK)
        low, at_low, high, at_high = _nearer(m3, c3, begin + 2 * step, top_p, low, at_low, high, at_high, SLACK)
        low, at_low, high, at_high = _nearer(m4, c4, begin + 3 * step, top_p, low, at_low, high, at_high, SLACK)
        low, at_low, high, at_high = _nearer(m5, c5, begin + 4 * step, top_p, low, at_low, high, at_high, SLACK)
        low, at_low, high, at_high = _nearer(m6, c6, begin + 5 * step, top_p, low, at_low, high, at_high, SLACK)
        low, at_low, high, at_high = _nearer(m7, c7, begin + 6 * step, top_p, low, at_low, high, at_high, SLACK)
        begin = low + (high - low) // 8
        rounds += 1
    tl.store(lows + row, low)
    tl.store(highs + row, high)
    tl.store(counts + row, at_low - at_high)


@triton.jit
def _least_kernel(
    logits, candidates, shares, lows, highs, counts, V, inverse, top_p, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """The largest float32 t such that the tokens of probability t or more reach top_p, into `lows`; 0 if all together
    do not. The interval is halved among its tokens, in float64, until it holds one number."""
    row = tl.program_id(0).to(tl.int64)
    top, share = tl.load(shares + 2 * row), tl.load(shares + 2 * row + 1)
    low, high = tl.load(lows + row), tl.load(highs + row)
    if (tl.load(counts + row) <= CANDIDATES) & (high - low > 1):
        count = 0
        above = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            p = _probability(logits, row, columns, V, top, share, inverse)
            bits = p.to(tl.int32, bitcast=True)
            above += tl.where(bits >= high, p, 0.0).to(tl.float64)
            keep = ((columns < V) & (bits >= low) & (bits < high)).to(tl.int32)
            place = count + tl.cumsum(keep, 0) - 1
            tl.store(candidates + row * CANDIDATES + place, p, (keep > 0) & (place < CANDIDATES))
            count += tl.sum(keep, 0)
        tl.debug_barrier()
        columns = tl.arange(0, CANDIDATES)
        p = tl.load(candidates + row * CANDIDATES + columns, columns < count, 0.0)
        bits = p.to(tl.int32, bitcast=True)
        mass = tl.sum(above, 0)
        while high - low > 1:
            middle = low + (high - low) // 2
            enough = mass + tl.sum(tl.where(bits >= middle, p, 0.0).to(tl.float64), 0) >= top_p
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
    while high - low > 1:  # many tokens of one probability, or sums too near to top_p: each number by itself
        middle = low + (high - low) // 2
        masses = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, V, BLOCK):
            p = _probability(logits, row, start + tl.arange(0, BLOCK), V, top, share, inverse)
            masses += tl.where(p.to(tl.int32, bitcast=True) >= middle, p, 0.0).to(tl.float64)
        enough = tl.sum(masses, 0) >= top_p
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    tl.store(lows + row, low)


@triton.jit
def _masses_kernel(
    logits, peaks, sums, shares, least_, masses, V, inverse,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, NUCLEUS: tl.constexpr,
):  # fmt: skip
    """Summed probability of the tokens of each block that may be drawn."""
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    top, share = _normaliser_of(shares, peaks, sums, row, blocks, BLOCKS, NUCLEUS)
    p = _probability(logits, row, block * BLOCK + tl.arange(0, BLOCK), V, top, share, inverse)
    if NUCLEUS:
        p = tl.where(p >= tl.load(least_ + row).to(tl.float32, bitcast=True), p, 0.0)
    tl.store(masses + row * blocks + block, tl.sum(p.to(tl.float64), 0))


@triton.jit
def _pick_kernel(
    logits, uniform, peaks, sums, shares, least_, masses, token, logprob, V, inverse, blocks, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, NUCLEUS: tl.constexpr, LOGPROB: tl.constexpr,
):  # fmt: skip
    """The mass of each block says in which one the token lies; only that one is read."""
    row = tl.program_id(0).to(tl.int64)
    top, share = _normaliser_of(shares, peaks, sums, row, blocks, BLOCKS, NUCLEUS)
    each = tl.arange(0, BLOCKS)
    mass = tl.load(masses + row * blocks + each, each < blocks, 0.0)
    whole, reached = tl.sum(mass, 0), tl.cumsum(mass, 0)
    point = tl.load(uniform + row) * whole
    # The product, or another order of adding, may lead past the last token that has a probability.
    block = tl.minimum(tl.sum((reached <= point).to(tl.int32), 0), tl.max(tl.where(mass > 0, each, 0), 0))
    before = tl.max(tl.where(each < block, reached, 0.0), 0)
    places = tl.arange(0, BLOCK)
    p = _probability(logits, row, block * BLOCK + places, V, top, share, inverse)
    least = 0.0
    if NUCLEUS:
        least = tl.load(least_ + row).to(tl.float32, bitcast=True)
    p = tl.where(p >= least, p, 0.0)
    index = tl.sum((before + tl.cumsum(p.to(tl.float64), 0) <= point).to(tl.int32), 0)
    index = block * BLOCK + tl.minimum(index, tl.max(tl.where(p > 0, places, 0), 0))
    tl.store(token + row, index.to(tl.int64))
    if LOGPROB:
        found = tl.load(logits + row * V + index).to(tl.float32) * inverse - top + tl.log(share)
        if NUCLEUS:
            found -= tl.log(whole).to(tl.float32)
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
    `logprob_B` (float32) gets the log of the probability with which each token was drawn.

    Short kernels over blocks of all rows, where one program a row leaves a GPU idle."""
    rows, size = logits_BV.shape
    device, nucleus, inverse = logits_BV.device, top_p < 1, 1.0 / temperature
    logits, blocks = logits_BV.contiguous(), triton.cdiv(size, BLOCK)
    width = triton.next_power_of_2(blocks)
    token = torch.empty(rows, dtype=torch.long, device=device)
    finite = torch.empty(rows, dtype=torch.uint8, device=device) if finite_B is None else finite_B
    peaks, sums = torch.empty(2, rows, blocks, dtype=torch.float32, device=device)
    masses = torch.empty(rows, blocks, dtype=torch.float64, device=device)
    _peaks_kernel[(rows, blocks)](logits, peaks, sums, finite, size, inverse, BLOCK=BLOCK)
    shares = torch.empty(rows, 2, dtype=torch.float32, device=device)
    least = _least(logits, peaks, sums, shares, inverse, top_p, width) if nucleus else token
    _masses_kernel[(rows, blocks)](
        logits, peaks, sums, shares, least, masses, size, inverse, BLOCK=BLOCK, BLOCKS=width, NUCLEUS=nucleus
    )
    _pick_kernel[(rows,)](
        logits, uniform_B, peaks, sums, shares, least, masses, token, token if logprob_B is None else logprob_B, size,
        inverse, blocks, BLOCK=BLOCK, BLOCKS=width, NUCLEUS=nucleus, LOGPROB=logprob_B is not None,
    )  # fmt: skip
    return token


def _least(
    logits: Tensor, peaks: Tensor, sums: Tensor, shares_B2: Tensor, inverse: float, top_p: float, width: int
) -> Tensor:
    """(B,) int32: the bits of each nucleus' least probability. `shares_B2` gets what probabilities come from.

    Two kernels, each with as few registers as it needs: in one, a GPU had room for a row at a time."""
    (rows, size), blocks = logits.shape, peaks.shape[1]
    least, high, count = torch.empty(3, rows, dtype=torch.int32, device=logits.device)
    candidates = torch.empty(rows, CANDIDATES, dtype=torch.float32, device=logits.device)
    floor = int(np.array((1 - top_p) / (2 * size), dtype=np.float32).view(np.int32))
    _narrow_kernel[(rows,)](
        logits, peaks, sums, shares_B2, least, high, count, size, inverse, blocks, top_p, floor, BLOCK=min(BLOCK, 1024),
        BLOCKS=width, CANDIDATES=CANDIDATES, ROUNDS=ROUNDS, SLACK=SLACK, num_warps=8,
    )  # fmt: skip
    _least_kernel[(rows,)](
        logits, candidates, shares_B2, least, high, count, size, inverse, top_p, BLOCK=min(BLOCK, 2048),
        CANDIDATES=CANDIDATES, num_warps=8,
    )  # fmt: skip
    return least
