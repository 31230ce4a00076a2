"""Sentences written by several processes: the first one keeps the file and says what comes next, each writes a batch.

Batches are those of one process, and rows are appended in its order, so that the file has its bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from equipoise.errors import LostProcess, UserError
from equipoise.methods.completions import Key
from equipoise.runs.ranks import Ranks
from equipoise.runs.records import differences
from equipoise.runs.signals import StopSignals

if TYPE_CHECKING:
    from equipoise.methods.prompted import Prompted, Written


def check_alike(writer: "Prompted", ranks: Ranks) -> None:
    """Raises UserError, on all ranks, unless all would write the same: hosts may have other files under one name, or
    other hardware."""
    seen = ranks.each(lambda: {**writer.settings, "batch size": writer.batch_size})
    for rank, settings in enumerate(seen):
        if changed := differences(seen[0], settings):
            raise UserError(
                f"process {rank} would write other sentences than process 0 ({'; '.join(changed)}): give all hosts the "
                "same files, and name --dtype and --batch-size where their hardware differs"
            )


class SharedWriter:
    """A writer on all ranks as rank 0 sees it, as many batches at a time as there are ranks."""

    def __init__(self, writer: "Prompted", ranks: Ranks, stop: StopSignals) -> None:
        self.writer, self.ranks, self.stop = writer, ranks, stop
        self.size = writer.batch_size
        """Sentences of a batch, which stays what it is where a rank must cut it up for lack of memory."""

    @property
    def batch_size(self) -> int:
        return self.ranks.size * self.size

    @property
    def notices(self) -> Sequence[str]:
        return self.writer.notices

    def describe(self) -> str:
        return f"{self.writer.describe()} in each of {self.ranks.size} processes"

    def load(self, say: Callable[[str], None]) -> None:
        self.ranks.first_does(lambda: ())  # no keys: load
        self._work((), say)

    def __call__(self, keys: Sequence[Key], say: Callable[[str], None]) -> Mapping[Key, "Written"]:
        self.ranks.first_does(lambda: tuple(keys))
        return self._work(keys, say)

    def follow(self) -> None:
        """On the other ranks: do what rank 0 asks for, until it asks for nothing more. Whatever fails is rank 0's to
        deal with."""
        while (keys := self.ranks.first_does(lambda: None)) is not None:
            try:
                self._work(keys, lambda line: None)
            except LostProcess:
                raise
            except Exception:
                continue

    def _work(self, keys: Sequence[Key], say: Callable[[str], None]) -> Mapping[Key, "Written"]:
        if not keys:
            self.ranks.each(lambda: self.writer.load(say))
            return {}
        parts = [keys[first : first + self.size] for first in range(0, len(keys), self.size)]
        found = self.ranks.deal(parts, lambda part: self.writer(part, say))
        self.stop.look()
        return {key: written for part in found for key, written in part.items()}

    @contextmanager
    def leading(self) -> Iterator[None]:
        """On rank 0: afterwards the others are told that there is nothing more to do."""
        try:
            yield
        except LostProcess:
            raise
        except Exception:
            self.ranks.first_does(lambda: None)
            raise
        else:
            self.ranks.first_does(lambda: None)
