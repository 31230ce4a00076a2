"""Norms and the adapters' sum: each one pass over memory, where PyTorch takes several.

Shapes: M rows (tokens), H hidden, N outputs of a projection. Arithmetic is float32, what is stored has
the inputs' dtype.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _scaled(value, inside, w, bias, eps, H, columns, OFFSET: tl.constexpr, LAYER: tl.constexpr):
    """(norm of a row, 1 / its root mean square or standard deviation)."""
    if LAYER:
        value = tl.where(inside, value - tl.sum(value, 0) / H, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / H + eps)
    weight = tl.load(w + columns, inside, 0.0).to(tl.float32)
    if OFFSET != 0.0:
        weight += OFFSET
    out = value * scale * weight
    if LAYER:
        out += tl.load(bias + columns, inside, 0.0).to(tl.float32)
    return out, scale


@triton.jit
def _norm_kernel(
    x, delta, w, bias, h, y, rstd, eps, H,
    BLOCK: tl.constexpr, ADD: tl.constexpr, OFFSET: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    value = tl.load(x + row * H + columns, inside, 0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row * H + columns, inside, 0.0).to(tl.float32)
        value = value.to(h.dtype.element_ty)
        tl.store(h + row * H + columns, value, inside)
        value = value.to(tl.float32)
    out, scale = _scaled(value, inside, w, bias, eps, H, columns, OFFSET, LAYER)
    tl.store(y + row * H + columns, out.to(y.dtype.element_ty), inside)
    tl.store(rstd + row, scale)


class Norm(NamedTuple):
    """y = x / rms(x) · (weight + offset); with a bias, a layer norm: y = (x − mean) / deviation · weight + bias."""

    weight: Tensor
    eps: float
    offset: float = 0.0
    bias: Tensor | None = None


def _warps(block: int) -> int:
    return 8 if block > 2048 else 4


class Normed(NamedTuple):
    h: Tensor
    """x + delta, or x itself."""
    y: Tensor
    """(M, H) the norm of h."""
    rstd: Tensor
    """(M,) 1 / rms(h), or 1 / its deviation, float32."""


def norm(x_MH: Tensor, by: Norm, delta_MH: Tensor | None = None, h: Tensor | None = None) -> Normed:
    """`h`: where that is to be put, if anywhere."""
    rows, width = x_MH.shape
    if delta_MH is None:
        h = x_MH
    h, y = torch.empty_like(x_MH) if h is None else h, torch.empty_like(x_MH)
    rstd = torch.empty(rows, dtype=torch.float32, device=x_MH.device)
    block = triton.next_power_of_2(width)
    _norm_kernel[(rows,)](
        x_MH, x_MH if delta_MH is None else delta_MH, by.weight, by.weight if by.bias is None else by.bias, h, y, rstd,
        by.eps, width,
        BLOCK=block, ADD=delta_MH is not None, OFFSET=by.offset, LAYER=by.bias is not None,
        num_warps=_warps(block),
    )  # fmt: skip
    return Normed(h, y, rstd)


@triton.jit
def _add_normed_kernel(
    x, delta, w, h, rstd, eps, w_next, y, rstd_next, eps_next, H,
    BLOCK: tl.constexpr, OFFSET: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    value = tl.load(delta + row * H + columns, inside, 0.0).to(tl.float32)
    normed, scale = _scaled(value, inside, w, w, eps, H, columns, OFFSET, False)
    tl.store(rstd + row, scale)
    value = (tl.load(x + row * H + columns, inside, 0.0).to(tl.float32) + normed).to(h.dtype.element_ty)
    tl.store(h + row * H + columns, value, inside)
    if NEXT:
        out, scale_next = _scaled(value.to(tl.float32), inside, w_next, w_next, eps_next, H, columns, OFFSET, False)
        tl.store(y + row * H + columns, out.to(y.dtype.element_ty), inside)
        tl.store(rstd_next + row, scale_next)


def add_normed(
    x_MH: Tensor, delta_MH: Tensor, by: Norm, then: Norm | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(h, rstd, y, next rstd): h = x + norm(delta), and y = norm(h) by `then`, or h itself. RMS norms of one offset."""
    rows, width = x_MH.shape
    h, block = torch.empty_like(x_MH), triton.next_power_of_2(width)
    y = h if then is None else torch.empty_like(x_MH)
    rstd = torch.empty(2, rows, dtype=torch.float32, device=x_MH.device)
    after = by if then is None else then
    assert by.bias is None and after.bias is None and after.offset == by.offset
    _add_normed_kernel[(rows,)](
        x_MH, delta_MH, by.weight, h, rstd[0], by.eps, after.weight, y, rstd[1], after.eps, width,
        BLOCK=block, OFFSET=by.offset, NEXT=then is not None, num_warps=_warps(block),
    )  # fmt: skip
    return h, rstd[0], y, None if then is None else rstd[1]


