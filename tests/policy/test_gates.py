"""Gates: all weights lie behind one, and a layer's behind the one that it waits at."""

import pytest
import torch
from torch import nn

from equipoise.policy.gates import PARTS, Gates


@pytest.mark.parametrize("layers", [1, 2, 8, 9, 30])
def test_every_number_is_moved_once_and_before_the_layer_that_reads_it(layers: int) -> None:
    names = ["head", *(f"layers.{i}.{name}" for i in range(layers) for name in ("a", "b")), "norm"]
    sizes = torch.arange(1, len(names) + 1).tolist()
    parameters = {name: nn.Parameter(torch.zeros(n)) for name, n in zip(names, sizes, strict=True)}
    gates = Gates(torch.device("cpu"), layers)
    for i in range(layers):
        gates.add(i, (p for name, p in parameters.items() if name.startswith(f"layers.{i}.")))
    runs = gates.runs(parameters)
    moved = [number for behind in runs for run in behind for number in range(run.start, run.stop)]
    assert sorted(moved) == list(range(sum(sizes))) and len(runs) == gates.count <= PARTS + 1
    assert sum(map(len, runs)) <= gates.count + 1
    ends = torch.tensor(sizes).cumsum(0).tolist()
    for name, size, end in zip(names, sizes, ends, strict=True):
        behind = [g for g, each in enumerate(runs) for run in each if run.start <= end - size and end <= run.stop]
        layer = int(name.split(".")[1]) if "." in name else None
        # A layer waits where the first of those does that share a gate, and nothing is read before that.
        assert behind == [0 if layer is None else 1 + layer // gates.layers_each]
