"""Over the vocabulary: log-probability and entropy of given tokens with their gradient, and drawing the next token.

A row of V logits is read where it lies, once or a few times, and never copied in float32. N rows.
"""

from typing import Any

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
def _mass(logits, row, V, top, total, inverse, least, BLOCK: tl.constexpr):
    """Summed probability of the tokens whose probability is at least `least`, in float64."""
    mass = tl.zeros((), tl.float64)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * V + columns, columns < V, float("-inf")).to(tl.float32) * inverse
        p = tl.exp(z - top) / total
        mass += tl.sum(tl.where(p >= least, p, 0.0).to(tl.float64), 0)
    return mass


@triton.jit
def _draw_kernel(logits, uniform, token, finite, V, inverse, top_p, BLOCK: tl.constexpr):
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
    # Non-negative floats are ordered as their bits are: 31 halvings find the largest threshold that reaches top_p.
    low = 0
    high = 0x3F800001
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = _mass(logits, row, V, top, total, inverse, middle.to(tl.float32, bitcast=True), BLOCK) >= top_p
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    least = low.to(tl.float32, bitcast=True)
    mass = _mass(logits, row, V, top, total, inverse, least, BLOCK)
    point = tl.load(uniform + row) * mass
    # The product may round up to the mass itself, past the last token.
    point = tl.where(point >= mass, mass * 0.9999999, point)
    before = tl.zeros((), tl.float64)
    index = tl.zeros((), tl.int64)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        z = tl.load(logits + row * V + columns, inside, float("-inf")).to(tl.float32) * inverse
        p = tl.exp(z - top) / total
        cumulative = before + tl.cumsum(tl.where(p >= least, p, 0.0).to(tl.float64), 0)
        index += tl.sum((inside & (cumulative <= point)).to(tl.int64), 0)
        before = tl.max(tl.where(inside, cumulative, 0.0), 0)
    tl.store(token + row, tl.minimum(index, V - 1))


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
    """(largest z of a row, Σ e^(z − largest))."""
    each = tl.arange(0, BLOCKS)
    peak = tl.load(peaks + row * blocks + each, each < blocks, float("-inf"))
    top = tl.max(peak, 0)
    return top, tl.sum(tl.load(sums + row * blocks + each, each < blocks, 0.0) * tl.exp(peak - top), 0)


@triton.jit
def _masses_kernel(logits, peaks, sums, masses, V, inverse, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    top, total = _normaliser(peaks, sums, row, blocks, BLOCKS)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * V + columns, columns < V, float("-inf")).to(tl.float32) * inverse
    tl.store(masses + row * blocks + block, tl.sum((tl.exp(z - top) / total).to(tl.float64), 0))


@triton.jit
def _pick_kernel(
    logits, uniform, peaks, sums, masses, token, V, inverse, blocks, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    top, total = _normaliser(peaks, sums, row, blocks, BLOCKS)
    each = tl.arange(0, BLOCKS)
    mass = tl.load(masses + row * blocks + each, each < blocks, 0.0)
    whole = tl.sum(mass, 0)
    point = tl.load(uniform + row) * whole
    # The product may round up to the mass itself, past the last token.
    point = tl.where(point >= whole, whole * 0.9999999, point)
    passed = (tl.cumsum(mass, 0) <= point) & (each < blocks)
    block = tl.minimum(tl.sum(passed.to(tl.int32), 0), blocks - 1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    z = tl.load(logits + row * V + columns, inside, float("-inf")).to(tl.float32) * inverse
    p = (tl.exp(z - top) / total).to(tl.float64)
    cumulative = tl.sum(tl.where(each < block, mass, 0.0), 0) + tl.cumsum(p, 0)
    index = tl.sum((inside & (cumulative <= point)).to(tl.int64), 0)
    # Summed in another order, the block's mass may be a hair more than it was.
    last = tl.minimum(BLOCK, V - block * BLOCK) - 1
    tl.store(token + row, block * BLOCK + tl.minimum(index, last))


def _draw_from_all(logits_BV: Tensor, uniform_B: Tensor, inverse: float, finite_B: Tensor) -> Tensor:
    """Without a nucleus: three short kernels over blocks of all rows, where one program a row leaves a GPU idle."""
    rows, size = logits_BV.shape
    blocks = triton.cdiv(size, BLOCK)
    peaks, sums = torch.empty(2, rows, blocks, dtype=torch.float32, device=logits_BV.device)
    masses = torch.empty(rows, blocks, dtype=torch.float64, device=logits_BV.device)
    token = torch.empty(rows, dtype=torch.long, device=logits_BV.device)
    width = triton.next_power_of_2(blocks)
    _peaks_kernel[(rows, blocks)](logits_BV, peaks, sums, finite_B, size, inverse, BLOCK=BLOCK)
    _masses_kernel[(rows, blocks)](logits_BV, peaks, sums, masses, size, inverse, BLOCK=BLOCK, BLOCKS=width)
    _pick_kernel[(rows,)](
        logits_BV, uniform_B, peaks, sums, masses, token, size, inverse, blocks, BLOCK=BLOCK, BLOCKS=width
    )
    return token


def draw(
    logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float, finite_B: Tensor | None = None
) -> Tensor:
    """(B,) token ids, as `sample.draw` describes them. `finite_B` gets 0 where a row's logits are not all finite."""
    rows, size = logits_BV.shape
    logits_BV = logits_BV.contiguous()
    finite = torch.empty(rows, dtype=torch.uint8, device=logits_BV.device) if finite_B is None else finite_B
    if top_p >= 1:
        return _draw_from_all(logits_BV, uniform_B, 1.0 / temperature, finite)
    token = torch.empty(rows, dtype=torch.long, device=logits_BV.device)
    _draw_kernel[(rows,)](logits_BV, uniform_B, token, finite, size, 1.0 / temperature, top_p, BLOCK=BLOCK, num_warps=8)
    return token