@triton.jit(do_not_specialize=["M", "PROGRAMS"])
def _norm_backward_kernel(
    dy, h, w, rstd, more, dx, dw, M, H, PROGRAMS,
    BLOCK: tl.constexpr, MORE: tl.constexpr, WEIGHT: tl.constexpr, OFFSET: tl.constexpr, LAYER: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    weight = tl.load(w + columns, inside, 0.0).to(tl.float32)
    if OFFSET != 0.0:
        weight += OFFSET
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, M, PROGRAMS):
        grad = tl.load(dy + row * H + columns, inside, 0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        value = tl.load(h + row * H + columns, inside, 0.0).to(tl.float32)
        if LAYER:
            value = tl.where(inside, value - tl.sum(value, 0) / H, 0.0)
        normed = value * scale
        if WEIGHT:
            total += grad * normed
            plain += grad
        grad *= weight
        if LAYER:
            out = (grad - tl.sum(grad, 0) / H - normed * (tl.sum(grad * normed, 0) / H)) * scale
        else:
            out = (grad - normed * (tl.sum(grad * normed, 0) / H)) * scale
        if MORE:
            out += tl.load(more + row * H + columns, inside, 0.0).to(tl.float32)
        tl.store(dx + row * H + columns, out.to(dx.dtype.element_ty), inside)
    if WEIGHT:
        tl.store(dw + program * H + columns, total, inside)
        if LAYER:
            tl.store(dw + (PROGRAMS + program) * H + columns, plain, inside)


@triton.jit(do_not_specialize=["P"])
def _add_rows_kernel(total, rows, P, H, BP: tl.constexpr, BH: tl.constexpr):
    columns = tl.program_id(0) * BH + tl.arange(0, BH)
    programs = tl.arange(0, BP)[:, None]
    part = tl.load(rows + programs * H + columns[None], (programs < P) & (columns < H)[None], 0.0)
    old = tl.load(total + columns, columns < H, 0.0).to(tl.float32)
    tl.store(total + columns, (old + tl.sum(part, 0)).to(total.dtype.element_ty), columns < H)


PROGRAMS = 128


def add_rows(total_H: Tensor, rows_PH: Tensor) -> None:
    """total += the sum of at most PROGRAMS rows, in place."""
    (programs, width), rows_PH = rows_PH.shape, rows_PH.contiguous()
    _add_rows_kernel[(triton.cdiv(width, 16),)](total_H, rows_PH, programs, width, BP=PROGRAMS, BH=16)


def norm_backward(
    dy_MH: Tensor, h_MH: Tensor, by: Norm, rstd_M: Tensor, more_MH: Tensor | None, trained: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(gradient of h, plus `more`; where its weights are `trained`, rows whose sum is the gradient of the weight, and
    of a layer norm's bias, for `add_rows`)."""
    rows, width = h_MH.shape
    dx = torch.empty_like(h_MH)
    block = triton.next_power_of_2(width)
    layer = by.bias is not None
    programs = min(rows, PROGRAMS) if trained else rows
    dw = torch.empty(1 + layer, programs, width, dtype=torch.float32, device=h_MH.device) if trained else dx
    _norm_backward_kernel[(programs,)](
        dy_MH, h_MH, by.weight, rstd_M, dx if more_MH is None else more_MH, dx, dw, rows, width, programs,
        BLOCK=block, MORE=more_MH is not None, WEIGHT=trained, OFFSET=by.offset, LAYER=layer,
        num_warps=_warps(block),
    )  # fmt: skip
    return dx, tuple(dw) if trained else ()


@triton.jit
def _low_kernel(x, a, low, K, R, BK: tl.constexpr, BR: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ranks, columns = tl.program_id(1) * BR + tl.arange(0, BR), tl.arange(0, BK)
    one = tl.load(x + row * K + columns, columns < K, 0.0).to(tl.float32)
    inside = (ranks < R)[:, None] & (columns < K)[None]
    other = tl.load(a + ranks[:, None] * K + columns[None], inside, 0.0).to(tl.float32)
    tl.store(low + row * R + ranks, tl.sum(other * one[None], 1).to(low.dtype.element_ty), ranks < R)


FEW = 128
"""Rows that are few: so many programs or fewer do not fill a GPU."""
SHORT = 4096
"""Values of a row that a program has room for; of longer ones cuBLAS is faster (10 µs here, 6 there, on an H200)."""


def low_product(x_MK: Tensor, a_RK: Tensor) -> Tensor:
    """x·Aᵀ (M, R). Of few short rows in one kernel; cuBLAS cuts the sum in parts, and adds them up in a second."""
    (rows, width), rank = x_MK.shape, len(a_RK)
    if rows > FEW or width > SHORT:
        return x_MK @ a_RK.T
    low, block = x_MK.new_empty(rows, rank), triton.next_power_of_2(width)
    _low_kernel[(rows, triton.cdiv(rank, 8))](x_MK, a_RK, low, width, rank, BK=block, BR=8, num_warps=8)
    return low


@triton.jit(do_not_specialize=["M"])
def _adapters_kernel(
    out, low, b, more, M, N, first, second, scale,
    RANK: tl.constexpr, PARTS: tl.constexpr, RB: tl.constexpr, MORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    start = tl.program_id(1) * BN
    columns = start + tl.arange(0, BN)
    part = (start >= first).to(tl.int32) + (start >= second).to(tl.int32)
    ranks = tl.arange(0, RB)
    x = tl.load(
        low + rows[:, None] * (PARTS * RANK) + part * RANK + ranks[None],
        (rows[:, None] < M) & (ranks[None] < RANK), 0.0,
    )  # fmt: skip
    y = tl.load(b + columns[:, None] * RANK + ranks[None], ranks[None] < RANK, 0.0)
    place = rows[:, None].to(tl.int64) * N + columns[None]
    inside = rows[:, None] < M
    total = tl.load(out + place, inside, 0.0).to(tl.float32)
    total += tl.dot(x, tl.trans(y), input_precision="ieee") * scale
    if MORE:
        total += tl.load(more + place, inside, 0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), inside)


def add_adapters(
    out_MN: Tensor, low: Tensor, b_NR: Tensor, sizes: tuple[int, ...], scale: float, more_MN: Tensor | None
) -> Tensor:
    """out + scale · low·Bᵀ + more, in place. `sizes`: the widths of up to three projections side by side in N; each
    reads its own R columns of low (M, parts · R)."""
    rows, width = out_MN.shape
    rank = b_NR.shape[1]
    bounds = [sum(sizes[:i]) for i in (1, 2)]
    block = tile(sizes)
    few = rows <= 32
    _adapters_kernel[(triton.cdiv(rows, 16 if few else 64), width // block)](
        out_MN, low, b_NR, out_MN if more_MN is None else more_MN, rows, width, *bounds, scale,
        RANK=rank, PARTS=len(sizes), RB=max(16, triton.next_power_of_2(rank)), MORE=more_MN is not None,
        BM=16 if few else 64, BN=block,
    )  # fmt: skip
    return out_MN


@triton.jit(do_not_specialize=["M"])
def _adapter_gradient_kernel(
    grad, low, db, M, N, first, second, scale,
    RANK: tl.constexpr, PARTS: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BN
    columns = start + tl.arange(0, BN)
    part = (start >= first).to(tl.int32) + (start >= second).to(tl.int32)
    ranks = tl.arange(0, RB)
    total = tl.zeros((BN, RB), tl.float32)
    for row in range(0, M, BM):
        rows = row + tl.arange(0, BM)
        g = tl.load(grad + rows[:, None].to(tl.int64) * N + columns[None], rows[:, None] < M, 0.0)
        x = tl.load(
            low + rows[:, None] * (PARTS * RANK) + part * RANK + ranks[None],
            (rows[:, None] < M) & (ranks[None] < RANK), 0.0,
        )  # fmt: skip
        total += tl.dot(tl.trans(g), x, input_precision="ieee")
    place = db + columns[:, None] * RANK + ranks[None]
    old = tl.load(place, ranks[None] < RANK, 0.0).to(tl.float32)
    tl.store(place, (old + total * scale).to(db.dtype.element_ty), ranks[None] < RANK)


def add_adapter_gradient(db_NR: Tensor, grad_MN: Tensor, low: Tensor, sizes: tuple[int, ...], scale: float) -> None:
    """db += scale · gradᵀ·low, in place, with the parts of `add_adapters`."""
    rows, width = grad_MN.shape
    rank = db_NR.shape[1]
    bounds = [sum(sizes[:i]) for i in (1, 2)]
    block = min(64, tile(sizes))
    _adapter_gradient_kernel[(width // block,)](
        grad_MN, low, db_NR, rows, width, *bounds, scale,
        RANK=rank, PARTS=len(sizes), RB=max(16, triton.next_power_of_2(rank)), BM=64, BN=block,
    )  # fmt: skip


def tile(sizes: tuple[int, ...]) -> int:
    """Largest power of two up to 128 that divides every size: no tile of columns then reaches into two projections."""
    block = 128
    while any(size % block for size in sizes):
        block //= 2
    return block
