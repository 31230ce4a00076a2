"""Matrices that lie below each other in memory, so that one product can use them side by side.

Query, key and value projections read the same input; so do gate and up, and the A matrices of their adapters. Where
their weights are neighbours in one buffer, and their gradients too, one view stands for all of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def adjacent_order(named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The same parameters, those that one product can use side by side next to each other.

    All A matrices of a layer's query, key and value adapters, then all of their B matrices; gate and up likewise.
    """
    order = {name: place for place, name in enumerate(named)}

    def key(name: str) -> tuple[int, str, int]:
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            for member in group:
                first, found, rest = name.partition(f".{member}.lora_")
                if found:
                    leader = f"{first}.{group[0]}.lora_A{rest[1:]}"
                    return order.get(leader, order[name]), rest, order[name]
        return order[name], "", 0

    return {name: named[name] for name in sorted(named, key=key)}


def gradient(parameter: nn.Parameter) -> Tensor:
    """Its `.grad`, zeros if it has none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    end = first.data_ptr() + first.numel() * first.element_size()
    storage = first.untyped_storage().data_ptr()  # two allocations may be neighbours by chance
    for tensor in tensors[1:]:
        if tensor.untyped_storage().data_ptr() != storage or tensor.data_ptr() != end or not tensor.is_contiguous():
            return False
        end += tensor.numel() * tensor.element_size()
    return first.is_contiguous()


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Matrices of equal width as one, below each other, or vectors as one: a view where they lie so in memory, else a
    copy."""
    first = tensors[0].detach()
    if len(tensors) == 1:
        return first
    if not _adjacent(tensors):
        return torch.cat([t.detach() for t in tensors])
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def joined_gradients(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    grads = [gradient(p) for p in parameters]
    return joined(grads) if len(grads) == 1 or _adjacent(grads) else None


def accumulate(parameters: Sequence[nn.Parameter], grad_MN: Tensor, x_MK: Tensor) -> None:
    """Add gradᵀ·x to the gradients of matrices that lie below each other."""
    grads = joined_gradients(parameters)
    if grads is not None:
        grads.addmm_(grad_MN.T, x_MK)
        return
    for parameter, part in zip(parameters, grad_MN.split([len(p) for p in parameters], 1), strict=True):
        gradient(parameter).addmm_(part.T, x_MK)


def put_together(parameters: Sequence[nn.Parameter]) -> None:
    """Let the parameters' data lie below each other; the optimizer, which moves them, keeps the order."""
    if len(parameters) > 1 and not _adjacent(parameters):
        whole = torch.cat([p.data for p in parameters])
        for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            parameter.data = part
