"""Attention over a packed trie, forward and backward; `decoding` has it for one token over a static cache.

Queries, keys and values come as one projection's output qkv (M, (heads + 2·key heads) · D). Where the whole head is
rotated that is done as they are loaded, else they come as `heads.prepare` has left them; nothing is gathered,
transposed or padded in memory. Flash attention (Dao et al. 2022, arXiv 2205.14135): online softmax forward, scores
recomputed backward.

A window hides what lies that many places back, a cap puts scores through cap · tanh(score / cap) (Gemma 2, arXiv
2408.00118). Heads whose size is no power of two fill the two halves of a tile up with zeros.

Trie: M nodes, R rows of at most L nodes, paths_RL the nodes of each row, places_M one place in the flattened paths for
each node, which says which row computes it (`trie.Trie`). A node's key and value serve every row through it, so their
gradients are summed over rows with atomic additions in float32: equal to rounding, not bit for bit, from run to run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Form(NamedTuple):
    """What attention is in one layer."""

    heads: int
    key_heads: int
    size: int
    """Of one head."""
    scale: float
    window: int = 0
    """Places that a token sees, itself among them; 0 is all that went before."""
    cap: float = 0.0
    """Scores never exceed it; 0 is none."""
    rotate: bool = True
    """Whether the kernels rotate the whole of each head as they load it."""

    @property
    def options(self) -> dict[str, int | bool]:
        """What kernels are compiled for. Half a head fills half a tile, which is never smaller than a product needs."""
        half = self.size // 2
        return {
            "HEADS": self.heads, "KEY_HEADS": self.key_heads, "D2": half,
            "P2": max(16, triton.next_power_of_2(half)), "CAP": self.cap > 0, "ROTATE": self.rotate,
        }  # fmt: skip


@triton.jit
def rotate(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def inside(valid, d, D: tl.constexpr, P: tl.constexpr):
    """Which of a tile of P columns, D of them real, are to be read or written."""
    if P == D:
        return valid[:, None]
    else:
        return valid[:, None] & (d < D)[None]


@triton.jit
def load_rotated(qkv, cos, sin, nodes, valid, width, offset, D2: tl.constexpr, P2: tl.constexpr, ROTATE: tl.constexpr):
    """Both halves of one head's vectors at `nodes`, rotated, in float32."""
    d = tl.arange(0, P2)
    there = inside(valid, d, D2, P2)
    base = qkv + nodes[:, None].to(tl.int64) * width + offset + d[None]
    first = tl.load(base, there, 0.0).to(tl.float32)
    second = tl.load(base + D2, there, 0.0).to(tl.float32)
    if ROTATE:
        angle = nodes[:, None] * (2 * D2) + d[None]
        c = tl.load(cos + angle, there, 0.0).to(tl.float32)
        s = tl.load(sin + angle, there, 0.0).to(tl.float32)
        first, second = rotate(first, second, c, s)
    else:
        c, s = first, second
    return first, second, c, s


@triton.jit
def capped(scores, cap, CAP: tl.constexpr):
    """cap · tanh(scores / cap)."""
    if CAP:
        return (2.0 * tl.sigmoid(scores * (2.0 / cap)) - 1.0) * cap
    else:
        return scores


@triton.jit
def _through_cap(grad, scores, cap, CAP: tl.constexpr):
    """The gradient before the cap of a gradient after it; `scores` are capped."""
    if CAP:
        share = scores / cap
        return grad * (1.0 - share * share)
    else:
        return grad


@triton.jit
def _seen(place_q, place_k, window, WINDOW: tl.constexpr):
    """(queries, keys): which keys a query sees."""
    seen = place_k[None] <= place_q[:, None]
    if WINDOW:
        seen = seen & (place_q[:, None] - place_k[None] < window)
    return seen


@triton.jit
def _first(place, window, WINDOW: tl.constexpr, BK: tl.constexpr):
    """Where the block of keys begins that holds the first one which the query at this place sees."""
    if WINDOW:
        return tl.maximum(place - window + 1, 0) // BK * BK
    else:
        return 0


@triton.jit
def _last(place, L, window, WINDOW: tl.constexpr):
    """One past the last query that sees a key before this place."""
    if WINDOW:
        return tl.minimum(L, place + window)
    else:
        return L


@triton.jit
def _nothing(WINDOW: tl.constexpr):
    """The score of what is not seen. With a window whole blocks may come before the first key that is: a finite score
    makes no nan of them, and the first real one wipes out what they added."""
    return -1.0e30 if WINDOW else float("-inf")


@triton.jit
def _rotate_back(first, second, c, s, ROTATE: tl.constexpr):
    """The gradient before the rotation of one after it."""
    if ROTATE:
        return first * c + second * s, second * c - first * s
    else:
        return first, second


