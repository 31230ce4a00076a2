"""Rows rounded to 8 bits, each by its largest absolute value: in a pass of their own, or at the end of the kernel that
makes them.

Activations are rounded to int8 after every group of G neighbouring values has been multiplied by a Hadamard matrix
(Ashkboos et al. 2024, arXiv 2404.00456): that spreads a single large value, beside which int8 leaves the others no
steps, over its group. The matrix of ±1 is H = Hᵀ = G · H⁻¹, so where the weights are rotated as well the product is G
times what it was. Gradients are rounded to FP8 (e4m3), whose steps are finer for small values.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn
AS_FP8 = -1
"""What stands for it where else the size of a group does; 1 is int8 that is not rotated, 0 nothing."""


class Rows(NamedTuple):
    """x (M, K), rotated or not, = q · scale; scale (M,) float32."""

    q: Tensor
    scale: Tensor


def room(rows: int, width: int, how: int, device: torch.device) -> Rows:
    """For a kernel to fill."""
    q = torch.empty(rows, width, dtype=FP8 if how == AS_FP8 else torch.int8, device=device)
    return Rows(q, torch.empty(rows, dtype=torch.float32, device=device))


@triton.jit
def _carried(value):
    """To the nearest number of e4m3, of two the even one; for Triton's interpreter, whose cast forgets to carry from
    the mantissa into the exponent. A GPU casts as it should, and to the largest number what is beyond it."""
    exponent = tl.maximum((value.to(tl.int32, bitcast=True) >> 23) & 255, 127 - 6)
    large = (((exponent + 20) << 23) | (1 << 22)).to(tl.float32, bitcast=True)
    return (value + large) - large


@triton.jit
def as_fp8(value, CARRY: tl.constexpr):
    if CARRY:
        value = _carried(tl.clamp(value, -448.0, 448.0))
    return value.to(tl.float8e4nv)


@triton.jit
def _signs(SIZE: tl.constexpr, GROUP: tl.constexpr):
    """What `signs` is made of, entry by entry; for a SIZE of at most 16."""
    i = tl.arange(0, SIZE)
    bits = i[:, None] & i[None] & (GROUP - 1)
    odd = (0x6996 >> bits) & 1  # whether the number of bits is
    return tl.where(i[:, None] // GROUP == i[None] // GROUP, 1.0 - 2.0 * odd.to(tl.float32), 0.0)


@triton.jit
def signs(SIZE: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr):
    """(SIZE, SIZE) blocks of the Hadamard matrix of GROUP in natural order: −1 to the number of bits that row and
    column share; 0 between groups. Both sizes are powers of two of 16 to 256. bfloat16 holds the ±1, and the values
    that are stored in it, so that a product with them is summed in float32.

    It is the Kronecker product of two small ones, which takes one multiplication an entry. Counting bits for each takes
    ten, which was most of what a rotation took."""
    high = _signs(SIZE // 16, GROUP // 16).to(DTYPE)
    low = _signs(16, 16).to(DTYPE)
    return tl.reshape(high[:, None, :, None] * low[None, :, None, :], (SIZE, SIZE))


@triton.jit
def largest_of(value):
    """Of absolute values, as an integer: these have the same order, and NaN, which else a maximum hides, is the
    largest."""
    value = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.max(value, 1), 0) if len(value.shape) == 2 else tl.max(value, 0)


@triton.jit
def factor(largest, scale, HOW: tl.constexpr):
    """What a row with that `largest_of` is multiplied by; its inverse is stored at `scale`. A row counts as no smaller
    than 2⁻¹⁰⁰, so that the first has an end."""
    MOST: tl.constexpr = 448.0 if HOW == -1 else 127.0
    largest = largest.to(tl.float32, bitcast=True)
    largest = tl.where(largest < 7.888609052210118e-31, 7.888609052210118e-31, largest)
    tl.store(scale, tl.div_rn(largest, MOST))
    return tl.div_rn(MOST, largest)


@triton.jit
def store_rounded(value, at, inside, HOW: tl.constexpr, CARRY: tl.constexpr):
    """Values that have been multiplied by the `factor` of their row."""
    if HOW == -1:
        tl.store(at, as_fp8(value, CARRY), inside)
    else:  # 1.5 · 2²³, whose neighbours are the integers: the lowest byte of the sum is the number
        tl.store(at, (value + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8), inside)


@triton.jit(do_not_specialize=["M"])
def _quantise_kernel(
    x, by, q, scale, M, K, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    BY: tl.constexpr, HOW: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    # Several rows a program: the matrix is made once.
    inner = tl.arange(0, GROUP)
    columns = tl.arange(0, GROUPS)[:, None] * GROUP + inner[None]
    inside = columns < K
    matrix = signs(GROUP, GROUP, x.dtype.element_ty) if HOW > 1 else inner
    factors = tl.load(by + columns, inside, 0.0) if BY else inner
    for row in range(tl.program_id(0).to(tl.int64), M, tl.num_programs(0)):
        read = tl.load(x + row * K + columns, inside, 0.0)
        value = tl.dot(read, matrix, input_precision="ieee") if HOW > 1 else read.to(tl.float32)
        if BY:
            value *= factors
        value *= factor(largest_of(value), scale + row, HOW)
        store_rounded(value, q + row * K + columns, inside, HOW, CARRY)


PROGRAMS = 264
"""Programs that share the rows, two for each of an H200's processors."""


def quantise(x_MK: Tensor, how: int, by_K: Tensor | None = None) -> Rows:
    """x · by, to FP8 or int8 in groups of `how`. The scale of a row with a value that is not finite is none."""
    rows, width = x_MK.shape
    out = room(rows, width, how, x_MK.device)
    block = triton.next_power_of_2(width)
    group = how if how > 1 else min(block, 128)
    _quantise_kernel[(min(rows, PROGRAMS) if how > 1 else rows,)](
        x_MK, x_MK if by_K is None else by_K, *out, rows, width, GROUPS=block // group, GROUP=group,
        BY=by_K is not None, HOW=how, CARRY=not x_MK.is_cuda,
        # Two long rows at a time would not fit into the shared memory of cards smaller than an H200.
        num_warps=8 if block >= 4096 else 4, num_stages=1 if block > 8192 else 2,
    )  # fmt: skip
    return out


PART = 2048
"""Values of a row at a time where a row is too long for one program."""


@triton.jit
def _round_kernel(x, by, largest, q, scale, K, COUNT, BLOCK: tl.constexpr, COUNTS: tl.constexpr, CARRY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    parts = tl.arange(0, COUNTS)
    each = factor(tl.max(tl.load(largest + row * COUNT + parts, parts < COUNT, 0), 0), scale + row, -1)
    value = tl.load(x + row * K + columns, inside, 0.0).to(tl.float32) * tl.load(by + columns, inside, 0.0)
    store_rounded(value * each, q + row * K + columns, inside, -1, CARRY)


def round_rows(x_MK: Tensor, largest: Tensor, by_K: Tensor) -> Rows:
    """`quantise` of x · by to FP8 where the kernel that has made x has left `largest` (M, n) int32, `largest_of` some
    parts of each row of x · by."""
    rows, width = x_MK.shape
    out, count = room(rows, width, AS_FP8, x_MK.device), largest.shape[1]
    _round_kernel[(rows, triton.cdiv(width, PART))](
        x_MK, by_K, largest, *out, width, count,
        BLOCK=PART, COUNTS=triton.next_power_of_2(count), CARRY=not x_MK.is_cuda,
    )  # fmt: skip
    return out
