"""Which fast ways of computing a model give the numbers of its plain pass, one row by itself."""

import math
from typing import NamedTuple


class Ways(NamedTuple):
    """What `verify.settle` has found; as it stands here, a model whose attention sees all and only what went before.

    Where none of the scorer's ways holds, rows of one length are computed together without padding (`plain`); where
    none of the sampler's does, every token is a whole pass.
    """

    packed: bool = True
    """Rows that share their beginnings, as a trie in a single row."""
    padded: bool = True
    """Rows padded on the right, with a mask."""
    shared: bool = True
    """Sampling from one cache of prompts padded on the right."""
    cached: bool = True
    """Sampling from the model's own cache, prompts of one length together."""
    tokens: float = math.inf
    """Of the longest row that was compared. A longer one may reach beyond a window: it is computed plainly."""
    nodes: float = math.inf
    """Of the largest pack that was compared. A larger one is cut."""

    @property
    def fast(self) -> bool:
        return self.packed and self.shared

    def describe(self, kind: str) -> str:
        """One line for a model of type `kind` that is not computed the fast way."""
        scored = "packed" if self.packed else "padded rows" if self.padded else "rows of one length together"
        drawn = "a shared cache" if self.shared else "prompts of one length" if self.cached else "whole passes"
        return (
            f"{kind} models give other numbers when rows are {_fast_ways(self)}, so the plain way is taken everywhere: "
            f"scoring by {scored}, sampling by {drawn} (slower, same results)"
        )


def _fast_ways(ways: Ways) -> str:
    names = {"packed": ways.packed, "padded": ways.padded, "sampled from a shared cache": ways.shared}
    return " or ".join(name for name, holds in names.items() if not holds)
