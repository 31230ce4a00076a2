"""How the numbers of one flat vector are dealt out to the processes that train together.

Stage 1 of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054): every rank has all weights and all gradients, in the dtype
that the model computes in; of what only the optimizer needs, each has a slice. The vector is cut into blocks and each
block into a part for every rank, so that all that travels is one block at a time.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equipoise.runs.pieces import tree_sum
from equipoise.runs.ranks import Ranks

BLOCK = 1 << 26
"""Numbers of a block: 256 MB in float32."""
ALIGNED = 16
"""Parts begin at multiples of this many numbers, where a vector unit's work on the whole vector begins anew too."""


class Block(NamedTuple):
    """`part` numbers for every rank, from `start` on; at the end of the vector some are padding. Of this rank's, `own`
    are none, and they lie at `place` of its slice."""

    start: int
    part: int
    place: int
    own: int


class Segment(NamedTuple):
    """Numbers `start` to `end` of the vector, which lie at `place` of that rank's slice."""

    rank: int
    start: int
    end: int
    place: int


class Shards:
    """The cut of a vector of `count` numbers into slices, one for each of the ranks. Alone, the slice is the vector."""

    def __init__(self, count: int, ranks: Ranks) -> None:
        self.count, self.ranks = count, ranks
        self.blocks: list[Block] = []
        start = place = 0
        while start < count:
            part = count if ranks.size == 1 else _aligned(min(BLOCK, count - start), ranks.size)
            own = _clamped(count - start - ranks.rank * part, part)
            self.blocks.append(Block(start, part, place, own))
            start, place = start + part * ranks.size, place + own
        self.padded = start
        """Numbers of a whole vector, padding included."""
        self.own = place
        """Numbers of this rank's slice."""

    def whole(self, flat: Tensor, block: Block) -> Tensor:
        """A block of a padded vector."""
        return flat[block.start : block.start + block.part * self.ranks.size]

    def part(self, flat: Tensor, block: Block) -> Tensor:
        """This rank's own numbers of that block."""
        first = block.start + self.ranks.rank * block.part
        return flat[first : first + block.own]

    def slice_of(self, flat: Tensor) -> Tensor:
        """A padded vector's slice, float32, in memory of its own."""
        made = torch.empty(self.own, dtype=torch.float32, device=flat.device)
        for block in self.blocks:
            made[block.place : block.place + block.own].copy_(self.part(flat, block))
        return made

    def add_up(self, vectors: Sequence[Tensor], into: Tensor) -> None:
        """Add up all ranks' padded vectors, of whichever each has equally many: as float32, in a balanced tree over
        rank 0's, then rank 1's, … Each rank gets the sums of its own slice, for which see `summed`: they take the place
        of what `into` holds, which may be one of the vectors."""
        size = self.ranks.size
        for block in self.blocks:
            received = [self.ranks.exchange(self.whole(vector, block)).view(size, -1) for vector in vectors]
            leaves = [each[rank].float() for rank in range(size) for each in received]
            self._sums(into, block).copy_(tree_sum(leaves))

    def _sums(self, into: Tensor, block: Block) -> Tensor:
        # Two numbers of 16 bits, of which there are at least two for each of this rank's, hold one of 32.
        return self.whole(into, block).view(torch.float32)[: block.part]

    def summed(self, into: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Each block's sums, (own,) float32: views of what `add_up` has left."""
        for block in self.blocks:
            yield block, self._sums(into, block)[: block.own]

    def norm(self, into: Tensor) -> Tensor:
        """() float32, the same on all ranks: the norm of the whole vector that `add_up` has left in slices. On a CPU it
        is computed as one process does, to the last bit."""
        if into.is_cuda:
            norms = [torch.linalg.vector_norm(sums).double() for _, sums in self.summed(into)]
            squares = self.ranks.gather(torch.stack(norms).square().sum())
            return torch.stack(squares).sum().sqrt().float()
        gathered = [torch.cat(self.ranks.gather(self._sums(into, block))) for block in self.blocks]
        return torch.linalg.vector_norm(torch.cat(gathered)[: self.count], dtype=torch.float32)

    def spread(self, own: Tensor, flat: Tensor) -> None:
        """Write all ranks' slices, of which `own` is this one's, into the padded vector `flat`, in its dtype."""
        for block in self.blocks:
            part = torch.zeros(block.part, dtype=flat.dtype, device=flat.device)
            part[: block.own].copy_(own[block.place : block.place + block.own])
            self.ranks.gather(part, into=list(self.whole(flat, block).split(block.part)))

    def segments(self, start: int, end: int) -> Iterator[Segment]:
        """Who has the numbers from `start` to `end`, in their order."""
        place = [0] * self.ranks.size
        for block in self.blocks:
            for rank in range(self.ranks.size):
                first = block.start + rank * block.part
                own = _clamped(self.count - first, block.part)
                low, high = max(first, start), min(first + own, end)
                if low < high:
                    yield Segment(rank, low, high, place[rank] + low - first)
                place[rank] += own

    def collect(self, own: Tensor, start: int, end: int) -> Tensor | None:
        """On rank 0 those numbers of all ranks' slices, on the CPU; None elsewhere."""
        found = torch.empty(end - start, dtype=own.dtype) if self.ranks.first else None
        for rank, low, high, place in self.segments(start, end):
            mine = own[place : place + high - low] if self.ranks.rank == rank else own.new_empty(high - low)
            if self.ranks.rank in (0, rank):
                self.ranks.send_(mine, rank, 0)
            if found is not None:
                found[low - start : high - start].copy_(mine)
        return found

    def deal(self, numbers: Tensor | None, own: Tensor, start: int, end: int) -> None:
        """Inverse of `collect`: `numbers` from `start` to `end`, flat and on rank 0, into the slices of all."""
        for rank, low, high, place in self.segments(start, end):
            if self.ranks.rank not in (0, rank):
                continue
            mine = own[place : place + high - low] if self.ranks.rank == rank else own.new_empty(high - low)
            if numbers is not None:
                mine.copy_(numbers[low - start : high - start])
            self.ranks.send_(mine, 0, rank)


def _aligned(count: int, size: int) -> int:
    """The numbers of each of `size` parts that hold `count`."""
    return -(-count // (size * ALIGNED)) * ALIGNED


def _clamped(number: int, most: int) -> int:
    return max(0, min(number, most))
