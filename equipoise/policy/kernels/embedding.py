"""The gradient of an embedding, added where it belongs: rows of tokens that occur several times are summed first.

PyTorch sorts the tokens, writes a gradient for the whole vocabulary and adds that; here only the rows that are there
are touched. M tokens, V of the vocabulary, H hidden.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["M"])
def _embedding_backward_kernel(tokens, dy, dw, M, H, padding, BM: tl.constexpr, BH: tl.constexpr):
    own = tl.program_id(0)
    token = tl.load(tokens + own)
    columns = tl.program_id(1) * BH + tl.arange(0, BH)
    first = own
    for start in range(0, own, BM):
        places = start + tl.arange(0, BM)
        alike = tl.load(tokens + places, places < own, -1) == token
        first = tl.minimum(first, tl.min(tl.where(alike, places, own), 0))
    if (first == own) & (token != padding):
        total = tl.zeros((BH,), tl.float32)
        for start in range(own // BM * BM, M, BM):
            places = start + tl.arange(0, BM)
            alike = tl.load(tokens + places, places < M, -1) == token
            if tl.max(alike.to(tl.int32), 0) > 0:
                at = dy + places[:, None].to(tl.int64) * H + columns[None]
                total += tl.sum(tl.load(at, alike[:, None] & (columns < H)[None], 0.0).to(tl.float32), 0)
        target = dw + token * H + columns
        old = tl.load(target, columns < H, 0.0).to(tl.float32)
        tl.store(target, (old + total).to(dw.dtype.element_ty), columns < H)


def add_embedding_gradient(dw_VH: Tensor, tokens_M: Tensor, dy_MH: Tensor, padding: int | None) -> None:
    """dw[token] += the sum of its rows of dy, in place, in float32. `padding`: a token whose row gets no gradient."""
    count, width = dy_MH.shape
    block = min(256, triton.next_power_of_2(width))
    _embedding_backward_kernel[(count, triton.cdiv(width, block))](
        tokens_M, dy_MH, dw_VH, count, width, -1 if padding is None else padding, BM=32, BH=block
    )
