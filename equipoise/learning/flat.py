"""Parameters that lie in one buffer, and so do their gradients: what is done to all of them is then a few kernels."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from equipoise.learning.shards import Shards
from equipoise.runs.ranks import ALONE, Ranks


class FlatGroup:
    """Parameters of one dtype as views of one buffer. `master` is this rank's slice of it in float32: alone the whole,
    and the buffer itself where that is float32."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], ranks: Ranks, sharded: bool) -> None:
        first = next(iter(parameters.values()))
        assert all(p.dtype == first.dtype for p in parameters.values()), "one dtype per group"
        self.shapes = {name: p.shape for name, p in parameters.items()}
        count = sum(p.numel() for p in parameters.values())
        self.shards = Shards(count, ranks if sharded else ALONE)
        for parameter in parameters.values():
            parameter.grad = None  # of another optimizer, before memory is taken
        padding = first.new_zeros(self.shards.padded - count)
        self.buffer = torch.cat([*(p.detach().reshape(-1) for p in parameters.values()), padding])
        ranks.share_(self.buffer)  # nothing rests on all having drawn the same
        for parameter, view in zip(parameters.values(), self.split(self.buffer).values(), strict=True):
            parameter.data = view
        self.grads = torch.zeros_like(self.buffer)
        for parameter, grad in zip(parameters.values(), self.split(self.grads).values(), strict=True):
            parameter.grad = grad
        shared = self.buffer.dtype == torch.float32 and not self.sharded
        self.master = nn.Parameter(self.buffer if shared else self.shards.slice_of(self.buffer))
        self.sum: Tensor | None = None
        """Gradients of earlier micro-batches, in float32, once there have been any."""

    @property
    def sharded(self) -> bool:
        return self.shards.ranks.size > 1

    @property
    def in_place(self) -> bool:
        """Whether the master is what the model computes with."""
        return self.master.data_ptr() == self.buffer.data_ptr()

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        """Where each parameter begins and ends in the buffer."""
        ends = torch.tensor([math.prod(shape) for shape in self.shapes.values()]).cumsum(0).tolist()
        return dict(zip(self.shapes, zip([0, *ends], ends, strict=False), strict=True))

    def total(self) -> Tensor:
        """All gradients since the last step, flat."""
        if self.sum is None:
            return self.grads
        self.sum.add_(self.grads)
        self.grads.zero_()
        return self.sum

    def gradients(self) -> Iterator[tuple[slice, Tensor]]:
        """What a step is taken with: places in the slice, and their gradients."""
        if not self.sharded:
            yield slice(None), self.total()
            return
        for block, sums in self.shards.summed(self.grads):
            if block.own:
                yield slice(block.place, block.place + block.own), sums

    def gradient(self) -> Tensor:
        """The same as one vector, float32."""
        if not self.sharded:
            return self.total().float()
        return torch.cat([self.master.new_empty(0), *(sums for _, sums in self.gradients())])

    def norm(self) -> Tensor:
        """() float32, of the whole group's gradient."""
        if self.sharded:
            return self.shards.norm(self.grads)
        return torch.linalg.vector_norm(self.total(), dtype=torch.float32)

    @torch.no_grad()
    def use(self, own: Tensor) -> None:
        """Have the model compute with these weights, of which `own` is this rank's slice."""
        if self.sharded:
            self.shards.spread(own, self.buffer)
        elif own.data_ptr() != self.buffer.data_ptr():
            self.buffer.copy_(own)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat tensor by name, in the parameters' shapes."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = flat[: sum(sizes)].split(sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def host_copy(flat: Tensor) -> Tensor:
    """A copy on the CPU. From a GPU through page-locked memory, at the speed of the bus, not waited for."""
    if not flat.is_cuda:
        return flat.clone()
    return torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat, non_blocking=True)
