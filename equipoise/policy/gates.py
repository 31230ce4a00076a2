"""Weights that are still being moved: the optimizer moves them layer by layer on a stream of its own, while the next
pass is already at the layers below. Before a layer reads its weights it waits at a gate.

Moving all weights reads and writes memory and nothing else; a pass through a small model hardly touches memory.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

PARTS = 8
"""Gates at most: each costs a launch, and a wait in the pass."""


class Gates:
    """Of one model. Gate 0 is passed by whatever belongs to no layer, before all else."""

    def __init__(self, device: torch.device, layers: int) -> None:
        self.device = device
        self.first = False
        """Whether a pass comes by gate 0."""
        self.layers_each = -(-layers // PARTS)
        self.count = 1 + -(-layers // self.layers_each)
        self.stream: Any = None
        self._opened: list[Any] = []
        self._gate: dict[int, int] = {}

    def use(self) -> None:
        """From now on an optimizer opens them. Before, nothing is waited for."""
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
            # External: a wait within a recorded graph is for what has been recorded last when the graph is launched.
            self._opened = [torch.cuda.Event(external=True) for _ in range(self.count)]
        for gate in range(self.count):  # an event that never was is not waited for by a graph that is recorded now
            self.open(gate)

    def add(self, layer: int, parameters: Iterable[nn.Parameter]) -> None:
        """These belong to the layer."""
        self._gate |= {id(p): 1 + layer // self.layers_each for p in parameters}

    def of(self, parameter: nn.Parameter) -> int:
        """The gate before which the parameter must have been moved."""
        return self._gate.get(id(parameter), 0)

    def runs(self, parameters: Mapping[str, nn.Parameter]) -> list[list[slice]]:
        """For each gate the runs of neighbouring numbers, of the parameters laid flat one after the other, that must
        have been moved before it opens."""
        runs: list[list[slice]] = [[] for _ in range(self.count)]
        start, before = 0, -1
        for parameter in parameters.values():
            gate, end = self.of(parameter), start + parameter.numel()
            if gate == before:
                runs[gate][-1] = slice(runs[gate][-1].start, end)
            else:
                runs[gate].append(slice(start, end))
            start, before = end, gate
        return runs

    def open(self, gate: int) -> None:
        """All that `stream` has been given until now is what the gate waits for."""
        self._opened[gate].record(self.stream)

    def wait(self, layer: int | None) -> None:
        """Before the layer, or None before all of them, reads its weights in a pass whose gradients are wanted: no
        other pass comes before all weights are moved."""
        if self.stream is None or not torch.is_grad_enabled():
            return
        if layer is None or layer % self.layers_each == 0:
            gate = 0 if layer is None else 1 + layer // self.layers_each
            torch.cuda.current_stream(self.device).wait_event(self._opened[gate])
