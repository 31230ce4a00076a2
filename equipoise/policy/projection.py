"""The projections of a fused layer (`policy.llama`): linear layers that read the same input, as one matrix product.

Shapes: M tokens, K inputs and N outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from equipoise.policy import eightbit
from equipoise.policy.aside import aside, beside
from equipoise.policy.eightbit import ROTATED, EightBitLinear
from equipoise.policy.hadamard import group_of
from equipoise.policy.joined import accumulate, gradient, joined, joined_gradients, put_together
from equipoise.policy.kernels import elementwise, rotated
from equipoise.policy.kernels.rounding import AS_FP8, Rows, quantise
from equipoise.policy.layer_spec import base, width

Input = Callable[[], Tensor]
"""What gives a projection's input, where only gradients of weights need it."""
Add = Callable[[Input], None]


class Projection:
    """Linear layers that read the same x, side by side: y = x·Wᵀ (+ scale · (x·Aᵀ)·Bᵀ with adapters)."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules = modules
        self.lora = isinstance(modules[0], LoraLayer)
        bases: list[Any] = list(map(base, modules))
        self.sizes = tuple(map(width, modules))
        self.transposed = isinstance(bases[0], Conv1D)
        self.biases = [b.bias for b in bases if b.bias is not None]
        assert len(self.biases) in (0, len(bases))
        self.kind: torch.dtype | None = bases[0].kind if isinstance(bases[0], EightBitLinear) else None
        """The format of rounded weights; None where they are not."""
        self.weights = [] if self.kind is not None else [b.weight for b in bases]
        if self.kind is not None:
            bits = torch.cat([b.q.view(torch.uint8) for b in bases])
            self.q, self.scales = bits.view(bases[0].q.dtype), torch.cat([b.scale for b in bases])
            for own, q, scale in zip(bases, self.q.split(self.sizes), self.scales.split(self.sizes), strict=True):
                own.q, own.scale = q, scale
        self.following: Tensor | None = None
        self.a: list[nn.Parameter] = []
        self.b: list[nn.Parameter] = []
        self.scale = 1.0
        if self.lora:
            loras: list[Any] = list(modules)
            (name,) = loras[0].active_adapters
            self.a, self.b = [m.lora_A[name].weight for m in loras], [m.lora_B[name].weight for m in loras]
            self.scale = loras[0].scaling[name]
        if self.weights:
            put_together(self.weights)
        put_together(self.biases)
        put_together(self.a)
        put_together(self.b)

    @property
    def adapted(self) -> bool:
        layer: Any = self.modules[0]
        return self.lora and not layer.disable_adapters

    def _matrix(self) -> Tensor:
        """W (N, K)."""
        return joined(self.weights).T if self.transposed else joined(self.weights)

    @property
    def takes_back(self) -> Tensor | None:
        """What the gradient is to be multiplied by and then rounded to FP8, by the kernel that makes it; None for
        nothing."""
        return self.scales if self._rotates else None

    @property
    def _rotates(self) -> bool:
        return self.kind == ROTATED and not eightbit.as_they_are

    def _low(self, x_MK: Tensor) -> Tensor:
        """x·Aᵀ."""
        return x_MK @ joined(self.a).T

    def _base(self, x_MK: Tensor) -> Tensor:
        """x·Wᵀ (+ bias)."""
        if self.kind is not None:
            out = eightbit.product(x_MK, self.q, self.scales, self.kind)
            return out.add_(joined(self.biases)) if self.biases else out
        if self.biases:
            return torch.addmm(joined(self.biases), x_MK, self._matrix().T)
        return x_MK @ self._matrix().T

    def forward(
        self, x_MK: Tensor, more_MN: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(y + more, x·Aᵀ or None). `out`: where the first may be put."""
        if self._rotates and not self.biases:
            return self._forward_rotated(x_MK, more_MN, out)
        if self.adapted:
            small, y = beside(x_MK.device, lambda: self._low(x_MK), lambda: self._base(x_MK))
            return elementwise.add_adapters(y, small, joined(self.b), self.sizes, self.scale, more_MN), small
        y = self._base(x_MK)
        return (y if more_MN is None else y.add_(more_MN)), None

    def _forward_rotated(
        self, x_MK: Tensor, more_MN: Tensor | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        group = group_of(self.q.shape[1])
        if not self.adapted:
            return rotated.multiply(quantise(x_MK, group), self.q, self.scales, x_MK.dtype, None, more_MN, out), None
        low, rounded = beside(
            x_MK.device, lambda: elementwise.low_product(x_MK, joined(self.a)), lambda: quantise(x_MK, group)
        )
        adapters = rotated.Adapters(low, joined(self.b), self.sizes, self.scale)
        return rotated.multiply(rounded, self.q, self.scales, x_MK.dtype, adapters, more_MN, out), low

    def add_to(self, sum_MN: Tensor, x_MK: Tensor) -> Tensor:
        """sum + y, in place where no adapters are."""
        if self.adapted or self.kind is not None or self.biases:
            return self.forward(x_MK, sum_MN)[0]
        return sum_MN.addmm_(x_MK, self._matrix().T)

    def _back_base(self, grad_MN: Tensor, rounded: Rows | None) -> tuple[Tensor, rotated.By | None]:
        """grad·W, and what that is to become."""
        if self._rotates:
            rounded = quantise(grad_MN, AS_FP8, self.scales) if rounded is None else rounded
            return rotated.back_unfinished(rounded, self.q, grad_MN.dtype, self.following)
        if self.kind is not None:
            return eightbit.product_back(grad_MN, self.q, self.scales, self.kind), None
        return grad_MN @ self._matrix(), None

    def _back_low(self, grad_MN: Tensor, low: Tensor) -> Tensor:
        """scale · grad·B, of each projection its own."""
        grad_low = torch.empty_like(low)
        columns = zip(grad_low.split(len(self.a[0]), 1), grad_MN.split(self.sizes, 1), self.b, strict=True)
        for target, part, b in columns:
            torch.addmm(target, part, b.detach(), beta=0, alpha=self.scale, out=target)
        return grad_low

    def backward(self, grad_MN: Tensor, low: Tensor | None, rounded: Rows | None = None) -> tuple[Tensor, Add]:
        """(gradient of x, what is to be called with x: it adds the gradients of trained weights to their `.grad`,
        aside). `rounded`: the gradient as `takes_back` says, where that is there."""
        through = low is not None and self.a[0].requires_grad
        grad_low: Tensor | None = None
        if low is not None and through:
            like = low
            rest, (grad_x, by) = beside(
                grad_MN.device, lambda: self._back_low(grad_MN, like), lambda: self._back_base(grad_MN, rounded)
            )
            if by is not None:
                rotated.finish(grad_x, by, rest, joined(self.a))
            else:
                grad_x.addmm_(rest, joined(self.a))
            grad_low = rest
        else:
            grad_x, by = self._back_base(grad_MN, rounded)
            if by is not None:
                rotated.finish(grad_x, by)

        def add(x: Input) -> None:
            if grad_low is not None or any(p.requires_grad for p in (*self.weights, *self.biases)):
                aside.do(grad_x.device, lambda: self._add_gradients(grad_MN, x(), low, grad_low))

        return grad_x, add

    def _add_gradients(self, grad_MN: Tensor, x_MK: Tensor, low: Tensor | None, grad_low: Tensor | None) -> None:
        """Those of weights and biases, or of the adapters, added to their `.grad`."""
        if self.weights and self.weights[0].requires_grad:
            if self.transposed:
                accumulate(self.weights, x_MK, grad_MN)
            else:
                accumulate(self.weights, grad_MN, x_MK)
        if self.biases and self.biases[0].requires_grad:
            for bias, part in zip(self.biases, grad_MN.split(self.sizes, 1), strict=True):
                gradient(bias).add_(part.sum(0))
        if low is None or grad_low is None:
            return
        accumulate(self.a, grad_low, x_MK)
        grads = joined_gradients(self.b)
        if grads is not None:
            elementwise.add_adapter_gradient(grads, grad_MN, low, self.sizes, self.scale)
            return
        parts, lows = grad_MN.split(self.sizes, 1), low.split(len(self.a[0]), 1)
        for b, part, own in zip(self.b, parts, lows, strict=True):
            gradient(b).addmm_(part.T, own, alpha=self.scale)
