"""Frozen base weights in 8 bits: half the memory of bfloat16, for cards with 16 or 24 GB.

Each row of a matrix has a scale, by its largest absolute value. Two formats:

- int8: 255 steps a row, weights only; products are in the model's own dtype.
- Rotated int8, on cards that have FP8: groups of neighbouring inputs are multiplied by a Hadamard matrix
  (`kernels.rounding` says why), weights and activations then rounded to int8 and multiplied as integers. Gradients on
  their way back are rounded to FP8 (e4m3: 4 bits of exponent, 3 of mantissa), and so are, once more, the weights that
  they meet.

Nothing is decided on the host, so CUDA graphs record it. bitsandbytes' LLM.int8(), which also rounds activations and
looks for outliers in every layer, took six times as long for a PPO step (`benchmarks/RESULTS.md`).

Shapes: M rows (tokens), K inputs and N outputs of a layer.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from equipoise.errors import UserError
from equipoise.policy.hadamard import group_of, rotated

BLOCK = 1 << 22
"""Values that are quantised at a time: a matrix need not be there in float32 as a whole."""
FP8 = torch.float8_e4m3fn
ROTATED = torch.qint8
"""What stands for rotated int8 where formats are told apart; its numbers are of torch.int8."""
MOST = {torch.int8: 127.0, ROTATED: 127.0, FP8: 448.0}
"""The formats, and the largest number that each can hold; FP8 is for gradients."""
LEAST = 2.0**-100
"""What the largest value of a row counts as at least, so that what the row is multiplied by has an end."""
ASKED = "EQUIPOISE_FP8"
LINEAR = (nn.Linear, Conv1D)
"""The kinds of layers whose weights are rounded."""
NAMES = {torch.int8: "int8", ROTATED: "rotated int8"}


class NotFinite(BaseException):
    """A weight is infinite or no number. No `Exception`: those transformers notes while it reads, and reads on."""

    def told(self) -> UserError:
        return UserError(
            f"the model's tensor {self} holds infinite values or NaN, which have no place in 8 bits: the copy is "
            "damaged, or was computed beyond its range; load another, or leave --use-8bit out to look at it"
        )


class Rounded(NamedTuple):
    """A matrix (N, K) in 8 bits, = q · scale: q (N, K) of one of the formats, scale (N,) float32. Rotated ones are
    W·H = q · scale · G."""

    q: Tensor
    scale: Tensor


def format_for(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Rotated int8 where the card multiplies FP8 (compute capability 8.9: Ada, Hopper, Blackwell) and bfloat16 is what
    the products are wanted in; else int8, and everywhere with EQUIPOISE_FP8=0."""
    if os.environ.get(ASKED) == "0" or device.type != "cuda" or dtype != torch.bfloat16:
        return torch.int8
    return ROTATED if torch.cuda.get_device_capability(device) >= (8, 9) else torch.int8


@torch.no_grad()
def quantise(weight_NK: Tensor, into: torch.dtype = torch.int8) -> Rounded:
    """Each row by its largest absolute value, to the nearest number of the format `into`, a block of rows at a time.

    Raises NotFinite.
    """
    found = _quantised(weight_NK, into)
    if not bool(found.scale.isfinite().all()):
        raise NotFinite
    return Rounded(found.q, found.scale / group_of(weight_NK.shape[1])) if into == ROTATED else found


