"""The processes that share one run: which of them this is, and the few things they do together.

Control is replicated: every rank holds all of a step's experience and decides alike, from the same bytes. Work is dealt
out in *pieces*, equal runs of rows, whose gradients are added as a balanced tree over neighbours. So the number of
pieces decides how sums are rounded, and the number of processes decides nothing. Alone, every verb is the identity and
`torch.distributed` is not imported.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from equipoise.errors import LoneError, LostProcess, UserError
from equipoise.protocol.plural import plural
from equipoise.runs.carried import CARRIED, Failure, Question, pickled, tried
from equipoise.runs.launch import end_with_launcher, launched

if TYPE_CHECKING:
    from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")
Reply = TypeVar("Reply")

COLLECTIVE = timedelta(minutes=10)
PATIENT = timedelta(hours=24)
"""While rank 0 writes, or waits for a reward, however long that takes. A process that dies is noticed at once."""


@dataclass(frozen=True)
class Ranks:
    """This process among `size`. Every verb must be called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Its number on its host, which is also its GPU's."""
    pieces: int = 1
    """Into how many a mini-batch is cut; a multiple of `size`."""
    patient: list[Any] = field(default_factory=list, compare=False, repr=False)
    """The group over which results and errors travel; empty again once this process has parted from the others."""
    waited: list[float] = field(default_factory=list, compare=False, repr=False)
    """Seconds of each wait for the others, until they are taken."""
    tensor: int = 1
    """How many share every layer of one model, and compute the same pieces: 1, or all of them."""

    @property
    def first(self) -> bool:
        """Whether this one keeps the files and speaks to the user."""
        return self.rank == 0

    def cut_into(self, pieces: int) -> Ranks:
        """The same, with so many pieces."""
        assert pieces % self.dealers == 0, (pieces, self.dealers)
        return replace(self, pieces=pieces)

    def in_pieces(self, asked: int) -> Ranks:
        """The same, with the number of pieces that was asked for; 0: one for each process. Raises UserError where they
        cannot be shared alike."""
        if asked % self.dealers:
            raise UserError(
                f"{plural(asked, 'piece')} cannot be shared alike by {self.dealers} processes: give --pieces "
                f"{self.dealers * -(-asked // self.dealers)}, or start as many processes as divide {asked}"
            )
        return self.cut_into(asked or self.dealers)

    def sharing_layers(self, count: int) -> Ranks:
        """The same, `count` of them (1 or all) sharing every layer. Raises UserError, on all."""

        def check() -> None:
            if count not in (1, self.size):
                raise UserError(
                    f"--tensor-parallel {count} needs {count} processes, and this is one of {self.size}: give "
                    f"--gpus {count}"
                )

        self.first_does(check)
        return replace(self, tensor=count, pieces=max(1, self.pieces // count))

    @property
    def dealers(self) -> int:
        """Among how many pieces are dealt out."""
        return self.size // self.tensor

    @property
    def adds_up(self) -> bool:
        """Whether gradients are sums of several, of pieces or of processes."""
        return self.pieces > 1 or self.tensor > 1

    @property
    def mine(self) -> range:
        """The pieces that are this rank's: neighbours, equally many on each."""
        each, place = self.pieces // self.dealers, self.rank // self.tensor
        return range(place * each, (place + 1) * each)

    def runs(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of each of all pieces; of unequal length where they cannot be equal."""
        return rows.tensor_split(self.pieces)

    def gather(self, x: Tensor, into: list[Tensor] | None = None) -> list[Tensor]:
        """Every rank's tensor, of one shape and dtype, in rank order; several ranks can name where they are to go."""
        if self.size == 1:
            return [x]
        import torch

        parts = [torch.empty_like(x) for _ in range(self.size)] if into is None else into
        with self._others() as dist:
            dist.all_gather(parts, x.contiguous())
        return parts

    def of_all_pieces(self, x: Tensor) -> Tensor:
        """(own pieces, …) → (all pieces, …), the same on all ranks."""
        if self.tensor == 1:
            import torch

            return torch.cat(self.gather(x)) if self.size > 1 else x
        self.share_(x)
        return x

    def exchange(self, x: Tensor) -> Tensor:
        """(n,) → (n,): every rank's equal part of `x` goes to it; what all have sent to this one, in rank order."""
        import torch

        received = torch.empty_like(x)
        with self._others() as dist:
            dist.all_to_all_single(received, x)
        return received

    def send_(self, x: Tensor, source: int, target: int) -> None:
        """Make `x` on rank `target` what it is on rank `source`; the others need not call it."""
        if source != target:
            with self._others() as dist:
                if self.rank == source:
                    dist.send(x.contiguous(), target)
                else:
                    dist.recv(x, source)

    def share_(self, x: Tensor) -> None:
        """Make `x` on every rank what it is on rank 0."""
        if self.size > 1:
            with self._others() as dist:
                dist.broadcast(x, 0)

    def reduce_(self, x: Tensor) -> None:
        """Make `x` on every rank the sum of all, added in an order of the library's own."""
        with self._others() as dist:
            dist.all_reduce(x)

    def take_waited(self) -> float:
        """Seconds that the host waited for the others since the last call. What a GPU waits is not in it."""
        seconds = sum(self.waited)
        self.waited.clear()
        return seconds

    @contextmanager
    def _others(self) -> Iterator[Any]:
        """`torch.distributed`; raises LostProcess where another process does not answer."""
        import torch
        import torch.distributed as dist

        started = time.perf_counter()
        try:
            yield dist
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = (str(error).splitlines() or [""])[0].rpartition("] ")[2].partition(". ")[0][:80]
            raise LostProcess(
                "another process of this run has ended or does not answer: the same command continues from what was "
                f"saved ({why})"
            ) from error
        self.waited.append(time.perf_counter() - started)

    def each(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` returns on every rank, in rank order. Where it raises on one, all raise that."""
        if self.size == 1:
            return [work()]
        done, error = tried(work)
        answers = [pickle.loads(data) for data in self._exchange(pickled(done, error))]
        for rank, answer in enumerate(answers):
            if isinstance(answer, Failure):
                raised = error if error is not None and rank == self.rank else answer.error(rank)
                try:
                    raise self._told(raised)
                finally:
                    del raised, error  # they hold on to the failed attempt's tensors
        return answers

    def first_does(self, work: Callable[[], Result]) -> Result:
        """Rank 0 works; all get what it returns, or raise what it raises."""
        return self.first_asks(lambda _: work(), lambda _: None)

    def first_asks(self, work: Callable[[Callable[[Item], Reply]], Result], reply: Callable[[Item], Reply]) -> Result:
        """Rank 0 works, and meanwhile may ask: `reply` of what it asks is then called on all ranks, which can talk to
        each other there, and it gets its own. All get what the work returns, or raise what it raises."""
        if self.size == 1:
            return work(reply)
        if self.first:

            def ask(what: Item) -> Reply:
                self._broadcast(pickle.dumps(Question(what)))
                return reply(what)

            try:
                done = work(ask)
            except CARRIED as error:
                self._broadcast(pickled(None, error))
                raise
            self._broadcast(pickled(done, None))
            return done
        while isinstance(answer := pickle.loads(self._broadcast(b"")), Question):
            reply(answer.what)
        if isinstance(answer, Failure):
            raise self._told(answer.error(0))
        result: Result = answer
        return result

    def deal(self, items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
        """`work` of every item, in their order, neighbours dealt to one rank. Each result must be the same, whoever
        finds it. Where `work` raises on one rank, all raise."""
        if self.size == 1:
            return [work(item) for item in items]
        if self.tensor > 1:
            found = [work(item) for item in items]
            return self.first_does(lambda: found)
        bounds = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        parts = self.each(lambda: [work(item) for item in items[slice(*bounds)]])
        return [result for part in parts for result in part]

    def one_signal(self, received: int) -> int:
        """The signal that stops the run: the first rank's that has `received` one (0: none)."""
        if self.size == 1:
            return received
        import torch

        found = torch.cat(self.gather(torch.tensor([received]))).tolist()
        return next((number for number in found if number), 0)

    def agree(self, step: int, *digests: int) -> None:
        """Raises UserError, on all ranks, unless all have the same digests (64 bits each)."""
        told = self.each(lambda: digests)
        others = [rank for rank, own in enumerate(told) if own != told[0]]
        if others:
            raise UserError(
                f"at step {step} the weights or the state of process {', '.join(map(str, others))} are not those of "
                "process 0, and nothing was saved: the same command continues from what was saved before. Where this "
                "happens again, a GPU or its memory is faulty"
            )

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        """Inside, this rank waits for no other. Raises LoneError for a UserError, of which the others do not learn."""
        try:
            yield
        except UserError as error:
            if self.size == 1:
                raise
            raise LoneError(f"process {self.rank}: {error}") from error

    def _told(self, error: BaseException) -> BaseException:
        """Marked, so that rank 0 tells the user and the others end without a word."""
        if not self.first:
            error.told = True  # type: ignore[attr-defined]
        return error

    def _exchange(self, data: bytes) -> list[bytes]:
        """Every rank's data, in rank order."""
        import torch

        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        with self._others() as dist:
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self.patient[0])
            longest = max(int(size) for size in sizes)
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, _as_tensor(data.ljust(longest, b"\0")), group=self.patient[0])
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def _broadcast(self, data: bytes) -> bytes:
        """Rank 0's data."""
        import torch

        size = torch.tensor([len(data)])
        with self._others() as dist:
            dist.broadcast(size, 0, group=self.patient[0])
            buffer = _as_tensor(data) if self.first else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(buffer, 0, group=self.patient[0])
        return buffer.numpy().tobytes()


ALONE = Ranks()


def _as_tensor(data: bytes) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those it was started with; `ALONE` without a launcher. Inside another one the same.

    Raises LoneError where it does not meet the others, LostProcess where one of those that met is gone."""
    if not launched():
        yield ALONE
        return
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK", 0))
    own = not dist.is_initialized()
    end_with_launcher()
    if not own and "cpu:" not in dist.get_backend_config():
        raise UserError(
            f"torch.distributed was started with {dist.get_backend_config()} alone: start it with cpu:gloo,cuda:nccl, "
            "or leave it to equipoise"
        )
    with _meeting():
        if own:
            _meet(local)
        patient = [dist.new_group(backend="gloo", timeout=PATIENT)]
    try:
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), local, dist.get_world_size(), patient)
        ranks.each(lambda: None)  # all have met: from here on, one that ends is not one that was never found
        yield ranks
    except BaseException:
        # NCCL would wait for processes that may never come.
        _part(patient, whole=own and "nccl" not in dist.get_backend_config())
        raise
    _part(patient, whole=own)


def _part(patient: list[Any], whole: bool) -> None:
    """Leave the group, and all others with it where it is the `whole`. A thread of gloo's may still hold memory of
    Python's from the last transfer: the process would be aborted, whatever its exit code, if the interpreter were
    shutting down when it lets go. With the last reference to a group, its threads are waited for."""
    import torch.distributed as dist

    dist.destroy_process_group(None if whole else patient[0])
    patient.clear()


@contextmanager
def _meeting() -> Iterator[None]:
    """What goes wrong where processes should meet (a port that is taken, a host that is not there), in one line."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        place, rank, size = (os.environ[name] for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE"))
        why = " ".join((str(error).strip().splitlines() or [type(error).__name__])[-1].split())[:200]
        raise LoneError(
            f"process {rank} of {size} did not meet the others at {place}:{os.environ['MASTER_PORT']} ({why}): see "
            "that all are started, that the port is free, and that each reaches it"
        ) from error


def _meet(local: int) -> None:
    """Start `torch.distributed`. With NCCL only if every process has a GPU of its own: one that it waited for and that
    never came would hold up the others for ever."""
    import torch
    import torch.distributed as dist

    store, rank, size = next(dist.rendezvous("env://", timeout=COLLECTIVE))  # type: ignore[attr-defined]
    store.set_timeout(COLLECTIVE)
    device = torch.device("cuda", local) if local < torch.cuda.device_count() else None
    if not _all_have(store, "gpu", rank, size, device is not None):
        device = None
    if device is not None:
        torch.cuda.set_device(device)  # or every process would take some memory of the first GPU
    backend = "cpu:gloo,cuda:nccl" if device is not None else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE, device_id=device)


def _all_have(store: Any, what: str, rank: int, size: int, has: bool) -> bool:
    """Whether all do, told through a store before there is any group."""
    store.set(f"equipoise/{what}/{rank}", "1" if has else "0")
    return all(store.get(f"equipoise/{what}/{other}") == b"1" for other in range(size))
