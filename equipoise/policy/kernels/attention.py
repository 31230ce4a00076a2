"""Attention with rotary embedding: over a packed trie, forward and backward, and for one token over a static cache.

Queries, keys and values come as one projection's output qkv (M, (heads + 2·key heads) · D) before rotary embedding,
which is applied as they are loaded; nothing is gathered, transposed or padded in memory. Flash attention (Dao et al.
2022, arXiv 2205.14135): online softmax forward, scores recomputed backward.

Trie: M nodes, R rows of at most L nodes, paths_RL the nodes of each row, places_M one place in the flattened paths for
each node, which says which row computes it (`trie.Trie`). A node's key and value serve every row through it, so their
gradients are summed over rows with atomic additions in float32: equal to rounding, not bit for bit, from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _load_rotated(qkv, cos, sin, nodes, valid, width, offset, D2: tl.constexpr):
    """Both halves of one head's vectors at `nodes`, rotated, in float32."""
    d = tl.arange(0, D2)
    inside = valid[:, None]
    base = qkv + nodes[:, None].to(tl.int64) * width + offset + d[None]
    first = tl.load(base, inside, 0.0).to(tl.float32)
    second = tl.load(base + D2, inside, 0.0).to(tl.float32)
    angle = nodes[:, None] * (2 * D2) + d[None]
    c = tl.load(cos + angle, inside, 0.0).to(tl.float32)
    s = tl.load(sin + angle, inside, 0.0).to(tl.float32)
    first, second = _rotate(first, second, c, s)
    return first, second, c, s


@triton.jit
def _own(paths, places, row, L, place):
    """Nodes at these places of a row, and whether the row is the one that computes them."""
    nodes = tl.load(paths + row * L + place, place < L, 0)
    own = (place < L) & (tl.load(places + nodes) == row * L + place)
    return nodes, own