def _quantised(weight_NK: Tensor, into: torch.dtype) -> Rounded:
    """`quantise`, but for rotated rows q · scale is what they are after it; rows with a value that is not finite have a
    scale that is none."""
    rows, columns = weight_NK.shape
    q = torch.empty(rows, columns, dtype=FP8 if into == FP8 else torch.int8, device=weight_NK.device)
    scale = torch.empty(rows, dtype=torch.float32, device=weight_NK.device)
    step = max(1, BLOCK // max(1, columns))
    for first in range(0, rows, step):
        block = weight_NK[first : first + step].float()
        if into == torch.int8:
            each = block.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / MOST[into]
            q[first : first + step] = (block / each[:, None]).round_()
        else:  # multiplied, which a GPU does ten times as fast as it divides
            block = rotated(block) if into == ROTATED else block
            largest = block.abs().amax(1).clamp(min=LEAST)
            each = largest / MOST[into]
            by = torch.full_like(largest, MOST[into]) / largest  # a number over a tensor is rounded twice
            block = (block * by[:, None]).clamp_(-MOST[into], MOST[into])
            q[first : first + step] = block.round_() if into == ROTATED else block
        scale[first : first + step] = each
    return Rounded(q, scale)


def matrix(linear: nn.Module, weight: Tensor) -> Tensor:
    """(N, K): a layer's weights, which GPT-2's `Conv1D` keeps the other way round."""
    return weight.T if isinstance(linear, Conv1D) else weight


def put_aside(linear: nn.Module, name: str, weight: Tensor, into: torch.dtype) -> nn.Parameter:
    """Keep a layer's weights in 8 bits beside it until `to_eight_bits` puts them in; what stands for them meanwhile.

    That has their shape, dtype and device, so that adapters can be put around the layer, and takes the room of one
    value. It is NaN: a layer that was forgotten does not go unnoticed. Raises NotFinite with the weight's `name`.
    """
    try:
        linear.rounded = quantise(matrix(linear, weight), into)  # type: ignore[assignment]
    except NotFinite:
        raise NotFinite(name) from None
    nothing = torch.full((1,), torch.nan, dtype=weight.dtype, device=weight.device)
    return nn.Parameter(nothing.expand(weight.shape), requires_grad=False)


def is_put_aside(linear: nn.Module) -> bool:
    return isinstance(linear.__dict__.get("rounded"), Rounded)


class EightBitLinear(nn.Module):
    """y = x·Wᵀ + b, W rounded to 8 bits, frozen as b is: q (N, K), scale (N,) float32."""

    q: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear | Conv1D, into: torch.dtype = torch.int8) -> None:
        super().__init__()
        self.kind = into
        put = is_put_aside(linear)
        rounded = linear.__dict__["rounded"] if put else quantise(matrix(linear, linear.weight.detach()), into)
        sizes: tuple[int, ...] = rounded.q.shape
        self.out_features, self.in_features = sizes
        self.dtype = linear.weight.dtype
        self.register_buffer("scale", rounded.scale)
        self.register_buffer("q", rounded.q)
        self.bias = linear.bias
        if rounded.q.is_cuda and into == ROTATED:
            kernels(into).prepare(rounded.q.device)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self.q, self.scale, self.kind)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """x·Wᵀ; what is kept for the way back is W in 8 bits, never written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
        ctx.save_for_backward(q, scale)
        ctx.kind = kind
        return product(x.reshape(-1, x.shape[-1]), q, scale, kind).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        q, scale = ctx.saved_tensors
        grad_x = product_back(grad.reshape(-1, grad.shape[-1]), q, scale, ctx.kind)
        return grad_x.view(*grad.shape[:-1], -1), None, None, None


def kernels(kind: torch.dtype) -> ModuleType:
    """Those for that format: a module with `product` and `product_back`. They need Triton."""
    from equipoise.policy.kernels import int8, rotated

    return rotated if kind == ROTATED else int8


def product(x_MK: Tensor, q_NK: Tensor, scale_N: Tensor, kind: torch.dtype = torch.int8) -> Tensor:
    """x·Wᵀ (M, N) in x's dtype. On a GPU by `kernels`; what is written out here is their plain twin."""
    if kind == ROTATED and as_they_are:
        return ((rotated(x_MK).to(x_MK.dtype) @ q_NK.to(x_MK.dtype).T) * scale_N).to(x_MK.dtype)
    if x_MK.is_cuda:
        return kernels(kind).product(x_MK.contiguous(), q_NK, scale_N)
    if kind == torch.int8:
        return x_MK @ (q_NK * scale_N[:, None]).to(x_MK.dtype).T
    x = _quantised(x_MK, ROTATED)
    # In float64 sums of integers are exact.
    return ((x.q.double() @ q_NK.double().T).float() * (x.scale[:, None] * scale_N)).to(x_MK.dtype)


