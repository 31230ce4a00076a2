"""Adam on float32 masters of parameters that may be used in bfloat16, with a non-finite guard and gradient clipping.

A step of 1e-5 is lost in the rounding of a bfloat16 weight; the master keeps it. With float32 parameters the master *is*
the parameter and nothing is copied.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

VALUE_HEAD = "value_head."


class MasterAdam:
    """`accumulate()` after every backward pass, then `step()` once; names are those of `Policy.trained()`."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], eps: float) -> None:
        self.parameters = dict(parameters)
        self.masters: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for name, p in parameters.items()
        }
        groups = [
            {"params": [m for name, m in self.masters.items() if name.startswith(VALUE_HEAD) == value], "value": value}
            for value in (False, True)
        ]
        self.adam = torch.optim.Adam([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)

    def set_learning_rates(self, policy: float, value: float) -> None:
        for group in self.adam.param_groups:
            group["lr"] = value if group["value"] else policy

    def accumulate(self) -> None:
        """Move the parameters' gradients into the masters, adding up in float32 over micro-batches."""
        pairs = [(self.masters[name], p) for name, p in self.parameters.items() if p.dtype != torch.float32]
        for master, parameter in pairs:
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def step(self, max_norm: float) -> float:
        """Clip to `max_norm` and step. Returns the policy's norm before clipping; nothing is changed where a norm is not
        finite. The value head is clipped by itself: its gradient is larger and would scale the policy's away."""
        norms = [float(nn.utils.clip_grad_norm_(group["params"], max_norm)) for group in self.adam.param_groups]
        norm = norms[0] if math.isfinite(sum(norms)) else math.nan
        if math.isfinite(norm):
            self.adam.step()
            self.publish()
        self.zero_grad()
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the parameters the model computes with."""
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                parameter.copy_(self.masters[name])

    def zero_grad(self) -> None:
        for tensor in (*self.masters.values(), *self.parameters.values()):
            tensor.grad = None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(weights, moments): the masters by name, and Adam's `{name}.exp_avg`, `.exp_avg_sq`, `.step`."""
        moments = {
            f"{name}.{key}": value
            for name, master in self.masters.items()
            for key, value in self.adam.state.get(master, {}).items()
        }
        return {name: m.detach() for name, m in self.masters.items()}, moments

    @torch.no_grad()
    def load_state(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Inverse of `state`. Raises KeyError when a parameter is missing."""
        for name, master in self.masters.items():
            master.copy_(weights[name])
        self.adam.state.clear()
        for key, value in moments.items():
            name, _, slot = key.rpartition(".")
            master = self.masters[name]
            # The fused kernel reads the step count on the device as well.
            self.adam.state[master][slot] = value.to(master.device, copy=True)
        self.publish()