@triton.jit
def _own(paths, places, row, L, place):
    """Nodes at these places of a row, and whether the row is the one that computes them."""
    nodes = tl.load(paths + row * L + place, place < L, 0)
    own = (place < L) & (tl.load(places + nodes) == row * L + place)
    return nodes, own


@triton.jit
def _clear_spare(paths, places, out, M, width, block, BLOCK: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr):
    """Zeros for the nodes among these that no row computes, so that nothing undefined enters a product."""
    for start in range(block * BLOCK, M, tl.num_programs(0) * BLOCK):
        nodes = start + tl.arange(0, BLOCK)
        real = nodes < M
        reached = tl.load(paths + tl.load(places + nodes, real, 0)) == nodes
        d = tl.arange(0, P)
        zeros = tl.zeros((BLOCK, P), out.dtype.element_ty)
        target = out + nodes[:, None].to(tl.int64) * width + d[None]
        tl.store(target, zeros, inside(real & ~reached, d, SIZE, P))


@triton.jit(do_not_specialize=["R", "L", "M"])
def _forward_kernel(
    qkv, cos, sin, paths, places, out, lse, R, L, M, scale, window, cap,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr, CAP: tl.constexpr,
    ROTATE: tl.constexpr, WINDOW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    D: tl.constexpr = 2 * D2
    P: tl.constexpr = 2 * P2
    W: tl.constexpr = (HEADS + 2 * KEY_HEADS) * D
    key_head = head // (HEADS // KEY_HEADS)
    if row == R:
        _clear_spare(paths, places, out + head * D, M, HEADS * D, block, BQ, D, P)
        return
    place_q = block * BQ + tl.arange(0, BQ)
    node_q, own = _own(paths, places, row, L, place_q)
    if tl.max(own.to(tl.int32), 0) > 0:
        dtype = qkv.dtype.element_ty
        q1, q2, _c, _s = load_rotated(qkv, cos, sin, node_q, own, W, head * D, D2, P2, ROTATE)
        q1, q2 = q1.to(dtype), q2.to(dtype)
        d = tl.arange(0, P)
        top = tl.full((BQ,), float("-inf"), tl.float32)
        total = tl.zeros((BQ,), tl.float32)
        acc = tl.zeros((BQ, P), tl.float32)
        for start in range(_first(block * BQ, window, WINDOW, BK), tl.minimum(L, (block + 1) * BQ), BK):
            place_k = start + tl.arange(0, BK)
            valid = place_k < L
            node_k = tl.load(paths + row * L + place_k, valid, 0)
            k1, k2, _ck, _sk = load_rotated(qkv, cos, sin, node_k, valid, W, (HEADS + key_head) * D, D2, P2, ROTATE)
            values = tl.load(
                qkv + node_k[:, None].to(tl.int64) * W + (HEADS + KEY_HEADS + key_head) * D + d[None],
                inside(valid, d, D, P),
                0.0,
            )
            scores = tl.dot(q1, tl.trans(k1.to(dtype)), input_precision=PRECISION)
            scores = tl.dot(q2, tl.trans(k2.to(dtype)), scores, input_precision=PRECISION) * scale
            scores = capped(scores, cap, CAP)
            scores = tl.where(_seen(place_q, place_k, window, WINDOW), scores, _nothing(WINDOW))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - new_top[:, None])
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.sum(weights, 1)
            acc = tl.dot(weights.to(dtype), values, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
        target = out + node_q[:, None].to(tl.int64) * (HEADS * D) + head * D + d[None]
        tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), inside(own, d, D, P))
        tl.store(lse + node_q * HEADS + head, top + tl.log(total), own)


