"""Products with FP8 weights W = q · scale (e4m3, a scale a row): activations are rounded row by row as they come.

x·Wᵀ sums over K, along which both x and W lie in memory, as FP8 tensor cores want them. grad·W sums over N: there W is
transposed first, by a stream of its own while the product before it is at work, into memory that is used again. W's
scales lie along that sum, so they go into the gradient before that is rounded.

The product itself knows no scales: cuBLAS then has its fastest kernels (one H200, 640 rows, 14336 → 4096: 55 µs, with
scales 78, bfloat16 100). What its rows and columns are to be multiplied by goes into the next pass over the result.

Shapes: M rows, K inputs and N outputs of a layer. Sums are float32, results have x's dtype.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn
MOST = 448.0
LEAST = 2.0**-100
"""What the largest value of a row counts as at least, so that what a row is multiplied by has an end."""


@triton.jit
def _rounded(value):
    """To the nearest number of e4m3, of two the even one; for Triton's interpreter, whose cast forgets to carry from
    the mantissa into the exponent. A GPU casts as it should, and to the largest number what is beyond it."""
    exponent = tl.maximum((value.to(tl.int32, bitcast=True) >> 23) & 255, 127 - 6)
    large = (((exponent + 20) << 23) | (1 << 22)).to(tl.float32, bitcast=True)
    return (value + large) - large


@triton.jit
def _quantise_kernel(
    x, by, q, scale, K, MOST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, BY: tl.constexpr,
    CARRY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    value = tl.load(x + row * K + columns, inside, 0.0).to(tl.float32)
    if BY:
        value *= tl.load(by + columns, inside, 0.0)
    # As integers absolute values have the same order, and NaN, which else a maximum hides, is the largest.
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
    largest = tl.where(largest < LEAST, LEAST, largest)
    tl.store(scale + row, tl.div_rn(largest, MOST))
    value *= tl.div_rn(MOST, largest)
    if CARRY:
        value = _rounded(tl.clamp(value, -MOST, MOST))
    tl.store(q + row * K + columns, value.to(tl.float8e4nv), inside)


def quantise(x_MK: Tensor, by_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(q (M, K) FP8, scale (M,) float32) of x · by, each row by its largest absolute value. The scale of a row
    with a value that is not finite is not finite."""
    rows, width = x_MK.shape
    q = torch.empty(rows, width, dtype=FP8, device=x_MK.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x_MK.device)
    block = triton.next_power_of_2(width)
    _quantise_kernel[(rows,)](
        x_MK, x_MK if by_K is None else by_K, q, scale, width,
        MOST=MOST, LEAST=LEAST, BLOCK=block, BY=by_K is not None, CARRY=not x_MK.is_cuda,
        num_warps=max(4, min(32, block // 1024)),
    )  # fmt: skip
    return q, scale


@triton.jit
def _product_kernel(x, q, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    inside = columns < N
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + inner
        a = tl.load(x + rows[:, None].to(tl.int64) * K + k[None], (rows < M)[:, None] & (k < K)[None], 0.0)
        b = tl.load(q + columns[:, None].to(tl.int64) * K + k[None], inside[:, None] & (k < K)[None], 0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    place = rows[:, None].to(tl.int64) * N + columns[None]
    tl.store(out + place, acc.to(out.dtype.element_ty), (rows < M)[:, None] & inside[None])


_ones: dict[torch.device, Tensor] = {}
_streams: dict[torch.device, torch.cuda.Stream] = {}


def prepare(device: torch.device) -> None:
    """Before the first product on that device, and before any is recorded: a graph must not hold what others use."""
    if device not in _ones:
        _ones[device] = torch.ones((), dtype=torch.float32, device=device)
        _streams[device] = torch.cuda.Stream(device)


def _unscaled(x: Tensor, q_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """x·qᵀ (M, N) of FP8 numbers. cuBLAS takes sizes that are multiples of 16."""
    (rows, width), outputs = x.shape, len(q_NK)
    if x.is_cuda and outputs % 16 == 0 and width % 16 == 0:
        one = _ones[x.device]
        out = torch._scaled_mm(x, q_NK.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
        return out.to(dtype)
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    few = rows <= 16
    _product_kernel[(triton.cdiv(outputs, 32), triton.cdiv(rows, 16 if few else 64))](
        x, q_NK, out, rows, outputs, width, BM=16 if few else 64, BN=32, BK=128, num_warps=4, num_stages=4
    )
    return out


class By(NamedTuple):
    """What rows and columns of a product are still to be multiplied by: (M,) and (N,) float32, None for nothing."""

    rows: Tensor
    columns: Tensor | None


@triton.jit
def _finish_kernel(out, rows, columns, more, N, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, MORE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    value = tl.load(out + row * N + place, inside, 0.0).to(tl.float32) * tl.load(rows + row)
    if COLUMNS:
        value *= tl.load(columns + place, inside, 0.0)
    if MORE:
        value += tl.load(more + row * N + place, inside, 0.0).to(tl.float32)
    tl.store(out + row * N + place, value.to(out.dtype.element_ty), inside)


def finish(out_MN: Tensor, by: By, more_MN: Tensor | None = None) -> Tensor:
    """out · by + more, in place."""
    rows, width = out_MN.shape
    _finish_kernel[(rows, triton.cdiv(width, 2048))](
        out_MN, by.rows, by.rows if by.columns is None else by.columns, out_MN if more_MN is None else more_MN, width,
        BLOCK=2048, COLUMNS=by.columns is not None, MORE=more_MN is not None,
    )  # fmt: skip
    return out_MN


@triton.jit
def _add_low_kernel(out, by, low, a, M, N, R, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    inside = (rows < M)[:, None] & (columns < N)[None]
    x = tl.load(low + rows[:, None] * R + ranks[None], (rows < M)[:, None] & (ranks < R)[None], 0.0)
    y = tl.load(a + ranks[:, None] * N + columns[None], (ranks < R)[:, None] & (columns < N)[None], 0.0)
    place = out + rows[:, None].to(tl.int64) * N + columns[None]
    total = tl.load(place, inside, 0.0).to(tl.float32) * tl.load(by + rows, rows < M, 0.0)[:, None]
    total += tl.dot(x, y, input_precision="ieee")
    tl.store(place, total.to(out.dtype.element_ty), inside)


def add_low(out_MN: Tensor, by: By, low_MR: Tensor, a_RN: Tensor) -> Tensor:
    """out · by + low·A, in place; `by` has rows alone."""
    assert by.columns is None
    (rows, width), rank = out_MN.shape, len(a_RN)
    few = rows <= 32
    _add_low_kernel[(triton.cdiv(rows, 16 if few else 64), triton.cdiv(width, 128))](
        out_MN, by.rows, low_MR, a_RN, rows, width, rank,
        BM=16 if few else 64, BN=128, BR=max(16, triton.next_power_of_2(rank)),
    )  # fmt: skip
    return out_MN


def product_unfinished(x_MK: Tensor, q_NK: Tensor, scale_N: Tensor) -> tuple[Tensor, By]:
    """x·Wᵀ (M, N), but for what it is to be multiplied by."""
    x, scale = quantise(x_MK)
    return _unscaled(x, q_NK, x_MK.dtype), By(scale, scale_N)


def product(x_MK: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """x·Wᵀ (M, N)."""
    return finish(*product_unfinished(x_MK, q_NK, scale_N))


@triton.jit
def _transposed_kernel(q, out, N, K, BN: tl.constexpr, BK: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (n < N)[:, None] & (k < K)[None]
    values = tl.load(q + n[:, None].to(tl.int64) * K + k[None], inside, 0)
    tl.store(out + k[:, None].to(tl.int64) * N + n[None], tl.trans(values), tl.trans(inside))


def _transpose(q_NK: Tensor, out_KN: Tensor) -> None:
    rows, width = q_NK.shape
    _transposed_kernel[(triton.cdiv(rows, 128), triton.cdiv(width, 128))](
        q_NK.view(torch.uint8), out_KN.view(torch.uint8), rows, width, BN=128, BK=128, num_warps=8
    )


AHEAD = True
"""Whether the next matrix is transposed meanwhile."""


class _Ahead(NamedTuple):
    q: Tensor
    done: torch.cuda.Event
    recorded: bool
    """Within a graph that is being recorded."""


_ahead: dict[int, _Ahead] = {}
"""Transposed matrices that nobody has taken yet, by where they lie as they are: one at most."""


def transposed(q_NK: Tensor, following: Tensor | None = None) -> Tensor:
    """(K, N), contiguous. `following`: the matrix of the next call, whose turn begins now, on a stream of its own."""
    recorded = q_NK.is_cuda and torch.cuda.is_current_stream_capturing()
    early = _ahead.pop(q_NK.data_ptr(), None)
    for left in _ahead.values():  # of a pass that has failed
        if not left.recorded and not recorded:
            torch.cuda.current_stream().wait_event(left.done)
    _ahead.clear()
    if early is not None and early.recorded == recorded:
        torch.cuda.current_stream().wait_event(early.done)
        out = early.q
    else:
        out = torch.empty(q_NK.shape[::-1], dtype=FP8, device=q_NK.device)
        _transpose(q_NK, out)
    if following is not None and q_NK.is_cuda and AHEAD:
        stream = _streams[q_NK.device]
        # Memory that the main stream has given out, and gets back after it has waited: no allocation crosses over.
        later = torch.empty(following.shape[::-1], dtype=FP8, device=q_NK.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _transpose(following, later)
            done = stream.record_event()
        _ahead[following.data_ptr()] = _Ahead(later, done, recorded)
    return out


def back_unfinished(
    grad_MN: Tensor, q_NK: Tensor, scale_N: Tensor, following: Tensor | None = None
) -> tuple[Tensor, By]:
    """grad·W (M, K), but for what its rows are to be multiplied by. `following` as for `transposed`."""
    turned = transposed(q_NK, following)
    grad, scale = quantise(grad_MN, scale_N)
    return _unscaled(grad, turned, grad_MN.dtype), By(scale, None)


def product_back(grad_MN: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """grad·W (M, K)."""
    return finish(*back_unfinished(grad_MN, q_NK, scale_N))
