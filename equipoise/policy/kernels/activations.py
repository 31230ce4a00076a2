"""The MLP's activation and its gradient, each one pass over memory; the gradient rounded where that comes next.

Shapes: M rows (tokens), F of the MLP. Arithmetic is float32, what is stored has the input's dtype.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from equipoise.policy.kernels.rounding import Rows, largest_of, round_rows

SILU, GELU_TANH = 0, 1
ACTIVATIONS = {"silu": SILU, "gelu_tanh": GELU_TANH}
"""Their names, and what kernels are compiled for."""


@triton.jit
def _activated(x, ACT: tl.constexpr):
    """(activation, its derivative)."""
    if ACT == 0:
        sigmoid = tl.sigmoid(x)
        silu = x * sigmoid
        return silu, sigmoid + silu * (1.0 - sigmoid)
    else:
        # x/2 · (1 + tanh u) = x · sigmoid(2u), u = √(2/π) · (x + 0.044715 x³): Hendrycks & Gimpel, arXiv 1606.08415
        sigmoid = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * sigmoid, sigmoid + x * sigmoid * (1.0 - sigmoid) * slope


@triton.jit
def _activation_kernel(x, out, F, BLOCK: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    at = x + row * (2 * F if GATED else F) + columns
    value, _ = _activated(tl.load(at, inside, 0.0).to(tl.float32), ACT)
    if GATED:
        value *= tl.load(at + F, inside, 0.0).to(tl.float32)
    tl.store(out + row * F + columns, value.to(out.dtype.element_ty), inside)


@triton.jit
def _activation_backward_kernel(
    x, dout, dx, f, by, largest, F,
    BLOCK: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, BY: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < F
    at = row * (2 * F if GATED else F) + columns
    value, slope = _activated(tl.load(x + at, inside, 0.0).to(tl.float32), ACT)
    grad = tl.load(dout + row * F + columns, inside, 0.0).to(tl.float32)
    dtype = dx.dtype.element_ty
    if GATED:
        up = tl.load(x + at + F, inside, 0.0).to(tl.float32)
        second = (grad * value).to(dtype)
        tl.store(dx + at + F, second, inside)
        grad *= up
        value *= up
    first = (grad * slope).to(dtype)
    tl.store(dx + at, first, inside)
    if AGAIN:
        tl.store(f + row * F + columns, value.to(dtype), inside)
    if BY:
        top = largest_of(first.to(tl.float32) * tl.load(by + columns, inside, 0.0))
        if GATED:
            top = tl.maximum(top, largest_of(second.to(tl.float32) * tl.load(by + F + columns, inside, 0.0)))
        tl.store(largest + row * tl.num_programs(1) + tl.program_id(1), top)


ACTIVATION_BLOCK = 1024


def activate(x: Tensor, activation: int, gated: bool) -> Tensor:
    """act(gate) · up: (M, 2F), gate first, → (M, F). Without a gate, act(x): (M, F) → (M, F)."""
    rows, width = x.shape[0], x.shape[1] // (2 if gated else 1)
    out, grid = x.new_empty(rows, width), (rows, triton.cdiv(width, ACTIVATION_BLOCK))
    _activation_kernel[grid](x, out, width, BLOCK=ACTIVATION_BLOCK, ACT=activation, GATED=gated)
    return out


class Back(NamedTuple):
    dx: Tensor
    """Gradient of `activate`'s input."""
    rounded: Rows | None
    """That, times one number a column, to FP8."""
    f: Tensor | None
    """What `activate` gave."""


def activate_backward(
    x: Tensor, dout_MF: Tensor, activation: int, gated: bool, by: Tensor | None = None, again: bool = False
) -> Back:
    """`by`: what columns of the gradient are multiplied by where it is to be rounded; `again`: whether f is wanted."""
    rows, width = dout_MF.shape
    dx, grid = torch.empty_like(x), (rows, triton.cdiv(width, ACTIVATION_BLOCK))
    largest = dx if by is None else torch.empty(grid, dtype=torch.int32, device=x.device)
    f = torch.empty_like(dout_MF) if again else None
    _activation_backward_kernel[grid](
        x, dout_MF, dx, dx if f is None else f, dx if by is None else by, largest, width,
        BLOCK=ACTIVATION_BLOCK, ACT=activation, GATED=gated, BY=by is not None, AGAIN=again,
    )  # fmt: skip
    return Back(dx, None if by is None else round_rows(dx, largest, by), f)