@triton.jit(do_not_specialize=["R", "L", "M"])
def _query_backward_kernel(
    qkv, cos, sin, paths, places, out, lse, dout, dqkv, dkv, R, L, M, scale, window, cap,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr, CAP: tl.constexpr,
    ROTATE: tl.constexpr, WINDOW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    D: tl.constexpr = 2 * D2
    P: tl.constexpr = 2 * P2
    W: tl.constexpr = (HEADS + 2 * KEY_HEADS) * D
    key_head = head // (HEADS // KEY_HEADS)
    if row == R:
        _clear_spare(paths, places, dqkv + head * D, M, W, block, BQ, D, P)
        if head < KEY_HEADS:  # for the sums that `_key_backward_kernel` will add to
            for start in range(block * BQ, M, tl.num_programs(0) * BQ):
                nodes = start + tl.arange(0, BQ)
                target = dkv + nodes[:, None].to(tl.int64) * (2 * KEY_HEADS * D) + head * 2 * D
                both = tl.arange(0, 2 * P)
                tl.store(target + both[None], tl.zeros((BQ, 2 * P), tl.float32), inside(nodes < M, both, 2 * D, 2 * P))
        return
    place_q = block * BQ + tl.arange(0, BQ)
    node_q, own = _own(paths, places, row, L, place_q)
    if tl.max(own.to(tl.int32), 0) > 0:
        dtype = qkv.dtype.element_ty
        q1, q2, c, s = load_rotated(qkv, cos, sin, node_q, own, W, head * D, D2, P2, ROTATE)
        q1, q2 = q1.to(dtype), q2.to(dtype)
        d = tl.arange(0, P)
        at = node_q[:, None].to(tl.int64) * (HEADS * D) + head * D + d[None]
        there = inside(own, d, D, P)
        grad = tl.load(dout + at, there, 0.0)
        delta = tl.sum(grad.to(tl.float32) * tl.load(out + at, there, 0.0).to(tl.float32), 1)
        logs = tl.load(lse + node_q * HEADS + head, own, 0.0)
        g1 = tl.zeros((BQ, P2), tl.float32)
        g2 = tl.zeros((BQ, P2), tl.float32)
        for start in range(_first(block * BQ, window, WINDOW, BK), tl.minimum(L, (block + 1) * BQ), BK):
            place_k = start + tl.arange(0, BK)
            valid = place_k < L
            node_k = tl.load(paths + row * L + place_k, valid, 0)
            k1, k2, _ck, _sk = load_rotated(qkv, cos, sin, node_k, valid, W, (HEADS + key_head) * D, D2, P2, ROTATE)
            k1, k2 = k1.to(dtype), k2.to(dtype)
            values = tl.load(
                qkv + node_k[:, None].to(tl.int64) * W + (HEADS + KEY_HEADS + key_head) * D + d[None],
                inside(valid, d, D, P),
                0.0,
            )
            scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
            scores = capped(tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION) * scale, cap, CAP)
            seen = own[:, None] & _seen(place_q, place_k, window, WINDOW)
            weights = tl.where(seen, tl.exp(tl.minimum(scores - logs[:, None], 0.0)), 0.0)
            ds = weights * (tl.dot(grad, tl.trans(values), input_precision=PRECISION) - delta[:, None])
            ds = _through_cap(ds, scores, cap, CAP) * scale
            g1 = tl.dot(ds.to(dtype), k1, g1, input_precision=PRECISION)
            g2 = tl.dot(ds.to(dtype), k2, g2, input_precision=PRECISION)
        half = tl.arange(0, P2)
        target = dqkv + node_q[:, None].to(tl.int64) * W + head * D + half[None]
        there = inside(own, half, D2, P2)
        g1, g2 = _rotate_back(g1, g2, c, s, ROTATE)
        tl.store(target, g1.to(dqkv.dtype.element_ty), there)
        tl.store(target + D2, g2.to(dqkv.dtype.element_ty), there)


