"""Fewer, larger kernels for the same arithmetic: LoRA layers and RMS norms of a loaded model.

peft computes base, A, B, scaling and sum as separate passes over the output, and transformers an RMS norm as eight; on a
GPU, and at a mini-batch's size, those passes cost as much as the matrix products. The modules stay what they are (same
parameters, same names): only the `forward` of each instance is replaced. Results differ by rounding.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import Tensor, nn
from torch.nn.functional import rms_norm


class LoraLinear(torch.autograd.Function):
    """y = x·Wᵀ + b + scale·(x·Aᵀ)·Bᵀ with W and b frozen: three matrix products forward, five backward, nothing else."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.T
        out = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        out.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        flat, low, weight, a, b = ctx.saved_tensors
        grad_out = grad.reshape(-1, grad.shape[-1])
        grad_low = (grad_out @ b).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_out @ weight).addmm_(grad_low, a).view(*grad.shape[:-1], -1)
        return grad_x, None, None, grad_low.T @ flat, (grad_out.T @ low).mul_(ctx.scale), None


def fuse(model: nn.Module) -> None:
    """Replace the forward of every plain LoRA layer and every Llama-style RMS norm in `model`."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and type(module.base_layer) is nn.Linear:
            module.forward = _lora_forward(module)  # type: ignore[method-assign]
        elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = _norm_forward(module)  # type: ignore[method-assign]


def _lora_forward(layer: LoraLayer) -> Any:
    (name,) = layer.active_adapters
    a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    base = layer.base_layer

    def forward(x: Tensor) -> Tensor:
        if layer.disable_adapters:
            return base(x)  # type: ignore[no-any-return]
        return LoraLinear.apply(x, base.weight, base.bias, a, b, scale)  # type: ignore[no-any-return]

    return forward


def _norm_forward(norm: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    return forward