def product_back(grad_MN: Tensor, q_NK: Tensor, scale_N: Tensor, kind: torch.dtype = torch.int8) -> Tensor:
    """grad·W (M, K), in grad's dtype: the gradient of x. The rounding of x counts as if it were none."""
    if grad_MN.is_cuda:
        return kernels(kind).product_back(grad_MN.contiguous(), q_NK, scale_N)
    if kind == torch.int8:
        return grad_MN @ (q_NK * scale_N[:, None]).to(grad_MN.dtype)
    # W's scales lie along the sum: they go into the gradient before it is rounded.
    grad = _quantised(grad_MN * scale_N, FP8)
    turned = grad.q.float() @ q_NK.float().to(FP8).float()
    return (rotated(turned) * grad.scale[:, None]).to(grad_MN.dtype)


as_they_are = False


@contextmanager
def activations_as_they_are() -> Iterator[None]:
    """Forward products take activations that are not rounded, as int8's do: for comparing two ways of computing the
    same, between which the rounding of activations makes as much noise as a mistake might."""
    global as_they_are
    before, as_they_are = as_they_are, True
    try:
        yield
    finally:
        as_they_are = before


def to_eight_bits(model: Any, into: torch.dtype = torch.int8) -> None:
    """Replace every linear layer's weights but the output head's, one layer at a time; adapters stay as they are.

    Raises UserError for a weight that is not finite.
    """
    head = model.get_output_embeddings()
    # Owners only: a list of all modules would keep every replaced layer alive, and with it both copies of the weights.
    for name, owner in [(n, m) for n, m in model.named_modules() if type(m) not in LINEAR]:
        if isinstance(owner, LoraLayer):
            if type(owner.base_layer) in LINEAR:
                owner.base_layer = _replaced(owner.base_layer, into, name)
        else:
            for last, child in list(owner.named_children()):
                if goes_into_eight_bits(owner, child, head):
                    setattr(owner, last, _replaced(child, into, f"{name}.{last}"))
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain.is_quantized = True  # which export takes as: merge into the original weights


def _replaced(linear: nn.Linear | Conv1D, into: torch.dtype, name: str) -> EightBitLinear:
    try:
        return EightBitLinear(linear, into)
    except NotFinite:
        raise NotFinite(f"{name}.weight").told() from None


def goes_into_eight_bits(owner: nn.Module, child: nn.Module, head: nn.Module | None) -> bool:
    """Whether `child` of `owner` is a linear layer of the model's own; a ModuleDict holds adapters."""
    return type(child) in LINEAR and child is not head and not isinstance(owner, nn.ModuleDict)


def left_out(model: Any) -> str | None:
    """A line, where most of a model's weights are none that `to_eight_bits` rounds."""
    rounded = sum(m.q.numel() for m in model.modules() if isinstance(m, EightBitLinear))
    apart = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    rest = sum(p.numel() for p in model.parameters() if not p.requires_grad and p.dim() > 1 and id(p) not in apart)
    if rounded >= rest:
        return None
    share = rounded / (rounded + rest)
    return (
        f"--use-8bit rounds {share:.0%} of this {model.config.model_type} model's matrices: the others are no linear "
        "layers by themselves (a mixture's experts, say), and take the memory that they take without it"
    )


def in_eight_bits(model: nn.Module) -> torch.dtype | None:
    """The format of its rounded weights, None where it has none."""
    return next((m.kind for m in model.modules() if isinstance(m, EightBitLinear)), None)