@triton.jit(do_not_specialize=["L"])
def _key_backward_kernel(
    qkv, cos, sin, paths, places, out, lse, dout, dkv, L, scale, window, cap,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr, CAP: tl.constexpr,
    ROTATE: tl.constexpr, WINDOW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, key_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    D: tl.constexpr = 2 * D2
    P: tl.constexpr = 2 * P2
    W: tl.constexpr = (HEADS + 2 * KEY_HEADS) * D
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    dtype = qkv.dtype.element_ty
    d, half = tl.arange(0, P), tl.arange(0, P2)
    place_k = block * BK + tl.arange(0, BK)
    node_k = tl.load(paths + row * L + place_k, place_k < L, 0)
    # Beyond its end a row repeats node 0, which is real only at the root.
    valid = (place_k < L) & ((node_k > 0) | (place_k == 0))
    k1, k2, c, s = load_rotated(qkv, cos, sin, node_k, valid, W, (HEADS + key_head) * D, D2, P2, ROTATE)
    k1, k2 = k1.to(dtype), k2.to(dtype)
    values = tl.load(
        qkv + node_k[:, None].to(tl.int64) * W + (HEADS + KEY_HEADS + key_head) * D + d[None],
        inside(valid, d, D, P), 0.0,
    )  # fmt: skip
    g1 = tl.zeros((BK, P2), tl.float32)
    g2 = tl.zeros((BK, P2), tl.float32)
    gv = tl.zeros((BK, P), tl.float32)
    for start in range(block * BK // BQ * BQ, _last(block * BK + BK, L, window, WINDOW), BQ):
        place_q = start + tl.arange(0, BQ)
        node_q, own = _own(paths, places, row, L, place_q)
        if tl.max(own.to(tl.int32), 0) > 0:
            for member in range(GROUP):
                head = key_head * GROUP + member
                q1, q2, _cq, _sq = load_rotated(qkv, cos, sin, node_q, own, W, head * D, D2, P2, ROTATE)
                q1, q2 = q1.to(dtype), q2.to(dtype)
                at = node_q[:, None].to(tl.int64) * (HEADS * D) + head * D + d[None]
                there = inside(own, d, D, P)
                grad = tl.load(dout + at, there, 0.0)
                delta = tl.sum(grad.to(tl.float32) * tl.load(out + at, there, 0.0).to(tl.float32), 1)
                logs = tl.load(lse + node_q * HEADS + head, own, 0.0)
                scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
                scores = capped(tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION) * scale, cap, CAP)
                seen = own[:, None] & _seen(place_q, place_k, window, WINDOW)
                weights = tl.where(seen, tl.exp(tl.minimum(scores - logs[:, None], 0.0)), 0.0)
                gv = tl.dot(tl.trans(weights.to(dtype)), grad, gv, input_precision=PRECISION)
                ds = weights * (tl.dot(grad, tl.trans(values), input_precision=PRECISION) - delta[:, None])
                ds = _through_cap(ds, scores, cap, CAP) * scale
                ds = tl.trans(ds.to(dtype))
                g1 = tl.dot(ds, q1, g1, input_precision=PRECISION)
                g2 = tl.dot(ds, q2, g2, input_precision=PRECISION)
    target = dkv + node_k[:, None].to(tl.int64) * (2 * KEY_HEADS * D) + key_head * D
    g1, g2 = _rotate_back(g1, g2, c, s, ROTATE)
    there = inside(valid, half, D2, P2)
    tl.atomic_add(target + half[None], g1, there)
    tl.atomic_add(target + D2 + half[None], g2, there)
    tl.atomic_add(target + KEY_HEADS * D + d[None], gv, inside(valid, d, D, P))


BLOCK = 32  # places at a time: a row computes the nodes of its own completion, which are about that many
# Numbers of rows, nodes and places are not specialised on: kernels would be compiled anew for those that 16 divides.


def precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _tile(qkv: Tensor, form: Form, window: int, block: int) -> dict[str, object]:
    # A second stage of loads would not fit beside tiles of wide heads.
    stages = 2 if form.size * qkv.element_size() <= 512 else 1
    return {
        **form.options, "WINDOW": window > 0, "BQ": block, "BK": block, "PRECISION": precision(qkv),
        "num_stages": stages,
    }  # fmt: skip


def _window(form: Form, length: int) -> int:
    """0 where it holds all of every row: one kernel less to compile."""
    return form.window if form.window < length else 0


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, paths_RL: Tensor, places_M: Tensor, form: Form
) -> tuple[Tensor, Tensor]:
    """(out (M, heads · D), lse (M, heads) float32). Nodes that no row owns get 0. cos, sin (M, D) are read only where
    the form has the kernels rotate."""
    nodes, heads = qkv.shape[0], form.heads
    rows, length = paths_RL.shape
    out = qkv.new_empty(nodes, heads * form.size)
    lse = torch.empty(nodes, heads, dtype=torch.float32, device=qkv.device)
    window = _window(form, length)
    _forward_kernel[(triton.cdiv(length, BLOCK), heads, rows + 1)](
        qkv, cos, sin, paths_RL, places_M, out, lse, rows, length, nodes, form.scale, window, form.cap,
        **_tile(qkv, form, window, BLOCK), num_warps=4 if form.size <= 128 else 8,
    )  # fmt: skip
    return out, lse


def attend_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor,
    paths_RL: Tensor, places_M: Tensor, form: Form,
) -> Tensor:  # fmt: skip
    """Gradient of qkv, before the rotation where the kernels do it."""
    nodes, heads, key_heads = qkv.shape[0], form.heads, form.key_heads
    rows, length = paths_RL.shape
    dqkv = torch.empty_like(qkv)
    dkv = torch.empty(nodes, 2 * key_heads * form.size, dtype=torch.float32, device=qkv.device)
    shared = (qkv, cos, sin, paths_RL, places_M, out, lse, dout)
    window, block = _window(form, length), BLOCK if form.size <= 128 else BLOCK // 2
    numbers, options = (form.scale, window, form.cap), _tile(qkv, form, window, block)
    count = triton.cdiv(length, block)
    # Eight warps, or the three sums of the second kernel would not fit into registers; of wide heads half as many
    # places at a time for the same reason, which also halves what the compiler has to do.
    _query_backward_kernel[(count, heads, rows + 1)](
        *shared, dqkv, dkv, rows, length, nodes, *numbers, **options, num_warps=4 if form.size <= 128 else 8
    )
    _key_backward_kernel[(count, key_heads, rows)](*shared, dkv, length, *numbers, **options, num_warps=8)
    dqkv[:, heads * form.size :] = dkv
    return dqkv
