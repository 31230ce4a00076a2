"""Memory that nobody needs during a pass, given out piece by piece: the cache of decoding, while a model learns."""

from torch import Tensor

from equipoise.policy.graphs import ALIGNED, round_up


class Spare:
    """Pieces of a buffer, one after the other; nothing of None."""

    def __init__(self, buffer: Tensor | None) -> None:
        self._flat = buffer.view(-1) if buffer is not None else None
        self._taken = 0

    def take(self, like: Tensor, rows: int, width: int) -> Tensor | None:
        """A matrix of `like`'s dtype; None where the buffer is of another, or has no room left for it."""
        end = self._taken + rows * width
        if self._flat is None or end > len(self._flat) or self._flat.dtype != like.dtype:
            return None
        piece = self._flat[self._taken : end].view(rows, width)
        self._taken = round_up(end, ALIGNED)
        return piece
