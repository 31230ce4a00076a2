"""An input embedding whose weights stay in the host's memory: a GPU reads the few rows that it needs from there.

A pass looks up some hundred rows of the 128,256 that Llama's has, 1 GB in bfloat16. Pinned memory has an address on the
GPU too, so that its kernels, recorded ones as well, read it like its own, over PCIe; the numbers are the same.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _Mapped:
    """Pinned memory as an array of CUDA's, by NumPy's protocol, which has no bfloat16."""

    def __init__(self, host: Tensor) -> None:
        self.host = host  # lives as long as the array
        pointer = (host.data_ptr(), False)
        self.__cuda_array_interface__ = {"shape": (host.nbytes,), "typestr": "|u1", "data": pointer, "version": 2}


def keep_embedding_on_host(model: Any) -> bool:
    """Whether the weights of the model's embedding are in the host's memory from now on. They stay where they are if
    they are trained, shared with the output head or on no GPU, and where the host gives no pinned memory."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight: Tensor = embedding.weight
    if not weight.is_cuda or weight.requires_grad or (head is not None and head.weight is weight):
        return False
    try:
        host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True).copy_(weight)
    except RuntimeError:
        return False
    mapped = torch.as_tensor(_Mapped(host), device=weight.device).view(weight.dtype).view(weight.shape)
    embedding.weight = nn.Parameter(mapped, requires_grad=False)
    return True
