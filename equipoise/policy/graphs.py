"""CUDA graphs: a function of tensors is recorded once per shape and replayed, so that the GPU never waits for Python.

Without a GPU, or with `enabled=False`, the function is simply called: the plain twin of every fast path.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from equipoise.runs.launch import launched

Outputs = tuple[Tensor, ...]


class _Recording:
    depth = 0
    held: ClassVar[list[Tensor]] = []

    def __enter__(self) -> None:
        _Recording.depth += 1

    def __exit__(self, *error: object) -> None:
        _Recording.depth -= 1


def recording() -> bool:
    """Whether what is computed now becomes a graph, or is tried out before it does: several streams are then worth
    their while, which cost the host more than they save where it launches every kernel. In any thread: backward passes
    have their own."""
    return _Recording.depth > 0


def hold(tensor: Tensor) -> None:
    """Keep it as long as the graph that is being recorded, which has its address."""
    if recording():
        _Recording.held.append(tensor)


class Graphs:
    """Recorded functions by key. Everything a function closes over (weights, caches) must keep its address."""

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self.device = device
        self.enabled = enabled and device.type == "cuda"
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Outputs, list[Tensor]]] = {}
        self._pool: Any = None
        self.capture: Literal["global", "thread_local"] = "thread_local" if launched() else "global"
        """Which threads must do nothing that a recording forbids. Where several processes work together a thread of
        NCCL's looks at events at any time, so that only this thread can be bound."""

    def __call__(self, key: Hashable, function: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
        """function(*inputs). The outputs live until the next call of any key, so copy what must outlast it.

        The key stands for the function and everything but its inputs' values: shapes are added here.
        """
        if not self.enabled:
            return function(*inputs)
        graph, buffers, outputs, _ = self._recorded[self.record(key, function, *inputs)]
        for buffer, x in zip(buffers, inputs, strict=True):
            buffer.copy_(x, non_blocking=True)
        graph.replay()
        return outputs

    def has(self, key: Hashable, *inputs: Tensor) -> bool:
        """Whether a call would replay. True without graphs, where there is nothing to record."""
        return not self.enabled or (key, *(tuple(x.shape) for x in inputs)) in self._recorded

    def record(self, key: Hashable, function: Callable[..., Outputs], *inputs: Tensor) -> Hashable:
        """Record without replaying, if that has not been done. The function runs once, with whatever it changes."""
        full_key = (key, *(tuple(x.shape) for x in inputs))
        if self.enabled and full_key not in self._recorded:
            self._recorded[full_key] = self._record(function, inputs)
        return full_key

    def _record(
        self, function: Callable[..., Outputs], inputs: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Outputs, list[Tensor]]:
        buffers = tuple(x.to(self.device, copy=True) for x in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with _Recording():
            with torch.cuda.stream(side):  # lazy initialisation must be over before recording
                function(*buffers)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=self.capture):
                outputs = function(*buffers)
        self._pool = self._pool or graph.pool()
        held, _Recording.held = _Recording.held, []
        return graph, buffers, outputs, held

    def clear(self) -> None:
        """Forget all recordings, and free their memory."""
        self._recorded.clear()
        self._pool = None


ALIGNED = 32
"""Numbers that a tensor is filled up to when several are sent together, so that each begins where kernels like it."""


def sent(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors, which are the host's, on the device. To a GPU those of a dtype go as one, and nobody waits for them
    or for what the GPU was given before."""
    if device.type != "cuda":
        return [x.to(device) for x in tensors]
    found = list(tensors)
    for dtype in {x.dtype for x in tensors}:
        places = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        sizes = [round_up(tensors[i].numel(), ALIGNED) for i in places]
        flat = torch.empty(sum(sizes), dtype=dtype, pin_memory=True)
        for i, part in zip(places, flat.split(sizes), strict=True):
            part[: tensors[i].numel()] = tensors[i].reshape(-1)
        for i, part in zip(places, flat.to(device, non_blocking=True).split(sizes), strict=True):
            found[i] = part[: tensors[i].numel()].view(tensors[i].shape)
    return found


def on_its_way(x: Tensor) -> Callable[[], Any]:
    """What is called to wait for the numbers of x, as a list, and for nothing that the device is given after them."""
    if not x.is_cuda:
        return x.tolist
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    copied = torch.cuda.current_stream(x.device).record_event()

    def numbers() -> Any:
        copied.synchronize()
        return host.tolist()

    return numbers


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
