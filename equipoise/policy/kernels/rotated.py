"""Products with rotated int8 weights W = q · scale (`rounding`): activations are rotated and rounded as they come.

x·Wᵀ sums integers, so that it is the same whatever else is computed beside a row. grad·W sums over N: tensor cores want
both 8-bit factors to lie along the sum, so q is transposed first, into FP8, by a stream of its own while the product
before it is at work, into memory that is used again. W's scales lie along that sum, so they go into the gradient before
that is rounded; the result is rotated back.

On the way back the product knows no scales, with which cuBLAS has its fastest kernels: what its rows are to be
multiplied by goes into the next pass over the result.

Shapes: M rows, K inputs and N outputs of a layer; K is rotated in groups of G. Results have x's dtype.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from equipoise.policy.hadamard import group_of
from equipoise.policy.kernels.rounding import AS_FP8, FP8, Rows, as_fp8, quantise, signs


class Adapters(NamedTuple):
    """What LoRA adds to a product: scale · low·Bᵀ, of up to three projections side by side in N, each of which reads
    its own R columns of low (M, projections · R)."""

    low: Tensor
    b_NR: Tensor
    sizes: tuple[int, ...]
    """The projections' widths."""
    scale: float


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    x, q, x_scale, q_scale, low, b, more, out, M, N, K, first, second, scale,
    RANK: tl.constexpr, PARTS: tl.constexpr, RB: tl.constexpr, MORE: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Programs that follow each other share weights: all tiles of rows, WIDE tiles of columns at a time.
    program, tall = tl.program_id(0), tl.cdiv(M, BM)
    begin = program // (WIDE * tall) * WIDE
    wide = tl.minimum(tl.cdiv(N, BN) - begin, WIDE)
    place = program % (WIDE * tall)
    start = (begin + place % wide) * BN
    rows, columns, inner = place // wide * BM + tl.arange(0, BM), start + tl.arange(0, BN), tl.arange(0, BK)
    # Rows and columns that are not there are computed as others, and not stored.
    at_x = x + (rows % M)[:, None].to(tl.int64) * K + inner[None]
    at_q = q + (columns % N)[None].to(tl.int64) * K + inner[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    for done in range(0, K, BK):
        if EVEN:
            acc = tl.dot(tl.load(at_x), tl.load(at_q), acc, out_dtype=tl.int32)
        else:
            left = K - done
            one, other = tl.load(at_x, inner[None] < left, 0), tl.load(at_q, inner[:, None] < left, 0)
            acc = tl.dot(one, other, acc, out_dtype=tl.int32)
        at_x += BK
        at_q += BK
    total = acc.to(tl.float32) * tl.load(x_scale + rows % M)[:, None] * tl.load(q_scale + columns % N)[None]
    inside = (rows < M)[:, None] & (columns < N)[None]
    if RANK > 0:
        part = (start >= first).to(tl.int32) + (start >= second).to(tl.int32)
        ranks = tl.arange(0, RB)
        one = tl.load(
            low + rows[:, None] * (PARTS * RANK) + part * RANK + ranks[None],
            (rows < M)[:, None] & (ranks < RANK)[None], 0.0,
        )  # fmt: skip
        other = tl.load(b + columns[None] * RANK + ranks[:, None], (columns < N)[None] & (ranks < RANK)[:, None], 0.0)
        total += tl.dot(one, other, input_precision="ieee") * scale
    to = rows[:, None].to(tl.int64) * N + columns[None]
    if MORE:
        total += tl.load(more + to, inside, 0.0).to(tl.float32)
    tl.store(out + to, total.to(out.dtype.element_ty), inside)


@functools.cache
def _tiles_that_go_deep(device: torch.device) -> int:
    """How many tiles of few rows may read six steps ahead, one on each processor: none where shared memory is small."""
    if device.type != "cuda":
        return 0
    card = torch.cuda.get_device_properties(device)
    return card.multi_processor_count if card.shared_memory_per_block_optin >= 6 * (64 + 32) * 256 else 0


def _tile(rows: int, outputs: int, width: int, device: torch.device) -> dict[str, int]:
    """The fastest found on an H200; the sums are of integers, and so the same in all."""
    if rows <= 16:
        return {"BM": 16, "BN": 64, "BK": 128, "num_warps": 4, "num_stages": 4}
    if rows <= 64 and outputs > 4 * width:
        return {"BM": 64, "BN": 128, "BK": 128, "num_warps": 4, "num_stages": 4}
    if rows <= 64:
        deep = triton.cdiv(outputs, 32) <= _tiles_that_go_deep(device)
        return {"BM": 64, "BN": 32, "BK": 256, "num_warps": 4, "num_stages": 6 if deep else 4}
    return {"BM": 128, "BN": 128, "BK": 128, "num_warps": 4, "num_stages": 3}


def multiply(
    x: Rows, q_NK: Tensor, scale_N: Tensor, dtype: torch.dtype, adapters: Adapters | None = None,
    more_MN: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x·Wᵀ + more (M, N) of rotated rows x, with what adapters add; in `out` where that is given."""
    (rows, width), outputs, scale = x.q.shape, len(q_NK), x.scale
    out = torch.empty(rows, outputs, dtype=dtype, device=scale.device) if out is None else out
    low, b, sizes, by = adapters or Adapters(out, out, (outputs,), 1.0)
    rank = b.shape[1] if adapters else 0
    tile = _tile(rows, outputs, width, scale.device)
    while any(size % tile["BN"] for size in sizes[:-1]):  # no tile may reach into two projections
        tile["BN"] //= 2
    bounds = [sum(sizes[:i]) for i in (1, 2)]
    _product_kernel[(triton.cdiv(rows, tile["BM"]) * triton.cdiv(outputs, tile["BN"]),)](
        x.q, q_NK, scale, scale_N, low, b, out if more_MN is None else more_MN, out, rows, outputs, width, *bounds, by,
        RANK=rank, PARTS=len(sizes), RB=max(16, triton.next_power_of_2(rank)), MORE=more_MN is not None,
        EVEN=width % tile["BK"] == 0, WIDE=8, **tile,
    )  # fmt: skip
    return out


def product(x_MK: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """x·Wᵀ (M, N)."""
    return multiply(quantise(x_MK, group_of(x_MK.shape[1])), q_NK, scale_N, x_MK.dtype)


_ones: dict[torch.device, Tensor] = {}
_streams: dict[torch.device, torch.cuda.Stream] = {}


def prepare(device: torch.device) -> None:
    """Before the first product on that device, and before any is recorded: a graph must not hold what others use."""
    if device not in _ones:
        _ones[device] = torch.ones((), dtype=torch.float32, device=device)
        _streams[device] = torch.cuda.Stream(device)


@triton.jit(do_not_specialize=["M"])
def _sums_kernel(x, q, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
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


def _sums(x: Tensor, q_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """x·qᵀ (M, N) of FP8 numbers. cuBLAS takes sizes that are multiples of 16."""
    (rows, width), outputs = x.shape, len(q_NK)
    if x.is_cuda and outputs % 16 == 0 and width % 16 == 0:
        one = _ones[x.device]
        out = torch._scaled_mm(x, q_NK.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
        return out.to(dtype)
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    few = rows <= 16
    _sums_kernel[(triton.cdiv(outputs, 32), triton.cdiv(rows, 16 if few else 64))](
        x, q_NK, out, rows, outputs, width, BM=16 if few else 64, BN=32, BK=128, num_warps=4, num_stages=4
    )
    return out


class By(NamedTuple):
    """What a product on the way back is still to become: its rows are to be multiplied by `rows` (M,) float32, and its
    columns rotated back in groups."""

    rows: Tensor
    group: int


@triton.jit(do_not_specialize=["M"])
def _finish_kernel(
    out, by, low, a, M, N, R,
    LOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (rows < M)[:, None] & (columns < N)[None]
    place = rows[:, None].to(tl.int64) * N + columns[None]
    read = tl.load(out + place, inside, 0.0)
    if GROUP > 1:  # noqa: SIM108 (one of the two does not compile)
        total = tl.dot(read, signs(BN, GROUP, read.dtype), input_precision="ieee")
    else:
        total = read.to(tl.float32)
    total *= tl.load(by + rows, rows < M, 0.0)[:, None]
    if LOW:
        ranks = tl.arange(0, BR)
        x = tl.load(low + rows[:, None] * R + ranks[None], (rows < M)[:, None] & (ranks < R)[None], 0.0)
        y = tl.load(a + ranks[:, None] * N + columns[None], (ranks < R)[:, None] & (columns < N)[None], 0.0)
        total += tl.dot(x, y, input_precision="ieee")
    tl.store(out + place, total.to(out.dtype.element_ty), inside)


def finish(out_MN: Tensor, by: By, low_MR: Tensor | None = None, a_RN: Tensor | None = None) -> Tensor:
    """What it becomes, plus low·A where that is given, in place."""
    (rows, width), rank = out_MN.shape, 1 if a_RN is None else len(a_RN)
    few = rows <= 32
    _finish_kernel[(triton.cdiv(rows, 16 if few else 64), triton.cdiv(width, 128))](
        out_MN, by.rows, out_MN if low_MR is None else low_MR, out_MN if a_RN is None else a_RN, rows, width, rank,
        LOW=a_RN is not None, BM=16 if few else 64, BN=128, BR=max(16, triton.next_power_of_2(rank)), GROUP=by.group,
    )  # fmt: skip
    return out_MN


@triton.jit
def _transposed_kernel(q, out, N, K, BN: tl.constexpr, BK: tl.constexpr, CARRY: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (n < N)[:, None] & (k < K)[None]
    values = as_fp8(tl.load(q + n[:, None].to(tl.int64) * K + k[None], inside, 0).to(tl.float32), CARRY)
    tl.store(out + k[:, None].to(tl.int64) * N + n[None], tl.trans(values), tl.trans(inside))


def _transpose(q_NK: Tensor, out_KN: Tensor) -> None:
    rows, width = q_NK.shape
    _transposed_kernel[(triton.cdiv(rows, 128), triton.cdiv(width, 128))](
        q_NK, out_KN, rows, width, BN=128, BK=128, CARRY=not q_NK.is_cuda, num_warps=8
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
    """(K, N) FP8, contiguous. `following`: the matrix of the next call, whose turn begins now, on a stream of its
    own."""
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


def back_unfinished(grad: Rows, q_NK: Tensor, dtype: torch.dtype, following: Tensor | None = None) -> tuple[Tensor, By]:
    """grad·W (M, K), and what it is to become. `grad`: times W's scales before it was rounded to FP8. `following` as
    for `transposed`."""
    return _sums(grad.q, transposed(q_NK, following), dtype), By(grad.scale, group_of(q_NK.shape[1]))


def product_back(grad_MN: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """grad·W (M, K)."""
    return finish(*back_unfinished(quantise(grad_MN, AS_FP8, scale_N), q_NK, grad_MN.dtype))
