"""What travels between processes while one of them works: questions, results, and errors as what they are."""

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from equipoise.errors import NonFiniteError, UserError

Result = TypeVar("Result")


class Question(NamedTuple):
    """What rank 0 asks all while it works."""

    what: Any


class Failure(NamedTuple):
    """An error on its way to other processes."""

    pickled: bytes
    kind: type[BaseException]
    """What stands for it where it cannot be unpickled."""
    text: str

    def error(self, rank: int) -> BaseException:
        try:
            error = pickle.loads(self.pickled)
        except Exception:
            error = None
        if not isinstance(error, BaseException):
            error = self.kind(self.text)
        if type(error) is UserError and rank:
            error = UserError(f"process {rank}: {error}")
        return error


CARRIED = (Exception, SystemExit)
"""What ends the work of one ends that of all; not an interrupt, after which nobody waits."""


def tried(work: Callable[[], Result]) -> tuple[Result | None, BaseException | None]:
    """(what the work returns, None), or (None, what it raises)."""
    try:
        return work(), None
    except CARRIED as error:
        return None, error


def pickled(done: object, error: BaseException | None) -> bytes:
    """A result, or a `Failure` where there is an error."""
    if error is None:
        return pickle.dumps(done)
    import torch

    kinds = (UserError, NonFiniteError, torch.OutOfMemoryError)
    kind: type[BaseException] = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    try:
        data = pickle.dumps(error)
    except Exception:
        data = b""
    text = str(error) if kind is not RuntimeError else f"{type(error).__name__}: {error}"
    return pickle.dumps(Failure(data, kind, text))
