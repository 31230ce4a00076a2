"""Going on in smaller parts where memory does not suffice."""

from collections.abc import Callable
from typing import TypeVar

import torch

from equipoise.errors import UserError
from equipoise.policy.load import Policy

Result = TypeVar("Result")


class RowLimit:
    """Completions per forward and backward pass: halved for good when the GPU's memory does not suffice.

    The work that failed is done again in smaller parts, with the same result: every loss is a mean over the mini-batch.
    """

    def __init__(self, rows: int, say: Callable[[str], None] = print) -> None:
        self.rows = rows
        self.say = say

    def run(self, policy: Policy, attempt: Callable[[int], Result], undo: Callable[[], None] | None = None) -> Result:
        """attempt(rows), with fewer and fewer rows until it fits; `undo` first clears what a failed one has left.

        Raises UserError when a single row does not fit."""
        while True:
            try:
                return attempt(self.rows)
            except torch.OutOfMemoryError:
                if self.rows == 1:
                    raise UserError(
                        "the GPU has too little memory for a single completion: use "
                        "--gradient-checkpointing, --use-8bit, or a smaller model"
                    ) from None
            # Outside the except block, whose error keeps the failed attempt's tensors alive.
            if undo is not None:
                undo()
            self.rows //= 2
            policy.forget_recordings()
            torch.cuda.empty_cache()
            self.say(f"out of GPU memory: going on with {self.rows} completions at a time, same mini-batches")
