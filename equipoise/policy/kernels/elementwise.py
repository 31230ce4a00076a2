"""RMS norm, SiLU·up and the adapters' sum: each one pass over memory, where PyTorch takes several.

Shapes: M rows (tokens), H hidden, F of the MLP, N outputs of a projection. Arithmetic is float32, what is stored has
the inputs' dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(x, delta, w, h, y, rstd, eps, H, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    value = tl.load(x + row * H + columns, inside, 0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row * H + columns, inside, 0.0).to(tl.float32)
        value = value.to(h.dtype.element_ty)
        tl.store(h + row * H + columns, value, inside)
        value = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / H + eps)
    weight = tl.load(w + columns, inside, 0.0).to(tl.float32)
    tl.store(y + row * H + columns, (value * scale * weight).to(y.dtype.element_ty), inside)
    tl.store(rstd + row, scale)


def norm(x_MH: Tensor, weight: Tensor, eps: float, delta_MH: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(h, y, rstd): h = x + delta, or x itself; y = h / rms(h) · weight, (M, H); rstd (M,) = 1 / rms(h), float32."""
    rows, width = x_MH.shape
    h, y = x_MH if delta_MH is None else torch.empty_like(x_MH), torch.empty_like(x_MH)
    rstd = torch.empty(rows, dtype=torch.float32, device=x_MH.device)
    block = triton.next_power_of_2(width)
    _norm_kernel[(rows,)](
        x_MH, x_MH if delta_MH is None else delta_MH, weight, h, y, rstd, eps, width,
        BLOCK=block, ADD=delta_MH is not None, num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    return h, y, rstd


@triton.jit
def _norm_backward_kernel(
    dy, h, w, rstd, more, dx, dw, M, H, PROGRAMS, BLOCK: tl.constexpr, MORE: tl.constexpr, WEIGHT: tl.constexpr
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    weight = tl.load(w + columns, inside, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, M, PROGRAMS):
        grad = tl.load(dy + row * H + columns, inside, 0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        normed = tl.load(h + row * H + columns, inside, 0.0).to(tl.float32) * scale
        if WEIGHT:
            total += grad * normed
        grad *= weight
        out = (grad - normed * (tl.sum(grad * normed, 0) / H)) * scale
        if MORE:
            out += tl.load(more + row * H + columns, inside, 0.0).to(tl.float32)
        tl.store(dx + row * H + columns, out.to(dx.dtype.element_ty), inside)
    if WEIGHT:
        tl.store(dw + program * H + columns, total, inside)


@triton.jit
def _add_rows_kernel(total, rows, P, H, BP: tl.constexpr, BH: tl.constexpr):
    columns = tl.program_id(0) * BH + tl.arange(0, BH)
    programs = tl.arange(0, BP)[:, None]
    part = tl.load(rows + programs * H + columns[None], (programs < P) & (columns < H)[None], 0.0)
    old = tl.load(total + columns, columns < H, 0.0).to(tl.float32)
    tl.store(total + columns, (old + tl.sum(part, 0)).to(total.dtype.element_ty), columns < H)


PROGRAMS = 128


def norm_backward(
    dy_MH: Tensor, h_MH: Tensor, weight: Tensor, rstd_M: Tensor, more_MH: Tensor | None, dweight: Tensor | None
) -> Tensor:
    """Gradient of h, plus `more`. That of the weight is added to `dweight` (H,), unless it is None."""
    rows, width = h_MH.shape
    dx = torch.empty_like(h_MH)
    block = triton.next_power_of_2(width)
    programs = rows if dweight is None else min(rows, PROGRAMS)
    dw = dx if dweight is None else torch.empty(programs, width, dtype=torch.float32, device=h_MH.device)
    _norm_backward_kernel[(programs,)](
        dy_MH, h_MH, weight, rstd_M, dx if more_MH is None else more_MH, dx, dw, rows, width, programs,
        BLOCK=block, MORE=more_MH is not None, WEIGHT=dweight is not None, num_warps=8 if block > 2048 else 4,
    )  # fmt: skip
    if dweight is not None:
        _add_rows_kernel[(triton.cdiv(width, 16),)](dweight, dw, programs, width, BP=PROGRAMS, BH=16)
    return dx


@triton.jit
def _silu_kernel(gate_up, out, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = tl.load(gate_up + row * 2 * F + columns, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + columns, inside, 0.0).to(tl.float32)
    tl.store(out + row * F + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), inside)


@triton.jit
def _silu_backward_kernel(gate_up, dout, dgate_up, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    gate = tl.load(gate_up + row * 2 * F + columns, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + columns, inside, 0.0).to(tl.float32)
    grad = tl.load(dout + row * F + columns, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dtype = dgate_up.dtype.element_ty
    tl.store(dgate_up + row * 2 * F + columns, (grad * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype), inside)
    tl.store(dgate_up + row * 2 * F + F + columns, (grad * silu).to(dtype), inside)


SILU_BLOCK = 1024


def silu_times(gate_up_M2F: Tensor) -> Tensor:
    """silu(gate) · up: (M, 2F), gate first, → (M, F)."""
    rows, width = gate_up_M2F.shape[0], gate_up_M2F.shape[1] // 2
    out = gate_up_M2F.new_empty(rows, width)
    _silu_kernel[(rows, triton.cdiv(width, SILU_BLOCK))](gate_up_M2F, out, width, BLOCK=SILU_BLOCK)
    return out


def silu_times_backward(gate_up_M2F: Tensor, dout_MF: Tensor) -> Tensor:
    """Gradient of `silu_times`' input, (M, 2F)."""
    rows, width = dout_MF.shape
    out = torch.empty_like(gate_up_M2F)
    _silu_backward_kernel[(rows, triton.cdiv(width, SILU_BLOCK))](gate_up_M2F, dout_MF, out, width, BLOCK=SILU_BLOCK)
    return out


@triton.jit
def _adapters_kernel(
    out, low, b, more, by_rows, by_columns, M, N, first, second, scale, RANK: tl.constexpr, PARTS: tl.constexpr,
    RB: tl.constexpr, MORE: tl.constexpr, BY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
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
    if BY:
        total *= tl.load(by_rows + rows, rows < M, 0.0)[:, None] * tl.load(by_columns + columns)[None]
    total += tl.dot(x, tl.trans(y), input_precision="ieee") * scale
    if MORE:
        total += tl.load(more + place, inside, 0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), inside)


def add_adapters(
    out_MN: Tensor, low: Tensor, b_NR: Tensor, sizes: tuple[int, ...], scale: float, more_MN: Tensor | None,
    by: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:  # fmt: skip
    """out · by + scale · low·Bᵀ + more, in place. `sizes`: the widths of up to three projections side by side in N;
    each reads its own R columns of low (M, parts · R). `by`: what rows (M,) and columns (N,) are multiplied by."""
    rows, width = out_MN.shape
    rank = b_NR.shape[1]
    bounds = [sum(sizes[:i]) for i in (1, 2)]
    block = tile(sizes)
    few = rows <= 32
    _adapters_kernel[(triton.cdiv(rows, 16 if few else 64), width // block)](
        out_MN, low, b_NR, out_MN if more_MN is None else more_MN, *(by or (low, low)), rows, width, *bounds, scale,
        RANK=rank, PARTS=len(sizes), RB=max(16, triton.next_power_of_2(rank)), MORE=more_MN is not None,
        BY=by is not None, BM=16 if few else 64, BN=block,
    )  # fmt: skip
    return out_MN


@triton.jit
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
