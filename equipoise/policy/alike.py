"""Whether the processes of a run have the same model: hosts may hold other files under one name, or other hardware."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.errors import UserError
from equipoise.policy.eightbit import MOST
from equipoise.policy.load import Policy
from equipoise.runs.ranks import Ranks

CHUNK = 1 << 24
"""Numbers that are added at a time: a CPU copies them to 64 bits first."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number → what its bits are read as."""


class Facts(NamedTuple):
    """What decides a process's share of the numbers."""

    device: str
    dtype: str
    tokens: str
    """A hash of the token ids of what is read, and of the stop tokens."""
    weights: int
    """64 bits that change with any bit of a weight that is not trained, and so is never sent to others."""


FAULTS = (
    "works on another device ({} and {}): start each where there is a GPU for it, or give --device cpu",
    "computes in another dtype ({} and {}): name one with --dtype",
    "reads the texts as other tokens: give all hosts the same tokenizer",
    "has other weights: give all hosts the same model files",
)
"""What a difference is told as, with process 0's first."""


def check_alike(policy: Policy, prompts: Sequence[Sequence[int]], ranks: Ranks) -> None:
    """Raises UserError, on all ranks, unless all have the same weights, prompts, dtype and kind of device."""
    compare(lambda: facts(policy, prompts), ranks)


def compare(find: Callable[[], Facts], ranks: Ranks) -> None:
    """Raises UserError, on all ranks, unless all find the same."""
    if ranks.size == 1:
        return
    seen = ranks.each(find)
    for rank, own in enumerate(seen):
        for fault, first, other in zip(FAULTS, seen[0], own, strict=True):
            if other != first:
                raise UserError(f"process {rank} is not as process 0: it {fault.format(first, other)}")


def facts(policy: Policy, prompts: Sequence[Sequence[int]]) -> Facts:
    """Those of this process."""
    tokens = [list(map(list, prompts)), list(policy.stop_ids)]
    return facts_of(policy.device, policy.dtype, tokens, _kept(policy))


def facts_of(device: torch.device, dtype: torch.dtype, tokens: object, weights: Iterable[Tensor]) -> Facts:
    """`tokens`: lists of token ids, within lists."""
    hashed = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]
    return Facts(device.type, str(dtype).removeprefix("torch."), hashed, digest(weights))


def _kept(policy: Policy) -> Iterable[Tensor]:
    """Weights that are not trained, and those in 8 bits."""
    for model in (policy.model, policy.reference):
        if model is not None:
            yield from (p for p in model.parameters() if not p.requires_grad)
            yield from (b for b in model.buffers() if b.dtype in MOST)


@torch.no_grad()
def digest(tensors: Iterable[Tensor]) -> int:
    """64 bits that change with any one bit of the tensors, or where two of them change places."""
    sums = [
        part.sum(dtype=torch.int64) * place
        for place, tensor in enumerate(tensors, 1)
        for part in torch.split(tensor.view(BITS[tensor.element_size()]).reshape(-1), CHUNK)
    ]
    return int(torch.stack(sums).sum()) if sums else 0
