"""Going on in smaller parts where memory does not suffice."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from equipoise.errors import UserError
from equipoise.policy.load import Policy

Item = TypeVar("Item")
Result = TypeVar("Result")


class RowLimit:
    """Rows that are computed at a time: halved for good when memory does not suffice.

    The work that failed is done again with fewer rows. Training does a whole mini-batch again (`run`), with the same
    result, since every loss is a mean over it; sampling goes on after the rows that it has (`over`).
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
                if policy.together.size > 1:
                    raise UserError(
                        f"the GPU has too little memory for {self.rows} completions at a time, and of processes that "
                        "share layers none can try fewer: give a smaller --micro-batch-size, or "
                        "--gradient-checkpointing"
                    ) from None
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

    def over(
        self,
        items: Sequence[Item],
        work: Callable[[Sequence[Item]], Sequence[Result]],
        device: torch.device,
        say: Callable[[str], None],
    ) -> list[Result]:
        """What `work` makes of the items, at most `rows` of them at a time, also where the CPU's memory does not
        suffice. Raises what `work` raises; UserError if not even one item fits into the memory of `device`."""
        results: list[Result] = []
        while len(results) < len(items):
            part = items[len(results) : len(results) + self.rows]
            try:
                results += work(part)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
            else:
                continue
            # Outside the except block, whose error keeps the failed attempt's tensors alive.
            self.rows = len(part) // 2
            if self.rows == 0:
                raise UserError(
                    f"not even one sentence fits into the memory of {device}: free some, or use another --device"
                )
            say(f"not enough memory for {len(part)} sentences at a time: going on with {self.rows}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return results


def _out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator has no class of its own.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
