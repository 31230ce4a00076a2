"""Adam on float32 masters of parameters that may be used in bfloat16, with a non-finite guard and gradient clipping.

A step of 1e-5 is lost in the rounding of a bfloat16 weight; the master keeps it. All parameters of a group share one
buffer, and so do their gradients: a step is then a handful of kernels, however many adapters there are, and the
addresses never change, as CUDA graphs need.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from equipoise.runs.ranks import Ranks

VALUE_HEAD = "value_head."


class _Group:
    """Parameters of one dtype as views of one buffer; `master` is that buffer itself where it is float32."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        first = next(iter(parameters.values()))
        assert all(p.dtype == first.dtype for p in parameters.values()), "one dtype per group"
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.buffer = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
        self.grads = torch.zeros_like(self.buffer)
        for (name, parameter), view, grad in zip(
            parameters.items(), self.split(self.buffer).values(), self.split(self.grads).values(), strict=True
        ):
            assert name in self.shapes
            parameter.data = view
            parameter.grad = grad
        self.master = nn.Parameter(self.buffer if self.buffer.dtype == torch.float32 else self.buffer.float())
        self.sum: Tensor | None = None
        """Gradients of earlier micro-batches, in float32, once there have been any."""

    def total(self) -> Tensor:
        """All gradients since the last step, flat."""
        if self.sum is None:
            return self.grads
        self.sum.add_(self.grads)
        self.grads.zero_()
        return self.sum

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat tensor by name, in the parameters' shapes."""
        parts = flat.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class MasterAdam:
    """`accumulate()` between the backward passes of one step, then `step()`; names are those of `Policy.trained()`.

    On a GPU a step is one kernel for each group. Takes the parameters over: their data and gradients become views of
    its buffers, so gradients are never set to None.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, betas: tuple[float, float], eps: float, average: float = 0.0
    ) -> None:
        """`average`: decay of a moving average of the policy's weights; 0 for none."""
        value = {name: p for name, p in parameters.items() if name.startswith(VALUE_HEAD)}
        policy = {name: p for name, p in parameters.items() if name not in value}
        self.groups = {name: _Group(ps) for name, ps in (("policy", policy), ("value", value)) if ps}
        self.adam = torch.optim.Adam(
            [{"params": [group.master]} for group in self.groups.values()], lr=0.0, betas=betas, eps=eps, fused=True
        )
        self.decay = average
        self.average = self.groups["policy"].master.detach().clone() if average and "policy" in self.groups else None

    def set_learning_rates(self, policy: float, value: float) -> None:
        rates = {"policy": policy, "value": value}
        for name, group in zip(self.groups, self.adam.param_groups, strict=True):
            group["lr"] = rates[name]

    def accumulate(self) -> None:
        """Put the parameters' gradients aside, in float32, so that those of another micro-batch can be added."""
        for group in self.groups.values():
            if group.grads.dtype != torch.float32:
                group.sum = torch.zeros_like(group.master) if group.sum is None else group.sum
                group.total()

    def take(self) -> Tensor:
        """All gradients of all groups since the last step, one float32 vector of its own; none are left."""
        flat = torch.cat([group.total().float() for group in self.groups.values()])
        self.zero_grad()
        return flat

    def put(self, flat: Tensor) -> None:
        """Inverse of `take`."""
        sizes = [group.grads.numel() for group in self.groups.values()]
        for group, part in zip(self.groups.values(), flat.split(sizes), strict=True):
            if group.grads.dtype == torch.float32 and group.sum is None:
                group.grads.copy_(part)
            else:
                group.sum = torch.empty_like(group.master) if group.sum is None else group.sum
                group.sum.copy_(part)

    @contextmanager
    def gradients_kept(self) -> Iterator[None]:
        """Whatever is done inside, the gradients are afterwards what they were."""
        kept = [group.grads.clone() for group in self.groups.values()]
        yield
        for group, grads in zip(self.groups.values(), kept, strict=True):
            group.grads.copy_(grads)

    def norms(self) -> Tensor:
        """(groups,) norms of the accumulated gradients, the policy's first."""
        return torch.stack(
            [torch.linalg.vector_norm(group.total(), dtype=torch.float32) for group in self.groups.values()]
        )

    def step(self, max_norm: float, norms: Sequence[float] | None = None) -> float:
        """Clip to `max_norm` and step. Returns the policy's norm before clipping, nan where a norm is not finite, and
        then nothing is changed. The value head is clipped by itself: its gradient is larger and would scale the
        policy's away. `norms`, where the caller has read them already, saves waiting for the device."""
        norms = self.norms().tolist() if norms is None else norms
        finite = all(map(math.isfinite, norms))
        if finite:
            for group, norm, options in zip(self.groups.values(), norms, self.adam.param_groups, strict=True):
                clip = max_norm / norm if norm > max_norm else 1.0
                if group.buffer.is_cuda:
                    self._step_at_once(group, clip, options["lr"])
                else:
                    group.master.grad = group.total().float().mul_(clip)
            if not group.buffer.is_cuda:
                self.adam.step()
                self.copy_masters_to_model()
        self.zero_grad()
        return norms[0] if finite else math.nan

    @torch.no_grad()
    def _step_at_once(self, group: _Group, clip: float, rate: float) -> None:
        """What `adam.step` and `copy_masters_to_model` do, on the state that `adam` would have, but for a count on the
        CPU."""
        from equipoise.policy.kernels.adam import adam

        state = self.adam.state[group.master]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(group.master), torch.zeros_like(group.master)
        state["step"] += 1
        used = None if group.master.data_ptr() == group.buffer.data_ptr() else group.buffer
        adam(
            group.master, state["exp_avg"], state["exp_avg_sq"], group.total(), used,
            step=int(state["step"]), clip=clip, rate=rate,
            betas=self.adam.defaults["betas"], eps=self.adam.defaults["eps"],
        )  # fmt: skip

    @torch.no_grad()
    def copy_masters_to_model(self) -> None:
        """Copy the masters into the parameters the model computes with."""
        for group in self.groups.values():
            if group.master.data_ptr() != group.buffer.data_ptr():
                group.buffer.copy_(group.master)

    @torch.no_grad()
    def update_average(self, steps: int) -> None:
        """Move the average towards the weights as they are after `steps` updates of it, this one included.

        The decay is min(decay, (1 + n) / (10 + n)) as in TensorFlow's ExponentialMovingAverage: a short run's average
        does not remain at the weights it began with.
        """
        if self.average is not None:
            self.average.lerp_(self.groups["policy"].master, 1 - min(self.decay, (1 + steps) / (10 + steps)))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model computes with the average, where there is one; afterwards with its weights again."""
        if self.average is None:
            yield
            return
        master = self.groups["policy"].master.data
        kept = master.clone()
        master.copy_(self.average)
        self.copy_masters_to_model()
        try:
            yield
        finally:
            master.copy_(kept)
            self.copy_masters_to_model()

    def zero_grad(self) -> None:
        for group in self.groups.values():
            group.grads.zero_()
            if group.sum is not None:
                group.sum.zero_()

    def state(self, copied: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(weights, moments): the masters by name, and Adam's `{name}.exp_avg`, `.exp_avg_sq` and `{group}.step`; with
        the moments, `{name}.average`. `copied`: on the CPU, in memory of their own."""
        take = _host_copy if copied else _itself
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for kind, group in self.groups.items():
            weights |= group.split(take(group.master.detach()))
            for slot, value in self.adam.state.get(group.master, {}).items():
                if slot == "step":
                    moments[f"{kind}.step"] = take(value)
                else:
                    moments |= {f"{name}.{slot}": part for name, part in group.split(take(value)).items()}
        if self.average is not None:
            parts = self.groups["policy"].split(take(self.average))
            moments |= {f"{name}.average": part for name, part in parts.items()}
        if copied and torch.cuda.is_available():
            torch.cuda.synchronize()
        return weights, moments

    @torch.no_grad()
    def share(self, ranks: Ranks) -> None:
        """Have every rank hold what rank 0 holds, to the last bit."""
        moved = ranks.first_does(lambda: [name for name, g in self.groups.items() if g.master in self.adam.state])
        for name, group in self.groups.items():
            ranks.share_(group.master.data)
            if name not in moved:
                self.adam.state.pop(group.master, None)
                continue
            state = self.adam.state[group.master]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = (torch.empty_like(group.master) for _ in range(2))
            for value in (state["step"], state["exp_avg"], state["exp_avg_sq"]):
                ranks.share_(value.detach())
        if self.average is not None:
            ranks.share_(self.average)
        self.copy_masters_to_model()

    def digest(self) -> int:
        """64 bits that change with any bit of the masters."""
        sums = [int(g.master.detach().view(torch.int32).sum(dtype=torch.int64)) for g in self.groups.values()]
        return sum(sums) % 2**63

    @torch.no_grad()
    def load_state(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Inverse of `state`. Raises KeyError when a parameter is missing."""
        self.adam.state.clear()
        for kind, group in self.groups.items():
            for name, part in group.split(group.master).items():
                part.copy_(weights[name])
            if f"{kind}.step" not in moments:
                continue
            state = self.adam.state[group.master]
            state["step"] = moments[f"{kind}.step"].to("cpu", torch.float32, copy=True)
            for slot in ("exp_avg", "exp_avg_sq"):
                state[slot] = torch.empty_like(group.master)
                for name, part in group.split(state[slot]).items():
                    part.copy_(moments[f"{name}.{slot}"])
        if self.average is not None:
            for name, part in self.groups["policy"].split(self.average).items():
                part.copy_(moments[f"{name}.average"])
        self.copy_masters_to_model()


def _itself(flat: Tensor) -> Tensor:
    return flat


def _host_copy(flat: Tensor) -> Tensor:
    """A copy on the CPU. From a GPU through page-locked memory, at the speed of the bus, not waited for."""
    if not flat.is_cuda:
        return flat.clone()
    return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)
