"""Queries and keys of a projection's output made ready for attention: normalised, and the first part of each head
rotated. For layers in which that is more than the attention kernels do themselves.

A row is (heads + 2·key heads) · D: queries, keys, values. Arithmetic is float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from equipoise.policy.kernels.attention import Form, HeadNorms


@triton.jit
def _tile(row, part, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, P: tl.constexpr):
    """Offsets of one row's queries (part 0), keys (1) or values (2), and which of them are real."""
    count = tl.where(part == 0, HEADS, KEY_HEADS)
    begin = tl.where(part == 0, 0, tl.where(part == 1, HEADS, HEADS + KEY_HEADS))
    h, d = tl.arange(0, BH)[:, None], tl.arange(0, P)[None]
    return row * ((HEADS + 2 * KEY_HEADS) * D) + begin * D + h * D, (h < count) & (d < D), count


@triton.jit
def _partner(d, R: tl.constexpr):
    """The place that d is rotated with, and the sign with which it enters."""
    other = tl.where(d < R // 2, d + R // 2, tl.where(d < R, d - R // 2, d))
    return other, tl.where(d < R // 2, -1.0, 1.0)


@triton.jit
def _weights(wq, wk, part, h, d, real, D: tl.constexpr, WHOLE: tl.constexpr, OFFSET: tl.constexpr):
    at = h * D + d if WHOLE else h * 0 + d
    w = tl.load(wq + at, real & (part == 0), 0.0).to(tl.float32) + tl.load(wk + at, real & (part == 1), 0.0)
    return w + OFFSET


@triton.jit
def _scale(x, count, eps, D: tl.constexpr, WHOLE: tl.constexpr):
    """1 / rms: of each head (BH, 1), or of all (1, 1)."""
    squares = tl.sum(x * x, 1)[:, None]
    if WHOLE:
        return 1.0 / tl.sqrt(tl.sum(squares, 0)[:, None] / (count * D) + eps)
    else:
        return 1.0 / tl.sqrt(squares / D + eps)


@triton.jit
def _prepare_kernel(
    x, y, cos, sin, wq, wk, eps,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BH: tl.constexpr, R: tl.constexpr,
    NORM: tl.constexpr, WHOLE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    base, real, count = _tile(row, part, HEADS, KEY_HEADS, D, BH, P)
    h, d = tl.arange(0, BH)[:, None], tl.arange(0, P)[None]
    read = tl.load(x + base + d, real, 0.0)
    if part == 2:
        tl.store(y + base + d, read, real)
        return
    other, sign = _partner(d, R)
    value, second = read.to(tl.float32), tl.load(x + base + other, real, 0.0).to(tl.float32)
    if NORM:
        scale = _scale(value, count, eps, D, WHOLE)
        value *= scale * _weights(wq, wk, part, h, d, real, D, WHOLE, OFFSET)
        second *= scale * _weights(wq, wk, part, h, other, real, D, WHOLE, OFFSET)
    if R > 0:
        c = tl.load(cos + row * R + d, d < R, 1.0).to(tl.float32)
        s = tl.load(sin + row * R + d, d < R, 0.0).to(tl.float32)
        value = value * c + sign * second * s
    tl.store(y + base + d, value.to(y.dtype.element_ty), real)


@triton.jit(do_not_specialize=["M", "PROGRAMS"])
def _prepare_backward_kernel(
    dy, dkv, x, dx, cos, sin, wq, wk, dw, M, PROGRAMS, eps,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BH: tl.constexpr, R: tl.constexpr,
    NORM: tl.constexpr, WHOLE: tl.constexpr, OFFSET: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    program, part = tl.program_id(0), tl.program_id(1)
    h, d = tl.arange(0, BH)[:, None], tl.arange(0, P)[None]
    total = tl.zeros((BH, P), tl.float32)
    for row in range(program, M, PROGRAMS):
        base, real, count = _tile(row, part, HEADS, KEY_HEADS, D, BH, P)
        others = dkv + row * (2 * KEY_HEADS * D) + tl.maximum(part - 1, 0) * (KEY_HEADS * D) + h * D
        grad = tl.load(dy + base + d, real & (part == 0), 0.0).to(tl.float32)
        grad += tl.load(others + d, real & (part > 0), 0.0)
        if part == 2:
            tl.store(dx + base + d, grad.to(dx.dtype.element_ty), real)
        else:
            if R > 0:
                other, sign = _partner(d, R)
                second = tl.load(dy + base + other, real & (part == 0), 0.0).to(tl.float32)
                second += tl.load(others + other, real & (part > 0), 0.0)
                c = tl.load(cos + row * R + d, d < R, 1.0).to(tl.float32)
                s = tl.load(sin + row * R + other, d < R, 0.0).to(tl.float32)
                grad = grad * c - sign * second * s
            if NORM:
                value = tl.load(x + base + d, real, 0.0).to(tl.float32)
                scale = _scale(value, count, eps, D, WHOLE)
                value *= scale
                if WEIGHT:
                    total += grad * value
                grad *= _weights(wq, wk, part, h, d, real, D, WHOLE, OFFSET)
                product = tl.sum(grad * value, 1)[:, None]
                mean = tl.sum(product, 0)[:, None] / (count * D) if WHOLE else product / D
                grad = (grad - value * mean) * scale
            tl.store(dx + base + d, grad.to(dx.dtype.element_ty), real)
    if WEIGHT:  # noqa: SIM102 (one is known when the kernel is compiled, the other when it runs)
        if part < 2:
            if WHOLE:
                total_count = tl.where(part == 0, HEADS, KEY_HEADS)
                target = dw + (program * (HEADS + KEY_HEADS) + part * HEADS) * D + h * D + d
                tl.store(target, total, (h < total_count) & (d < D))
            else:
                columns = tl.arange(0, P)
                tl.store(dw + (program * 2 + part) * D + columns, tl.sum(total, 0), columns < D)


PROGRAMS = 128


def _options(form: Form, rotated: int, norms: HeadNorms | None) -> dict[str, object]:
    heads = triton.next_power_of_2(form.heads)
    columns = triton.next_power_of_2(form.size)
    return {
        "HEADS": form.heads, "KEY_HEADS": form.key_heads, "D": form.size, "P": columns, "BH": heads, "R": rotated,
        "NORM": norms is not None, "WHOLE": norms is not None and len(norms.query) != form.size,
        "OFFSET": norms.offset if norms is not None else 0.0, "num_warps": 8 if heads * columns > 2048 else 4,
    }  # fmt: skip


def prepare(qkv: Tensor, cos: Tensor, sin: Tensor, form: Form, rotated: int, norms: HeadNorms | None) -> Tensor:
    """qkv (M, ·) with its queries and keys normalised, and the first `rotated` places of each head rotated by cos, sin
    (M, rotated)."""
    out = torch.empty_like(qkv)
    query, key, eps = (norms.query, norms.key, norms.eps) if norms is not None else (qkv, qkv, 0.0)
    _prepare_kernel[(qkv.shape[0], 3)](qkv, out, cos, sin, query, key, eps, **_options(form, rotated, norms))
    return out


def prepare_backward(
    dout: Tensor, dkv: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, form: Form, rotated: int,
    norms: HeadNorms | None, trained: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """(gradient of qkv as it was before `prepare`; where the norms' weights are `trained`, rows whose sum is their
    gradient, for `add_rows`). dout, dkv: as `attention.attend_backward` gives them."""
    rows, dqkv = qkv.shape[0], torch.empty_like(qkv)
    query, key, eps = (norms.query, norms.key, norms.eps) if norms is not None else (qkv, qkv, 0.0)
    programs = min(rows, PROGRAMS) if trained else rows
    widths = (len(query), len(key))
    dw = torch.empty(programs, sum(widths), dtype=torch.float32, device=qkv.device) if trained else dqkv
    _prepare_backward_kernel[(programs, 3)](
        dout, dkv, qkv, dqkv, cos, sin, query, key, dw, rows, programs, eps,
        **_options(form, rotated, norms), WEIGHT=trained,
    )  # fmt: skip
    return dqkv, dw.split(widths, 1) if trained else ()
