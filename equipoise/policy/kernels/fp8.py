"""Products with FP8 weights W = q · scale (e4m3, a scale a row): activations are rounded row by row as they come.

x·Wᵀ sums over K, along which both x and W lie in memory, as FP8 tensor cores want them. grad·W sums over N: there W is
transposed first, into memory that the next layer uses again. Its scales lie along that sum, so they go into the
gradient before that is rounded.

Shapes: M rows, K inputs and N outputs of a layer. Sums are float32, results have x's dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn
MOST = 448.0
FEW_ROWS = 64


@triton.jit
def _rounded(value):
    """To the nearest number of e4m3, of two the even one. The cast does so too, but Triton's interpreter forgets to
    carry from the mantissa into the exponent. 3 bits of mantissa, and the least exponent is -6."""
    exponent = tl.maximum((value.to(tl.int32, bitcast=True) >> 23) & 255, 127 - 6)
    large = (((exponent + 20) << 23) | (1 << 22)).to(tl.float32, bitcast=True)
    return (value + large) - large


@triton.jit
def _quantise_kernel(x, by, q, scale, K, MOST: tl.constexpr, BLOCK: tl.constexpr, BY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    value = tl.load(x + row * K + columns, inside, 0.0).to(tl.float32)
    if BY:
        value *= tl.load(by + columns, inside, 0.0)
    step = tl.maximum(tl.max(tl.abs(value), 0), 1.1754943508222875e-38) / MOST
    tl.store(scale + row, step)
    tl.store(q + row * K + columns, _rounded(tl.clamp(value / step, -MOST, MOST)).to(tl.float8e4nv), inside)


def quantise(x_MK: Tensor, by_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(q (M, K) FP8, scale (M, 1) float32) of x · by, each row by its largest absolute value."""
    rows, width = x_MK.shape
    q = torch.empty(rows, width, dtype=FP8, device=x_MK.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x_MK.device)
    block = triton.next_power_of_2(width)
    _quantise_kernel[(rows,)](
        x_MK, x_MK if by_K is None else by_K, q, scale, width,
        MOST=MOST, BLOCK=block, BY=by_K is not None, num_warps=max(4, min(16, block // 1024)),
    )  # fmt: skip
    return q, scale


@triton.jit
def _product_kernel(
    x, q, row_scale, scale, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SCALED: tl.constexpr
):
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
    acc *= tl.load(row_scale + rows, rows < M, 0.0)[:, None]
    if SCALED:
        acc *= tl.load(scale + columns, inside, 0.0)[None]
    place = rows[:, None].to(tl.int64) * N + columns[None]
    tl.store(out + place, acc.to(out.dtype.element_ty), (rows < M)[:, None] & inside[None])


def _scaled(x: Tensor, row_scale: Tensor, q_NK: Tensor, scale_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(x · row_scale)·(q · scale)ᵀ, (M, N)."""
    (rows, width), outputs = x.shape, len(q_NK)
    if rows > FEW_ROWS and x.is_cuda and dtype == torch.bfloat16 and outputs % 16 == 0 and width % 16 == 0:
        each = _ones(outputs, x.device) if scale_N is None else scale_N
        return torch._scaled_mm(
            x, q_NK.t(), scale_a=row_scale, scale_b=each[None], out_dtype=dtype, use_fast_accum=True
        )
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    few = rows <= 16
    _product_kernel[(triton.cdiv(outputs, 32), triton.cdiv(rows, 16 if few else 64))](
        x, q_NK, row_scale, row_scale if scale_N is None else scale_N, out, rows, outputs, width,
        BM=16 if few else 64, BN=32, BK=128, SCALED=scale_N is not None, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


_kept: dict[tuple[int, torch.device], Tensor] = {}


def _ones(count: int, device: torch.device) -> Tensor:
    return _kept.setdefault((count, device), torch.ones(count, dtype=torch.float32, device=device))


def product(x_MK: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """x·Wᵀ (M, N)."""
    return _scaled(*quantise(x_MK), q_NK, scale_N, x_MK.dtype)


@triton.jit
def _transposed_kernel(q, out, N, K, BN: tl.constexpr, BK: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (n < N)[:, None] & (k < K)[None]
    values = tl.load(q + n[:, None].to(tl.int64) * K + k[None], inside, 0)
    tl.store(out + k[:, None].to(tl.int64) * N + n[None], tl.trans(values), tl.trans(inside))


def transposed(q_NK: Tensor) -> Tensor:
    """(K, N), contiguous."""
    rows, width = q_NK.shape
    out = torch.empty(width, rows, dtype=torch.uint8, device=q_NK.device)
    _transposed_kernel[(triton.cdiv(rows, 128), triton.cdiv(width, 128))](
        q_NK.view(torch.uint8), out, rows, width, BN=128, BK=128, num_warps=8
    )
    return out.view(FP8)


def product_back(grad_MN: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """grad·W (M, K)."""
    return _scaled(*quantise(grad_MN, scale_N), transposed(q_NK), None, grad_MN.dtype)
