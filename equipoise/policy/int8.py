"""Frozen base weights in 8 bits: half the memory of bfloat16, for cards with 16 or 24 GB.

Weights only, rounded to the nearest of 255 steps a row (absmax scaling); products are in the model's own dtype. Nothing
is decided on the host, so CUDA graphs record it. bitsandbytes' LLM.int8(), which also rounds activations and looks for
outliers in every layer, took six times as long for a PPO step (`benchmarks/RESULTS.md`).
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import Tensor, nn

BLOCK = 1 << 22
"""Values that are quantised at a time: a matrix need not be there in float32 as a whole."""


class Rounded(NamedTuple):
    """A matrix (N, K) in 8 bits: q (N, K) int8, scale (N,) float32."""

    q: Tensor
    scale: Tensor


@torch.no_grad()
def quantise(weight_NK: Tensor) -> Rounded:
    """Each row by its largest absolute value, a block of rows at a time."""
    rows, columns = weight_NK.shape
    q = torch.empty(rows, columns, dtype=torch.int8, device=weight_NK.device)
    scale = torch.empty(rows, dtype=torch.float32, device=weight_NK.device)
    step = max(1, BLOCK // max(1, columns))
    for first in range(0, rows, step):
        block = weight_NK[first : first + step].float()
        largest = block.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        scale[first : first + step] = largest
        q[first : first + step] = (block / largest[:, None]).round()
    return Rounded(q, scale)


def put_aside(linear: nn.Linear, weight_NK: Tensor) -> nn.Parameter:
    """Keep a layer's weights in 8 bits beside it until `to_eight_bits` puts them in; what stands for them meanwhile.

    That has their shape, dtype and device, so that adapters can be put around the layer, and takes the room of one
    value. It is NaN: a layer that was forgotten does not go unnoticed.
    """
    linear.rounded = quantise(weight_NK)  # type: ignore[assignment]
    nothing = torch.full((1,), torch.nan, dtype=weight_NK.dtype, device=weight_NK.device)
    return nn.Parameter(nothing.expand(weight_NK.shape), requires_grad=False)


def is_put_aside(linear: nn.Module) -> bool:
    return isinstance(linear.__dict__.get("rounded"), Rounded)


class Int8Linear(nn.Module):
    """y = x·(q · scale)ᵀ + b: q (N, K) int8, scale (N,) float32, both frozen."""

    q: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rounded = linear.__dict__["rounded"] if is_put_aside(linear) else quantise(linear.weight.detach())
        self.dtype = linear.weight.dtype
        self.register_buffer("scale", rounded.scale)
        self.register_buffer("q", rounded.q)
        self.bias = linear.bias

    def matrix(self) -> Tensor:
        """W (N, K) in the dtype that the layer had."""
        return matrix(self.q, self.scale, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix(), self.bias)


def matrix(q_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """q · scale, each row by its own."""
    if q_NK.is_cuda:
        from equipoise.policy.kernels import int8

        return int8.matrix(q_NK, scale_N, dtype)
    return (q_NK * scale_N[:, None]).to(dtype)


def to_eight_bits(model: Any) -> None:
    """Replace every linear layer's weights but the output head's, one layer at a time; adapters stay as they are."""
    head = model.get_output_embeddings()
    # Owners only: a list of all modules would keep every replaced layer alive, and with it both copies of the weights.
    for owner in [m for m in model.modules() if not isinstance(m, nn.Linear)]:
        if isinstance(owner, LoraLayer):
            if type(owner.base_layer) is nn.Linear:
                owner.base_layer = Int8Linear(owner.base_layer)
        else:
            for name, child in list(owner.named_children()):
                if goes_into_eight_bits(owner, child, head):
                    setattr(owner, name, Int8Linear(child))
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain.is_quantized = True  # which export takes as: merge into the original weights


def goes_into_eight_bits(owner: nn.Module, child: nn.Module, head: nn.Module | None) -> bool:
    """Whether `child` of `owner` is a linear layer of the model's own; a ModuleDict holds adapters."""
    return type(child) is nn.Linear and child is not head and not isinstance(owner, nn.ModuleDict)
