"""Frozen base weights in 8 bits: half the memory of bfloat16, for cards with 24 GB.

Weights only, rounded to the nearest of 255 steps a row (absmax scaling); products are in the model's own dtype. Nothing
is decided on the host, so CUDA graphs record it. bitsandbytes' LLM.int8(), which also rounds activations and looks for
outliers in every layer, took six times as long for a PPO step (`benchmarks/RESULTS.md`).
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """y = x·(q · scale)ᵀ + b: q (N, K) int8, scale (N,) float32, both frozen."""

    q: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.dtype = linear.weight.dtype
        self.register_buffer("scale", scale)
        self.register_buffer("q", (weight / scale[:, None]).round().to(torch.int8))
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
            owner.base_layer = Int8Linear(owner.base_layer)
        elif not isinstance(owner, nn.ModuleDict):  # those hold the adapters
            for name, child in list(owner.named_children()):
                if type(child) is nn.Linear and child is not head:
                    setattr(owner, name, Int8Linear(child))
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain.is_quantized = True  # which export takes as: merge into the original weights
