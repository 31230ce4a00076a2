"""The norms of a fused layer, with the gradients of their weights."""

from typing import Any

from torch import Tensor

from equipoise.policy.aside import aside
from equipoise.policy.joined import gradient
from equipoise.policy.kernels import elementwise
from equipoise.policy.layer_spec import epsilon


def add_sums(gradients: tuple[Tensor, ...], sums: tuple[Tensor, ...]) -> None:
    """Add to each gradient (H,) the sum of its rows (P, H), aside."""

    def work() -> None:
        for gradient_H, rows_PH in zip(gradients, sums, strict=True):
            elementwise.add_rows(gradient_H, rows_PH)

    if sums:
        aside.do(sums[0].device, work)


class FusedNorm:
    """A norm module, as the kernels take it."""

    def __init__(self, module: Any, offset: float) -> None:
        self.trained = [p for p in (module.weight, getattr(module, "bias", None)) if p is not None and p.requires_grad]
        eps = epsilon(module)
        assert eps is not None
        self.by = elementwise.Norm(module.weight, eps, offset, getattr(module, "bias", None))

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor | None, more: Tensor | None) -> Tensor:
        """Gradient of x, plus `more`; those of the trained weights are added to their `.grad`, aside."""
        assert rstd is not None
        dx, sums = elementwise.norm_backward(dy, x, self.by, rstd, more, bool(self.trained))
        add_sums(tuple(map(gradient, self.trained)), sums)
        return dx
