"""Rotations that leave no value of a row alone far above the others: groups of neighbours times a Hadamard matrix."""

import torch
from torch import Tensor


def group_of(width: int) -> int:
    """How many neighbouring inputs of a layer are rotated together: the largest power of two that divides their number,
    of at most 128, and of at most a 16th of that number rounded up to a power of two; below 16 none are, which is 1."""
    group = min(128, width & -width, (1 << (width - 1).bit_length()) // 16)
    return group if group >= 16 else 1


def rotated(x: Tensor) -> Tensor:
    """x (M, K) in float32, each group of its columns times H, the Hadamard matrix of G in natural order: entries ±1,
    −1 to the number of bits that row and column share. H = Hᵀ, H·H = G."""
    group = group_of(x.shape[1])
    i = torch.arange(group, device=x.device)
    shared = i[:, None] & i
    bits = sum((shared >> place) & 1 for place in range(group.bit_length()))
    return (x.float().view(len(x), -1, group) @ (1.0 - 2.0 * (bits % 2))).view(x.shape)
