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


class HeadNorms(NamedTuple):
    """The RMS norms of queries and keys (Zhang & Sennrich 2019, arXiv 1910.07467): weights (D,) for a norm of each head
    (Qwen 3, Gemma 3), or (heads · D,) and (key heads · D,) for one over all heads of a token (OLMo 2)."""

    query: Tensor
    key: Tensor
    eps: float
    offset: float
    """What is added to the weights: 1 in Gemma."""


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
    norms: HeadNorms | None = None
    """Those of each head that decoding computes as it loads it, before it is rotated. Attention over a trie, where many
    rows read a node's key, would compute the norm of each again and again."""

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
def _own(paths, places, row, L, ALL: tl.constexpr):
    """(first, one past the last) of the places whose nodes the row computes: those after what it shares with the row
    before it in the trie. (L, 0) where it shares everything."""
    place = tl.arange(0, ALL)
    nodes = tl.load(paths + row * L + place, place < L, 0)
    own = (place < L) & (tl.load(places + nodes, place < L, -1) == row * L + place)
    return tl.min(tl.where(own, place, L), 0), tl.max(tl.where(own, place + 1, 0), 0)


@triton.jit
def _clear_spare(paths, places, out, M, width, block, BLOCK: tl.constexpr, SIZE: tl.constexpr, P: tl.constexpr):
    """Zeros for the nodes among these that no row computes, so that nothing undefined enters a product."""
    nodes = block * BLOCK + tl.arange(0, BLOCK)
    real = nodes < M
    reached = tl.load(paths + tl.load(places + nodes, real, 0), real, 0) == nodes
    d = tl.arange(0, P)
    zeros = tl.zeros((BLOCK, P), out.dtype.element_ty)
    target = out + nodes[:, None].to(tl.int64) * width + d[None]
    tl.store(target, zeros, inside(real & ~reached, d, SIZE, P))


