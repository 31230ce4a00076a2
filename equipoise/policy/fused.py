"""Fewer, larger kernels for the same arithmetic: LoRA layers and RMS norms of a loaded model.

peft computes base, A, B, scaling and sum as separate passes over the output, and transformers an RMS norm as eight; on
a GPU, and at a mini-batch's size, those passes cost as much as the matrix products. The modules stay what they are
(same parameters, same names): only the `forward` of each instance is replaced. Results differ by rounding.
"""

import functools
import sys
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers.activations import SiLUActivation

from equipoise.policy.layer_spec import norm_kind


class LoraLinear(torch.autograd.Function):
    """y = x·Wᵀ + b + scale·(x·Aᵀ)·Bᵀ with W and b frozen: matrix products and nothing else.

    Where A and B have gradients already, backward adds to them in the same products, and returns none of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.T
        out = product(flat, weight) if bias is None else torch.addmm(bias, flat, weight.T)
        out.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(flat, low, weight)
        # The parameters themselves, whose gradients are added to; saving them as tensors would hide that.
        ctx.adapters, ctx.scale = (a, b), scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight = ctx.saved_tensors
        (a, b), scale = ctx.adapters, ctx.scale
        grad_out = grad.reshape(-1, grad.shape[-1])
        grad_low = (grad_out @ b).mul_(scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_out @ weight).addmm_(grad_low, a).view(*grad.shape[:-1], -1)
        if a.grad is None or b.grad is None:
            return grad_x, None, None, grad_low.T @ flat, (grad_out.T @ low).mul_(scale), None
        a.grad.addmm_(grad_low.T, flat)
        b.grad.addmm_(grad_out.T, low, alpha=scale)
        return grad_x, None, None, None, None, None


FEW_ROWS = 128
PARTS = 4


def product(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """x·Wᵀ. With few rows and K well above N (the down projection while decoding) one product has too few tiles to fill
    a GPU, 115 µs where reading the weights takes 28: K is cut in four, and the parts are summed in float32."""
    rows, inner = x_MK.shape
    if not x_MK.is_cuda or rows > FEW_ROWS or inner < 3 * len(weight_NK) or inner % PARTS:
        return x_MK @ weight_NK.T
    x = x_MK.view(rows, PARTS, -1).transpose(0, 1)
    weight = weight_NK.view(len(weight_NK), PARTS, -1).permute(1, 2, 0)
    return torch.bmm(x, weight, out_dtype=torch.float32).sum(0).to(x_MK.dtype)


def fuse(model: nn.Module, known: bool) -> None:
    """Replace the forward of every plain LoRA layer and every Llama-style RMS norm in `model`. Of a `known`
    architecture also the MLPs and the rotary embedding: others may do more there than their parts show."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and type(module.base_layer) is nn.Linear:
            module.forward = _lora_forward(module)
        elif type(module).__name__.endswith("RMSNorm") and is_llama_norm(module):
            module.forward = norm_forward(module)
        elif (
            known
            and hasattr(module, "gate_proj")
            and isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
        ):
            module.forward = _mlp_forward(module)
    if not known:
        return
    # Rotary embedding is a function of the model's own file: five kernels for each of q and k, or one.
    home: Any = sys.modules[type(next(m for m in model.modules() if hasattr(m, "layer_idx"))).__module__]
    rotate = getattr(home, "apply_rotary_pos_emb", None)
    if rotate is not None and not hasattr(rotate, "_torchdynamo_orig_callable"):
        home.apply_rotary_pos_emb = torch.compile(rotate, dynamic=True)


def _lora_forward(layer: LoraLayer) -> Any:
    (name,) = layer.active_adapters
    a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    base = layer.base_layer

    def forward(x: Tensor) -> Tensor:
        if layer.disable_adapters:
            return base(x)
        return LoraLinear.apply(x, base.weight, base.bias, a, b, scale)

    return forward


def is_llama_norm(norm: Any) -> bool:
    """Whether it is an RMS norm that multiplies by its weights, and spells its epsilon as Llama does."""
    return hasattr(norm, "variance_epsilon") and norm_kind(norm) == (False, 0.0)


def norm_forward(norm: Any) -> Any:
    """The forward of an RMS norm module as one kernel."""

    def forward(x: Tensor) -> Tensor:
        return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    return forward


@functools.cache
def _silu_times() -> Any:
    return torch.compile(lambda gate, up: silu(gate) * up, dynamic=True)


def _mlp_forward(mlp: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        return mlp.down_proj(_silu_times()(mlp.gate_proj(x), mlp.up_proj(x)))

    return forward
