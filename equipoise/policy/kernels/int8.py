"""Products with int8 weights W = q · scale, one scale a row: written out for many rows of x, as they are for few."""

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_ROWS = 128


@triton.jit
def _matrix_kernel(q, scale, out, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    value = tl.load(q + row * K + columns, inside, 0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * K + columns, value.to(out.dtype.element_ty), inside)


def matrix(q_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """W (N, K)."""
    rows, width = q_NK.shape
    out = torch.empty(rows, width, dtype=dtype, device=q_NK.device)
    _matrix_kernel[(rows, triton.cdiv(width, 4096))](q_NK, scale_N, out, width, BLOCK=4096)
    return out


@triton.jit
def _product_kernel(
    x, q, scale, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    inside = columns < N
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + inner
        a = tl.load(x + rows[:, None] * K + k[None], (rows < M)[:, None] & (k < K)[None], 0.0)
        b = tl.load(q + columns[:, None].to(tl.int64) * K + k[None], inside[:, None] & (k < K)[None], 0)
        acc = tl.dot(a, tl.trans(b.to(a.dtype)), acc, input_precision=PRECISION)
    acc *= tl.load(scale + columns, inside, 0.0)[None]
    tl.store(out + rows[:, None] * N + columns[None], acc.to(out.dtype.element_ty), (rows < M)[:, None] & inside[None])


def product(x_MK: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """x·Wᵀ (M, N)."""
    rows, width = x_MK.shape
    if rows > FEW_ROWS:
        return x_MK @ matrix(q_NK, scale_N, x_MK.dtype).T
    out = x_MK.new_empty(rows, len(q_NK))
    _product_kernel[(triton.cdiv(len(q_NK), 32), triton.cdiv(rows, 64))](
        x_MK, q_NK, scale_N, out, rows, len(q_NK), width,
        BM=16 if rows <= 16 else 64, BN=32, BK=128, PRECISION="ieee" if x_MK.dtype == torch.float32 else "tf32",
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def product_back(grad_MN: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """grad·W (M, K)."""
    return grad_MN @ matrix(q_NK, scale_N, grad_MN.dtype)
