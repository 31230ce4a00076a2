"""Sums over the pieces of a mini-batch, added as a balanced tree: what they round to is the same for every number of
processes."""

from collections.abc import Sequence

from torch import Tensor

from equipoise.runs.ranks import Ranks


class PieceSum:
    """The sum of all pieces' vectors, added as a balanced tree: neighbours, then neighbours of those, whatever is left
    over going up as it is. A rank adds its own subtrees as they come, so that few are kept at a time."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._subtrees: list[tuple[int, Tensor]] = []
        each = len(ranks.mine)
        self._whole = ranks.dealers == 1 or each & (each - 1) == 0
        """Whether this rank's pieces make up a subtree. If not, they go to the others one by one."""

    def add(self, piece: Tensor) -> None:
        """The next of this rank's pieces, (n,) float32; it is taken over."""
        self._subtrees.append((1, piece))
        while self._whole and len(self._subtrees) > 1 and self._subtrees[-1][0] == self._subtrees[-2][0]:
            self._join()

    @property
    def own(self) -> list[Tensor]:
        """This rank's subtrees: equally many on every rank, and the whole tree's leaves in rank order."""
        if self._ranks.dealers == 1:
            while len(self._subtrees) > 1:
                self._join()
        return [part for _, part in self._subtrees]

    def _join(self) -> None:
        (left, a), (right, b) = self._subtrees[-2:]
        self._subtrees[-2:] = [(left + right, a.add_(b))]

    def total(self) -> Tensor:
        """(n,) the same on all ranks. On GPUs with one piece each NCCL adds in its own order."""
        ranks, own = self._ranks, self.own
        if ranks.dealers == 1:
            return own[0]
        if own[0].is_cuda and ranks.pieces == ranks.size:
            ranks.reduce_(own[0])
            return own[0]
        gathered = [ranks.gather(part) for part in own]
        return tree_sum([parts[rank] for rank in range(ranks.size) for parts in gathered])


def tree_sum(leaves: Sequence[Tensor]) -> Tensor:
    """Their sum as a balanced tree over neighbours. The leaves are taken over."""
    level = list(leaves)
    while len(level) > 1:
        pairs = [a.add_(b) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]
