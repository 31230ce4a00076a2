"""What several tests of weights in 8 bits have in common."""

import torch
from torch import nn

from equipoise.policy.eightbit import ROTATED

FORMATS = [torch.int8, ROTATED]


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    """Every weight and buffer, those outside the state dict too."""
    every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for n, t in every.items()}