@triton.jit(do_not_specialize=["R", "L", "M"])
def _forward_kernel(
    qkv, cos, sin, paths, places, out, lse, R, L, M, scale, window, cap,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr, CAP: tl.constexpr,
    ROTATE: tl.constexpr, WINDOW: tl.constexpr, ALL: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    D: tl.constexpr = 2 * D2
    P: tl.constexpr = 2 * P2
    W: tl.constexpr = (HEADS + 2 * KEY_HEADS) * D
    key_head = head // (HEADS // KEY_HEADS)
    if row >= R:
        _clear_spare(paths, places, out + head * D, M, HEADS * D, (row - R) * tl.num_programs(0) + block, BQ, D, P)
        return
    first, last = _own(paths, places, row, L, ALL)
    first += block * BQ
    if first < last:
        place_q = first + tl.arange(0, BQ)
        own = place_q < last
        node_q = tl.load(paths + row * L + place_q, own, 0)
        dtype = qkv.dtype.element_ty
        q1, q2, _c, _s = load_rotated(qkv, cos, sin, node_q, own, W, head * D, D2, P2, ROTATE)
        q1, q2 = q1.to(dtype), q2.to(dtype)
        d = tl.arange(0, P)
        top = tl.full((BQ,), float("-inf"), tl.float32)
        total = tl.zeros((BQ,), tl.float32)
        acc = tl.zeros((BQ, P), tl.float32)
        for start in range(_first(first, window, WINDOW, BK), tl.minimum(last, first + BQ), BK):
            place_k = start + tl.arange(0, BK)
            valid = place_k < last
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
def _backward_kernel(
    qkv, cos, sin, paths, places, out, lse, dout, dqkv, dkv, R, L, M, scale, window, cap,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D2: tl.constexpr, P2: tl.constexpr, CAP: tl.constexpr,
    ROTATE: tl.constexpr, WINDOW: tl.constexpr, ALL: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    D: tl.constexpr = 2 * D2
    P: tl.constexpr = 2 * P2
    W: tl.constexpr = (HEADS + 2 * KEY_HEADS) * D
    key_head = head // (HEADS // KEY_HEADS)
    if row >= R:
        _clear_spare(paths, places, dqkv + head * D, M, W, (row - R) * tl.num_programs(0) + block, BQ, D, P)
        return
    first, last = _own(paths, places, row, L, ALL)
    first += block * BQ
    if first < last:
        place_q = first + tl.arange(0, BQ)
        own = place_q < last
        node_q = tl.load(paths + row * L + place_q, own, 0)
        dtype = qkv.dtype.element_ty
        q1, q2, c, s = load_rotated(qkv, cos, sin, node_q, own, W, head * D, D2, P2, ROTATE)
        q1, q2 = q1.to(dtype), q2.to(dtype)
        d, half = tl.arange(0, P), tl.arange(0, P2)
        at = node_q[:, None].to(tl.int64) * (HEADS * D) + head * D + d[None]
        there = inside(own, d, D, P)
        grad = tl.load(dout + at, there, 0.0)
        delta = tl.sum(grad.to(tl.float32) * tl.load(out + at, there, 0.0).to(tl.float32), 1)
        logs = tl.load(lse + node_q * HEADS + head, own, 0.0)
        g1 = tl.zeros((BQ, P2), tl.float32)
        g2 = tl.zeros((BQ, P2), tl.float32)
        for start in range(_first(first, window, WINDOW, BK), tl.minimum(last, first + BQ), BK):
            place_k = start + tl.arange(0, BK)
            valid = place_k < last
            node_k = tl.load(paths + row * L + place_k, valid, 0)
            k1, k2, ck, sk = load_rotated(qkv, cos, sin, node_k, valid, W, (HEADS + key_head) * D, D2, P2, ROTATE)
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
            ds = (_through_cap(ds, scores, cap, CAP) * scale).to(dtype)
            g1 = tl.dot(ds, k1, g1, input_precision=PRECISION)
            g2 = tl.dot(ds, k2, g2, input_precision=PRECISION)
            h1 = tl.dot(tl.trans(ds), q1, input_precision=PRECISION)
            h2 = tl.dot(tl.trans(ds), q2, input_precision=PRECISION)
            h1, h2 = _rotate_back(h1, h2, ck, sk, ROTATE)
            gv = tl.dot(tl.trans(weights.to(dtype)), grad, input_precision=PRECISION)
            target = dkv + node_k[:, None].to(tl.int64) * (2 * KEY_HEADS * D) + key_head * D
            part = inside(valid, half, D2, P2)
            tl.atomic_add(target + half[None], h1, part, sem="relaxed")
            tl.atomic_add(target + D2 + half[None], h2, part, sem="relaxed")
            tl.atomic_add(target + KEY_HEADS * D + d[None], gv, inside(valid, d, D, P), sem="relaxed")
        target = dqkv + node_q[:, None].to(tl.int64) * W + head * D + half[None]
        there = inside(own, half, D2, P2)
        g1, g2 = _rotate_back(g1, g2, c, s, ROTATE)
        tl.store(target, g1.to(dqkv.dtype.element_ty), there)
        tl.store(target + D2, g2.to(dqkv.dtype.element_ty), there)


class Tiles(NamedTuple):
    """How a kernel is cut: queries and keys at a time, warps, stages of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


# Numbers of rows, nodes and places are not specialised on: kernels would be compiled anew for those that 16 divides.
# Tiles: the best of 14 measured on an H200 in shapes of SmolLM2, Qwen 3, Llama 3 and Gemma.
def forward_tiles(form: Form, dtype: torch.dtype) -> Tiles:
    if dtype == torch.float32:  # of which a second stage would not fit
        return Tiles(32, 32, 4 if form.size <= 128 else 8, 1)
    return Tiles(64, 32, 4, 1) if form.size <= 128 else Tiles(32, 32, 4, 2)


def backward_tiles(form: Form, dtype: torch.dtype) -> Tiles:
    if dtype == torch.float32:  # half as many of wide heads, or four of their tiles would not fit
        return Tiles(32, 32, 4, 1) if form.size <= 128 else Tiles(16, 16, 8, 1)
    return Tiles(32, 32, 4, 2) if form.size <= 128 else Tiles(32, 32, 8, 1)


def precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _grid(trie: Tensor, nodes: int, form: Form, tiles: Tiles) -> tuple[int, int, int]:
    """Blocks of a row's places, heads, rows; and as many more as it takes to clear what no row computes."""
    rows, length = trie.shape
    blocks = triton.cdiv(length, tiles.queries)
    return blocks, form.heads, rows + triton.cdiv(nodes, blocks * tiles.queries)


def _options(qkv: Tensor, form: Form, length: int, tiles: Tiles) -> dict[str, object]:
    return {
        **form.options, "WINDOW": _window(form, length) > 0, "ALL": triton.next_power_of_2(length),
        "BQ": tiles.queries, "BK": tiles.keys, "PRECISION": precision(qkv), "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }  # fmt: skip


def _window(form: Form, length: int) -> int:
    """0 where it holds all of every row: one kernel less to compile."""
    return form.window if form.window < length else 0


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, paths_RL: Tensor, places_M: Tensor, form: Form, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out (M, heads · D), lse (M, heads) float32). Nodes that no row owns get 0. cos, sin (M, D) are read only where
    the form has the kernels rotate. `out`: where that is to be put, if anywhere."""
    nodes, (rows, length) = qkv.shape[0], paths_RL.shape
    out = qkv.new_empty(nodes, form.heads * form.size) if out is None else out
    lse = torch.empty(nodes, form.heads, dtype=torch.float32, device=qkv.device)
    tiles = forward_tiles(form, qkv.dtype)
    _forward_kernel[_grid(paths_RL, nodes, form, tiles)](
        qkv, cos, sin, paths_RL, places_M, out, lse, rows, length, nodes, form.scale,
        _window(form, length), form.cap, **_options(qkv, form, length, tiles),
    )  # fmt: skip
    return out, lse


def attend_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor,
    paths_RL: Tensor, places_M: Tensor, form: Form,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient of qkv, whose keys and values are not filled in, theirs (M, 2 · key heads · D) in float32): before the
    rotation where the kernels do it. `heads.prepare_backward` or `whole` goes on with them."""
    nodes, (rows, length) = qkv.shape[0], paths_RL.shape
    dqkv, tiles = torch.empty_like(qkv), backward_tiles(form, qkv.dtype)
    dkv = torch.zeros(nodes, 2 * form.key_heads * form.size, dtype=torch.float32, device=qkv.device)
    _backward_kernel[_grid(paths_RL, nodes, form, tiles)](
        qkv, cos, sin, paths_RL, places_M, out, lse, dout, dqkv, dkv, rows, length, nodes, form.scale,
        _window(form, length), form.cap, **_options(qkv, form, length, tiles),
    )  # fmt: skip
    return dqkv, dkv


def whole(dqkv: Tensor, dkv: Tensor) -> Tensor:
    """The gradient of qkv with that of keys and values filled in."""
    dqkv[:, -dkv.shape[1] :] = dkv
    return dqkv
