"""Sentences written by several processes: the first one keeps the file and says what comes next, all of them do it.

Batches are those of one process, and rows are appended in its order, so that the file has its bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from equipoise.errors import LostProcess, UserError
from equipoise.methods.completions import Key
from equipoise.runs.ranks import ALONE, Ranks
from equipoise.runs.records import differences
from equipoise.runs.signals import StopSignals

if TYPE_CHECKING:
    from equipoise.methods.prompted import Prompted, Written

Result = TypeVar("Result")
Say = Callable[[str], None]
Job = Callable[["Prompted", Ranks, Say], Result]
"""What all ranks do together, each with its own writer. It travels to them, so it is a function of a module, or a
`partial` of one; what it raises, it raises on all."""


def made_alike(make: Callable[[], "Prompted"], ranks: Ranks) -> "Prompted":
    """The writer that each rank makes for itself. Raises, on all ranks, what making one raises, and UserError unless
    all would write the same: hosts may have other files under one name, or other hardware."""
    made: list[Prompted] = []
    ranks.each(lambda: made.append(make()))
    (writer,) = made
    seen = ranks.each(lambda: {**writer.settings, "batch size": writer.batch_size})
    for rank, settings in enumerate(seen):
        if changed := differences(seen[0], settings):
            raise UserError(
                f"process {rank} would write other sentences than process 0 ({'; '.join(changed)}): give all hosts the "
                "same files, and name --dtype and --batch-size where their hardware differs"
            )
    return writer


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

    def load(self, say: Say) -> None:
        self.have_done(_load, say)

    def __call__(self, keys: Sequence[Key], say: Say) -> Mapping[Key, "Written"]:
        return self.have_done(partial(_write, tuple(keys), self.size), say)

    def have_done(self, job: Job[Result], say: Say) -> Result:
        """On rank 0: have all ranks do the job. What it is here; raises what it raises."""
        self.ranks.first_does(lambda: job)
        return self._do(job, say)

    def lead(self, work: Callable[[], Result]) -> Result:
        """What comes of `work`, which rank 0 does and the others `follow`. Raises what it raises, on all."""
        if not self.ranks.first:
            return self._follow()
        error: Exception | None = None
        done: list[Result] = []
        try:
            done.append(work())
        except LostProcess:
            raise
        except Exception as failed:
            error = failed

        def end() -> _End:
            if error is not None:
                raise error
            return _End(done[0])

        self.ranks.first_does(end)
        return done[0]

    def _follow(self) -> Any:
        """Do what rank 0 asks for, until it is done. What fails meanwhile is rank 0's to deal with."""
        while not isinstance(asked := self.ranks.first_does(_asked), _End):
            try:
                self._do(asked, lambda line: None)
            except LostProcess:
                raise
            except Exception:
                continue
        return asked.result

    def _do(self, job: Job[Result], say: Say) -> Result:
        done = job(self.writer, self.ranks, say)
        self.stop.look()
        return done


class _End(NamedTuple):
    """Sent in place of a job when there is none any more."""

    result: Any


def have_done(writer: "Prompted | SharedWriter", job: Job[Result], say: Say) -> Result:
    """The job, done by all ranks of a shared writer, or by this process alone. Raises what it raises."""
    return writer.have_done(job, say) if isinstance(writer, SharedWriter) else job(writer, ALONE, say)


def _asked() -> Any:
    raise AssertionError("rank 0 asks")


def _load(writer: "Prompted", ranks: Ranks, say: Say) -> None:
    writer.load(say, ranks)


def _write(keys: Sequence[Key], size: int, writer: "Prompted", ranks: Ranks, say: Say) -> Mapping[Key, "Written"]:
    parts = [keys[first : first + size] for first in range(0, len(keys), size)]
    found = ranks.deal(parts, lambda part: writer(part, say))
    return {key: written for part in found for key, written in part.items()}