@triton.jit
def _clear_spare(paths, places, out, M, width, block, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Zeros for the nodes among these that no row computes, so that nothing undefined enters a product."""
    for start in range(block * BLOCK, M, tl.num_programs(0) * BLOCK):
        nodes = start + tl.arange(0, BLOCK)
        inside = nodes < M
        reached = tl.load(paths + tl.load(places + nodes, inside, 0)) == nodes
        spare = (inside & ~reached)[:, None]
        zeros = tl.zeros((BLOCK, SIZE), out.dtype.element_ty)
        tl.store(out + nodes[:, None].to(tl.int64) * width + tl.arange(0, SIZE)[None], zeros, spare)


@triton.jit
def _forward_kernel(
    qkv, cos, sin, paths, places, out, lse, R, L, M, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D2: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    D: tl.constexpr = 2 * D2
    W: tl.constexpr = (HEADS + 2 * KEY_HEADS) * D
    key_head = head // (HEADS // KEY_HEADS)
    if row == R:
        _clear_spare(paths, places, out + head * D, M, HEADS * D, block, BQ, D)
        return
    place_q = block * BQ + tl.arange(0, BQ)
    node_q, own = _own(paths, places, row, L, place_q)
    if tl.max(own.to(tl.int32), 0) > 0:
        dtype = qkv.dtype.element_ty
        q1, q2, _c, _s = _load_rotated(qkv, cos, sin, node_q, own, W, head * D, D2)
        q1, q2 = q1.to(dtype), q2.to(dtype)
        d = tl.arange(0, D)
        top = tl.full((BQ,), float("-inf"), tl.float32)
        total = tl.zeros((BQ,), tl.float32)
        acc = tl.zeros((BQ, D), tl.float32)
        for start in range(0, tl.minimum(L, (block + 1) * BQ), BK):
            place_k = start + tl.arange(0, BK)
            valid = place_k < L
            node_k = tl.load(paths + row * L + place_k, valid, 0)
            k1, k2, _ck, _sk = _load_rotated(qkv, cos, sin, node_k, valid, W, (HEADS + key_head) * D, D2)
            values = tl.load(
                qkv + node_k[:, None].to(tl.int64) * W + (HEADS + KEY_HEADS + key_head) * D + d[None],
                valid[:, None],
                0.0,
            )
            scores = tl.dot(q1, tl.trans(k1.to(dtype)), input_precision=PRECISION)
            scores = tl.dot(q2, tl.trans(k2.to(dtype)), scores, input_precision=PRECISION) * scale
            scores = tl.where(place_k[None] <= place_q[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp(scores - new_top[:, None])
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.sum(weights, 1)
            acc = tl.dot(weights.to(dtype), values, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
        target = out + node_q[:, None].to(tl.int64) * (HEADS * D) + head * D + d[None]
        tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), own[:, None])
        tl.store(lse + node_q * HEADS + head, top + tl.log(total), own)


@triton.jit
def _query_backward_kernel(
    qkv, cos, sin, paths, places, out, lse, dout, dqkv, dkv, R, L, M, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D2: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    D: tl.constexpr = 2 * D2
    W: tl.constexpr = (HEADS + 2 * KEY_HEADS) * D
    key_head = head // (HEADS // KEY_HEADS)
    if row == R:
        _clear_spare(paths, places, dqkv + head * D, M, W, block, BQ, D)
        if head < KEY_HEADS:  # for the sums that `_key_backward_kernel` will add to
            for start in range(block * BQ, M, tl.num_programs(0) * BQ):
                nodes = start + tl.arange(0, BQ)
                target = dkv + nodes[:, None].to(tl.int64) * (2 * KEY_HEADS * D) + head * 2 * D
                both = tl.arange(0, 2 * D)[None]
                tl.store(target + both, tl.zeros((BQ, 2 * D), tl.float32), (nodes < M)[:, None])
        return
    place_q = block * BQ + tl.arange(0, BQ)
    node_q, own = _own(paths, places, row, L, place_q)
    if tl.max(own.to(tl.int32), 0) > 0:
        dtype = qkv.dtype.element_ty
        q1, q2, c, s = _load_rotated(qkv, cos, sin, node_q, own, W, head * D, D2)
        q1, q2 = q1.to(dtype), q2.to(dtype)
        d = tl.arange(0, D)
        at = node_q[:, None].to(tl.int64) * (HEADS * D) + head * D + d[None]
        grad = tl.load(dout + at, own[:, None], 0.0)
        delta = tl.sum(grad.to(tl.float32) * tl.load(out + at, own[:, None], 0.0).to(tl.float32), 1)
        logs = tl.load(lse + node_q * HEADS + head, own, 0.0)
        g1 = tl.zeros((BQ, D2), tl.float32)
        g2 = tl.zeros((BQ, D2), tl.float32)
        for start in range(0, tl.minimum(L, (block + 1) * BQ), BK):
            place_k = start + tl.arange(0, BK)
            valid = place_k < L
            node_k = tl.load(paths + row * L + place_k, valid, 0)
            k1, k2, _ck, _sk = _load_rotated(qkv, cos, sin, node_k, valid, W, (HEADS + key_head) * D, D2)
            k1, k2 = k1.to(dtype), k2.to(dtype)
            values = tl.load(
                qkv + node_k[:, None].to(tl.int64) * W + (HEADS + KEY_HEADS + key_head) * D + d[None],
                valid[:, None],
                0.0,
            )
            scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION) * scale
            seen = own[:, None] & (place_k[None] <= place_q[:, None])
            weights = tl.where(seen, tl.exp(tl.minimum(scores - logs[:, None], 0.0)), 0.0)
            ds = weights * (tl.dot(grad, tl.trans(values), input_precision=PRECISION) - delta[:, None]) * scale
            g1 = tl.dot(ds.to(dtype), k1, g1, input_precision=PRECISION)
            g2 = tl.dot(ds.to(dtype), k2, g2, input_precision=PRECISION)
        half = tl.arange(0, D2)
        target = dqkv + node_q[:, None].to(tl.int64) * W + head * D + half[None]
        tl.store(target, (g1 * c + g2 * s).to(dqkv.dtype.element_ty), own[:, None])
        tl.store(target + D2, (g2 * c - g1 * s).to(dqkv.dtype.element_ty), own[:, None])


@triton.jit
def _key_backward_kernel(
    qkv, cos, sin, paths, places, out, lse, dout, dkv, L, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D2: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block, key_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    D: tl.constexpr = 2 * D2
    W: tl.constexpr = (HEADS + 2 * KEY_HEADS) * D
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    dtype = qkv.dtype.element_ty
    d, half = tl.arange(0, D), tl.arange(0, D2)
    place_k = block * BK + tl.arange(0, BK)
    node_k = tl.load(paths + row * L + place_k, place_k < L, 0)
    # Beyond its end a row repeats node 0, which is real only at the root.
    valid = (place_k < L) & ((node_k > 0) | (place_k == 0))
    k1, k2, c, s = _load_rotated(qkv, cos, sin, node_k, valid, W, (HEADS + key_head) * D, D2)
    k1, k2 = k1.to(dtype), k2.to(dtype)
    values = tl.load(
        qkv + node_k[:, None].to(tl.int64) * W + (HEADS + KEY_HEADS + key_head) * D + d[None], valid[:, None], 0.0
    )
    g1 = tl.zeros((BK, D2), tl.float32)
    g2 = tl.zeros((BK, D2), tl.float32)
    gv = tl.zeros((BK, D), tl.float32)
    for start in range(block * BK // BQ * BQ, L, BQ):
        place_q = start + tl.arange(0, BQ)
        node_q, own = _own(paths, places, row, L, place_q)
        if tl.max(own.to(tl.int32), 0) > 0:
            for member in range(GROUP):
                head = key_head * GROUP + member
                q1, q2, _cq, _sq = _load_rotated(qkv, cos, sin, node_q, own, W, head * D, D2)
                q1, q2 = q1.to(dtype), q2.to(dtype)
                at = node_q[:, None].to(tl.int64) * (HEADS * D) + head * D + d[None]
                grad = tl.load(dout + at, own[:, None], 0.0)
                delta = tl.sum(grad.to(tl.float32) * tl.load(out + at, own[:, None], 0.0).to(tl.float32), 1)
                logs = tl.load(lse + node_q * HEADS + head, own, 0.0)
                scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
                scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION) * scale
                seen = own[:, None] & (place_k[None] <= place_q[:, None])
                weights = tl.where(seen, tl.exp(tl.minimum(scores - logs[:, None], 0.0)), 0.0)
                gv = tl.dot(tl.trans(weights.to(dtype)), grad, gv, input_precision=PRECISION)
                ds = weights * (tl.dot(grad, tl.trans(values), input_precision=PRECISION) - delta[:, None]) * scale
                ds = tl.trans(ds.to(dtype))
                g1 = tl.dot(ds, q1, g1, input_precision=PRECISION)
                g2 = tl.dot(ds, q2, g2, input_precision=PRECISION)
    target = dkv + node_k[:, None].to(tl.int64) * (2 * KEY_HEADS * D) + key_head * D
    tl.atomic_add(target + half[None], g1 * c + g2 * s, valid[:, None])
    tl.atomic_add(target + D2 + half[None], g2 * c - g1 * s, valid[:, None])
    tl.atomic_add(target + KEY_HEADS * D + d[None], gv, valid[:, None])


BLOCK = 32  # places at a time: a row computes the nodes of its own completion, which are about that many


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def attend(
    qkv: Tensor, cos: Tensor, sin: Tensor, paths_RL: Tensor, places_M: Tensor, heads: int, key_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (M, heads · D), lse (M, heads) float32). Nodes that no row owns get 0."""
    nodes, size = qkv.shape[0], qkv.shape[1] // (heads + 2 * key_heads)
    rows, length = paths_RL.shape
    out = qkv.new_empty(nodes, heads * size)
    lse = torch.empty(nodes, heads, dtype=torch.float32, device=qkv.device)
    _forward_kernel[(triton.cdiv(length, BLOCK), heads, rows + 1)](
        qkv, cos, sin, paths_RL, places_M, out, lse, rows, length, nodes, scale,
        HEADS=heads, KEY_HEADS=key_heads, D2=size // 2, BQ=BLOCK, BK=BLOCK, PRECISION=_precision(qkv),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out, lse


def attend_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cos: Tensor, sin: Tensor,
    paths_RL: Tensor, places_M: Tensor, heads: int, key_heads: int, scale: float,
) -> Tensor:  # fmt: skip
    """Gradient of qkv, before rotary embedding."""
    nodes, size = qkv.shape[0], qkv.shape[1] // (heads + 2 * key_heads)
    rows, length = paths_RL.shape
    dqkv = torch.empty_like(qkv)
    dkv = torch.empty(nodes, 2 * key_heads * size, dtype=torch.float32, device=qkv.device)
    shared = (qkv, cos, sin, paths_RL, places_M, out, lse, dout)
    options = {
        "HEADS": heads, "KEY_HEADS": key_heads, "D2": size // 2, "BQ": BLOCK, "BK": BLOCK,
        "PRECISION": _precision(qkv), "num_stages": 2,
    }  # fmt: skip
    count = triton.cdiv(length, BLOCK)
    # Eight warps, or the three sums of the second kernel would not fit into registers.
    _query_backward_kernel[(count, heads, rows + 1)](
        *shared, dqkv, dkv, rows, length, nodes, scale, **options, num_warps=4
    )
    _key_backward_kernel[(count, key_heads, rows)](*shared, dkv, length, scale, **options, num_warps=8)
    dqkv[:, heads * size :] = dkv
    return dqkv


@triton.jit
def _fill_kernel(
    qkv,
    cos,
    sin,
    fill,
    cache,
    B,
    P,
    S,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    D2: tl.constexpr,
    BP: tl.constexpr,
):
    block, key_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    D: tl.constexpr = 2 * D2
    W: tl.constexpr = (HEADS + 2 * KEY_HEADS) * D
    place = block * BP + tl.arange(0, BP)
    valid = place < P
    nodes = tl.load(fill + row * P + place, valid, 0)
    k1, k2, _c, _s = _load_rotated(qkv, cos, sin, nodes, valid, W, (HEADS + key_head) * D, D2)
    d, half = tl.arange(0, D), tl.arange(0, D2)
    values = tl.load(
        qkv + nodes[:, None].to(tl.int64) * W + (HEADS + KEY_HEADS + key_head) * D + d[None], valid[:, None], 0.0
    )
    dtype = cache.dtype.element_ty
    target = cache + (row * KEY_HEADS + key_head) * S * D + place[:, None] * D
    tl.store(target + half[None], k1.to(dtype), valid[:, None])
    tl.store(target + D2 + half[None], k2.to(dtype), valid[:, None])
    tl.store(target + (row * 0 + B) * KEY_HEADS * S * D + d[None], values, valid[:, None])


def fill(qkv: Tensor, cos: Tensor, sin: Tensor, fill_BP: Tensor, cache: Tensor, heads: int, key_heads: int) -> None:
    """Start each row's cache (2, B, key heads, S, D) with the keys and values of its nodes, places 0 to P−1."""
    rows, places = fill_BP.shape
    size = cache.shape[-1]
    _fill_kernel[(triton.cdiv(places, 32), key_heads, rows)](
        qkv,
        cos,
        sin,
        fill_BP,
        cache,
        rows,
        places,
        cache.shape[3],
        HEADS=heads,
        KEY_HEADS=key_heads,
        D2=size // 2,
        BP=32,
    )


@triton.jit
def _decode_kernel(
    qkv, cos, sin, cache, hidden, slot_, out, B, S, scale,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D2: tl.constexpr, BG: tl.constexpr, BS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    key_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    D: tl.constexpr = 2 * D2
    W: tl.constexpr = (HEADS + 2 * KEY_HEADS) * D
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    dtype = qkv.dtype.element_ty
    slot = tl.load(slot_)
    d, half, member = tl.arange(0, D), tl.arange(0, D2), tl.arange(0, BG)
    c = tl.load(cos + row * D + half).to(tl.float32)
    s = tl.load(sin + row * D + half).to(tl.float32)
    at = qkv + row * W + (key_head * GROUP + member[:, None]) * D + half[None]
    wanted = member[:, None] < GROUP
    q1, q2 = _rotate(
        tl.load(at, wanted, 0.0).to(tl.float32), tl.load(at + D2, wanted, 0.0).to(tl.float32), c[None], s[None]
    )
    q1, q2 = q1.to(dtype), q2.to(dtype)
    new = qkv + row * W + (HEADS + key_head) * D + half
    k1, k2 = _rotate(tl.load(new).to(tl.float32), tl.load(new + D2).to(tl.float32), c, s)
    k1, k2 = k1.to(dtype), k2.to(dtype)
    value = tl.load(qkv + row * W + (HEADS + KEY_HEADS + key_head) * D + d)
    keys = cache + (row * KEY_HEADS + key_head) * S * D
    values = keys + (row * 0 + B) * KEY_HEADS * S * D  # in 64 bits, as `row` is
    tl.store(keys + slot * D + half, k1)
    tl.store(keys + slot * D + D2 + half, k2)
    tl.store(values + slot * D + d, value)
    # The token itself comes from registers: what was just stored need not be visible yet.
    top = tl.sum(q1.to(tl.float32) * k1.to(tl.float32)[None], 1)
    top = (top + tl.sum(q2.to(tl.float32) * k2.to(tl.float32)[None], 1)) * scale
    total = tl.full((BG,), 1.0, tl.float32)
    acc = tl.zeros((BG, D), tl.float32) + value.to(tl.float32)[None]
    for start in range(0, slot, BS):
        place = start + tl.arange(0, BS)
        valid = place < slot
        off = tl.load(hidden + row * S + place, valid, 1).to(tl.int32)
        seen = valid & (off == 0)
        first = tl.load(keys + place[:, None] * D + half[None], seen[:, None], 0.0)
        second = tl.load(keys + place[:, None] * D + D2 + half[None], seen[:, None], 0.0)
        old = tl.load(values + place[:, None] * D + d[None], seen[:, None], 0.0)
        scores = tl.dot(q1, tl.trans(first), input_precision=PRECISION)
        scores = tl.dot(q2, tl.trans(second), scores, input_precision=PRECISION) * scale
        scores = tl.where(seen[None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(dtype), old, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    target = out + row * (HEADS * D) + (key_head * GROUP + member[:, None]) * D + d[None]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), wanted)


def decode(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, hidden_BS: Tensor, slot: Tensor,
    heads: int, key_heads: int, scale: float,
) -> Tensor:  # fmt: skip
    """Attention of one new token a row, qkv (B, ·), whose key and value go to place `slot` (1,) of the cache, later
    places being empty: (B, heads · D). hidden_BS: True where an earlier place holds nothing for the row."""
    rows, size = qkv.shape[0], cache.shape[-1]
    out = qkv.new_empty(rows, heads * size)
    _decode_kernel[(key_heads, rows)](
        qkv, cos, sin, cache, hidden_BS, slot, out, rows, cache.shape[3], scale,
        HEADS=heads, KEY_HEADS=key_heads, D2=size // 2, BG=max(16, triton.next_power_of_2(heads // key_heads)), BS=32,
        PRECISION=_precision(qkv), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
