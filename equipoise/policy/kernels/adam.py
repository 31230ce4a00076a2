"""Adam in one pass over memory: gradient, moments and master read once, written once, the weights in use with them."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _adam_kernel(
    master, first, second, grad, used, n, clip_, rate, beta1, rest1, beta2, rest2, eps, correction2,
    BLOCK: tl.constexpr, USED: tl.constexpr,
):  # fmt: skip
    clip = tl.load(clip_)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    if clip < 0.0:  # what is not finite must not stay for the next step, whose gradients are added to it
        tl.store(grad + place, tl.zeros((BLOCK,), grad.dtype.element_ty), inside)
        return
    g = tl.load(grad + place, inside, 0.0).to(tl.float32) * clip
    m = tl.load(first + place, inside, 0.0) * beta1 + rest1 * g
    v = tl.load(second + place, inside, 0.0) * beta2 + rest2 * g * g
    weight = tl.load(master + place, inside, 0.0) - rate * m / (tl.sqrt(v) / correction2 + eps)
    tl.store(first + place, m, inside)
    tl.store(second + place, v, inside)
    tl.store(master + place, weight, inside)
    tl.store(grad + place, tl.zeros((BLOCK,), grad.dtype.element_ty), inside)
    if USED:
        tl.store(used + place, weight.to(used.dtype.element_ty), inside)


def adam(
    master: Tensor, first: Tensor, second: Tensor, grad: Tensor, used: Tensor | None,
    *, step: int, clip: Tensor, rate: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """One step of Adam (Kingma & Ba 2015, algorithm 1, with PyTorch's place for eps) on flat float32 tensors, in place.

    The gradient is multiplied by `clip` (), float32, and afterwards zero; with a negative one nothing else is
    changed. `used` gets the new master in its own dtype. `step` counts from 1.
    """
    n = master.numel()
    _adam_kernel[(triton.cdiv(n, 2048),)](
        master, first, second, grad, master if used is None else used, n, clip,
        rate / (1 - betas[0] ** step), betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps,
        (1 - betas[1] ** step) ** 0.5,
        BLOCK=2048, USED=used is not None, num_warps=8,
    )  # fmt: skip
