"""Attention for one new token a row over a static cache, and how that cache is begun; as `attention` in all else."""

import triton
import triton.language as tl
from torch import Tensor

from equipoise.policy.kernels.attention import Form, capped, inside, load_rotated, precision, rotate


@triton.jit(do_not_specialize=["B", "N", "S"])
def _fill_kernel(
    qkv, cos, sin, fill, cache, B, N, S,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr, CAP: tl.constexpr,
    ROTATE: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    block, key_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    D: tl.constexpr = 2 * D2
    P: tl.constexpr = 2 * P2
    W: tl.constexpr = (HEADS + 2 * KEY_HEADS) * D
    place = block * BP + tl.arange(0, BP)
    valid = place < N
    nodes = tl.load(fill + row * N + place, valid, 0)
    k1, k2, _c, _s = load_rotated(qkv, cos, sin, nodes, valid, W, (HEADS + key_head) * D, D2, P2, ROTATE)
    d, half = tl.arange(0, P), tl.arange(0, P2)
    whole, part = inside(valid, d, D, P), inside(valid, half, D2, P2)
    values = tl.load(qkv + nodes[:, None].to(tl.int64) * W + (HEADS + KEY_HEADS + key_head) * D + d[None], whole, 0.0)
    dtype = cache.dtype.element_ty
    target = cache + (row * KEY_HEADS + key_head) * S * D + place[:, None] * D
    tl.store(target + half[None], k1.to(dtype), part)
    tl.store(target + D2 + half[None], k2.to(dtype), part)
    tl.store(target + (row * 0 + B) * KEY_HEADS * S * D + d[None], values, whole)


def fill(qkv: Tensor, cos: Tensor, sin: Tensor, fill_BP: Tensor, cache: Tensor, form: Form) -> None:
    """Start each row's cache (2, B, key heads, S, D) with the keys and values of its nodes, places 0 to P−1."""
    rows, places = fill_BP.shape
    _fill_kernel[(triton.cdiv(places, 32), form.key_heads, rows)](
        qkv, cos, sin, fill_BP, cache, rows, places, cache.shape[3], **form.options, BP=32
    )


@triton.jit
def _normed(first, second, w, eps, d, D2: tl.constexpr, OFFSET: tl.constexpr):
    """Both halves of vectors, a row each, divided by their root mean square and multiplied by the norm's weights."""
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    scale = (1.0 / tl.sqrt(squares / (2 * D2) + eps))[:, None]
    w1 = tl.load(w + d, d < D2, 0.0).to(tl.float32) + OFFSET
    w2 = tl.load(w + D2 + d, d < D2, 0.0).to(tl.float32) + OFFSET
    return first * (scale * w1[None]), second * (scale * w2[None])


@triton.jit(do_not_specialize=["B", "S"])
def _decode_kernel(
    qkv, cos, sin, wq, wk, eps, cache, hidden, slot_, out, B, S, scale, cap,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr, CAP: tl.constexpr,
    ROTATE: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, BG: tl.constexpr, BS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    key_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    D: tl.constexpr = 2 * D2
    P: tl.constexpr = 2 * P2
    W: tl.constexpr = (HEADS + 2 * KEY_HEADS) * D
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    dtype = qkv.dtype.element_ty
    slot = tl.load(slot_)
    d, half, member = tl.arange(0, P), tl.arange(0, P2), tl.arange(0, BG)
    at = qkv + row * W + (key_head * GROUP + member[:, None]) * D + half[None]
    wanted = inside(member < GROUP, half, D2, P2)
    q1, q2 = tl.load(at, wanted, 0.0).to(tl.float32), tl.load(at + D2, wanted, 0.0).to(tl.float32)
    new = qkv + row * W + (HEADS + key_head) * D + half[None]
    k1, k2 = tl.load(new, (half < D2)[None], 0.0), tl.load(new + D2, (half < D2)[None], 0.0)
    k1, k2 = k1.to(tl.float32), k2.to(tl.float32)
    if NORM:
        q1, q2 = _normed(q1, q2, wq, eps, half, D2, OFFSET)
        k1, k2 = _normed(k1, k2, wk, eps, half, D2, OFFSET)
    if ROTATE:
        c = tl.load(cos + row * D + half, half < D2, 0.0).to(tl.float32)
        s = tl.load(sin + row * D + half, half < D2, 0.0).to(tl.float32)
        q1, q2 = rotate(q1, q2, c[None], s[None])
        k1, k2 = rotate(k1, k2, c[None], s[None])
    q1, q2 = q1.to(dtype), q2.to(dtype)
    k1, k2 = k1.to(dtype), k2.to(dtype)
    value = tl.load(qkv + row * W + (HEADS + KEY_HEADS + key_head) * D + d, d < D, 0.0)
    keys = cache + (row * KEY_HEADS + key_head) * S * D
    values = keys + (row * 0 + B) * KEY_HEADS * S * D  # in 64 bits, as `row` is
    tl.store(keys + slot * D + half[None], k1, (half < D2)[None])
    tl.store(keys + slot * D + D2 + half[None], k2, (half < D2)[None])
    tl.store(values + slot * D + d, value, d < D)
    # The token itself comes from registers: what was just stored need not be visible yet.
    top = tl.sum(q1.to(tl.float32) * k1.to(tl.float32), 1)
    top = capped((top + tl.sum(q2.to(tl.float32) * k2.to(tl.float32), 1)) * scale, cap, CAP)
    total = tl.full((BG,), 1.0, tl.float32)
    acc = tl.zeros((BG, P), tl.float32) + value.to(tl.float32)[None]
    for start in range(0, slot, BS):
        place = start + tl.arange(0, BS)
        valid = place < slot
        off = tl.load(hidden + row * S + place, valid, 1).to(tl.int32)
        seen = valid & (off == 0)
        # What is hidden is read as well: it is finite, and no load then waits for another.
        part, whole = inside(valid, half, D2, P2), inside(valid, d, D, P)
        first = tl.load(keys + place[:, None] * D + half[None], part, 0.0)
        second = tl.load(keys + place[:, None] * D + D2 + half[None], part, 0.0)
        old = tl.load(values + place[:, None] * D + d[None], whole, 0.0)
        scores = tl.dot(q1, tl.trans(first), input_precision=PRECISION)
        scores = capped(tl.dot(q2, tl.trans(second), scores, input_precision=PRECISION) * scale, cap, CAP)
        scores = tl.where(seen[None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(dtype), old, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    target = out + row * (HEADS * D) + (key_head * GROUP + member[:, None]) * D + d[None]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), inside(member < GROUP, d, D, P))


def decode(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, hidden_BS: Tensor, slot: Tensor, form: Form) -> Tensor:
    """Attention of one new token a row, qkv (B, ·), whose key and value go to place `slot` (1,) of the cache, later
    places being empty: (B, heads · D). hidden_BS: True where the row does not see an earlier place, because it holds
    nothing for the row or lies beyond the layer's window."""
    rows, norms = qkv.shape[0], form.norms
    # Without any the kernel is given something that it does not read.
    read, offset = ((qkv, qkv, 0.0), 0.0) if norms is None else (norms[:3], norms.offset)
    out = qkv.new_empty(rows, form.heads * form.size)
    _decode_kernel[(form.key_heads, rows)](
        qkv, cos, sin, *read, cache, hidden_BS, slot, out, rows, cache.shape[3], form.scale, form.cap,
        **form.options, NORM=norms is not None, OFFSET=offset,
        BG=max(16, triton.next_power_of_2(form.heads // form.key_heads)), BS=32,
        PRECISION=precision(qkv), num_warps=4, num_stages=2 if form.size * qkv.element_size() <= 512 else 1,
    )  # fmt: skip
    return out
