"""A reward or a rank of the user's own: called, named in every record, and what is said and kept where it fails."""

import contextlib
import functools
import hashlib
import inspect
import math
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.protocol.plural import plural
from equipoise.runs.checkpoint import Checkpoint
from equipoise.runs.files import write_file

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(sentences, occupations) → one number each."""
RankFunction = Callable[[Sequence[str], Sequence[str]], float]
"""(sentences of one evaluation, their occupations) → how good they are; the higher the better."""

TRACEBACK = "function_error.txt"
"""In the output folder: the last traceback of a function of the user's."""
DOCUMENT = "functions"
"""In a checkpoint: `Functions.document`."""


class FunctionFailed(UserError):
    """A function of the user's raised, or returned what it should not."""


class Functions(NamedTuple):
    """What stands in place of the task's reward, and of the rule that compares checkpoints."""

    reward: RewardFunction | None = None
    rank: RankFunction | None = None

    def document(self) -> dict[str, str]:
        """`reward_fn` and `rank_fn`, where there are such, each by its name and by a hash of its source."""
        out: dict[str, str] = {}
        for kind, function in (("reward_fn", self.reward), ("rank_fn", self.rank)):
            if function is not None:
                out |= {kind: name_of(function), f"{kind}_source": source_hash(function)}
        return out

    def lines(self) -> list[str]:
        """What a person reads of them before the first step."""
        facts = self.document()
        return [
            f"{what}: the function {_with_hash(facts[kind], facts[f'{kind}_source'])}, in place of the task's"
            for kind, what in (("reward_fn", "reward"), ("rank_fn", "rank of checkpoints"))
            if kind in facts
        ]

    def rewards(self, texts: Sequence[str], occupations: Sequence[str]) -> list[float]:
        """The user's reward of each sentence. Raises FunctionFailed, which names the sentence that made it fail.

        The function gets lists of its own: what it does to them is seen nowhere else."""
        assert self.reward is not None
        try:
            numbers = [float(x) for x in self.reward(list(texts), list(occupations))]
        except Exception as error:
            at = _culprit(self.reward, texts, occupations)
            raise FunctionFailed(f"reward_fn {name_of(self.reward)} raised {_said(error)} for {at}") from error
        if len(numbers) != len(texts):
            raise FunctionFailed(
                f"reward_fn {name_of(self.reward)} returned {plural(len(numbers), 'number')} for "
                f"{plural(len(texts), 'sentence')}: return one for each"
            )
        return numbers

    def rank_of(self, texts: Sequence[str], occupations: Sequence[str]) -> float | None:
        """How good an evaluation's sentences are: by `rank`, else the mean of `reward`; None where there is neither.
        Raises FunctionFailed, also for what is no finite number."""
        if self.rank is not None:
            kind, function = "rank_fn", name_of(self.rank)
            try:
                value = float(self.rank(list(texts), list(occupations)))
            except Exception as error:
                raise FunctionFailed(
                    f"rank_fn {function} raised {_said(error)} for an evaluation of {plural(len(texts), 'sentence')}"
                ) from error
        elif self.reward is not None:
            kind, function = "reward_fn", name_of(self.reward)
            value = math.fsum(self.rewards(texts, occupations)) / max(1, len(texts))
        else:
            return None
        if not math.isfinite(value):
            raise FunctionFailed(f"{kind} {function} ranks an evaluation {value}: return finite numbers")
        return value


def name_of(function: Callable[..., Any]) -> str:
    """A function as a record names it: where it is defined; of a `partial` what it calls, of another object its
    class."""
    if isinstance(function, functools.partial):
        return f"functools.partial of {name_of(function.func)}"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def source_hash(function: Callable[..., Any]) -> str:
    """The first 16 digits of the sha256 of a function's source, with its defaults and what it closes over; of an object
    its class's source and its attributes. Of values that are neither plain data nor functions only the kind counts;
    what a function takes from its module is not in it."""
    seen: set[int] = set()
    described = list(_described(function, seen))
    if _is_object(function):
        described += [_source(type(function)), *_all(seen, "attributes", getattr(function, "__dict__", {}))]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def _is_object(function: Any) -> bool:
    known = isinstance(function, (functools.partial, type)) or inspect.isroutine(function)
    return not known


def check_same(resumed: Checkpoint | None, record: Path, now: Mapping[str, str], accept: bool) -> str:
    """Raises UserError where a run that began with some functions would go on with others.

    What the run began with is in its checkpoint; `record` is its run.json, for checkpoints of before they had it. With
    `accept` one function may have become another, which is returned in words; empty where nothing has changed.
    """
    if resumed is None:
        return ""
    began: Mapping[str, Any] = {}
    if f"{DOCUMENT}.json" in resumed.files:
        began = resumed.document(DOCUMENT)
    else:
        with contextlib.suppress(OSError, ValueError):
            began = document if isinstance(document := read_json(record), Mapping) else {}
    changed, another = [], True
    for kind in ("reward_fn", "rank_fn"):
        hashed = f"{kind}_source"
        old, new = (source.get(kind) for source in (began, now))
        same = old == new and (began.get(hashed) is None or began.get(hashed) == now.get(hashed))
        another = another and (old is None) == (new is None)
        if not same:
            changed.append(f"{kind}: {_with_hash(old, began.get(hashed))} → {_with_hash(new, now.get(hashed))}")
    if changed and not (accept and another):
        going_on = "train(…, changed_functions=True) to go on with these, " if another else ""
        raise UserError(
            f"{resumed.path.parent} holds a run with other functions ({'; '.join(changed)}): give the same to continue "
            f"it, {going_on}other folders for a new run, or overwrite=True to start anew"
        )
    return "; ".join(changed)


def keep_traceback(error: FunctionFailed, output: Path) -> Path | None:
    """Write the traceback of the user's own code into the output folder, for whoever mends it; None without one.
    Raises UserError where it cannot be written."""
    if error.__cause__ is None:
        return None
    write_file(path := output / TRACEBACK, "".join(traceback.format_exception(error.__cause__)))
    return path


def _with_hash(name: Any, source: Any) -> str:
    return "none" if name is None else f"{name} (source {str(source)[:8]})" if source else str(name)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())[:120]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _culprit(function: RewardFunction, texts: Sequence[str], occupations: Sequence[str]) -> str:
    """The first sentence that the function cannot take by itself."""
    for text, occupation in zip(texts, occupations, strict=True):
        try:
            list(function([text], [occupation]))
        except Exception:
            return f"the sentence {text[:200]!r} ({occupation})"
    return f"a batch of {plural(len(texts), 'sentence')}, though for none of them alone"


def _described(value: Any, seen: set[int]) -> Iterator[str]:
    if id(value) in seen:
        return
    if isinstance(value, (type(None), bool, int, float, complex, str, bytes)):
        yield repr(value)
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        yield from _all(seen, "partial", value.func, value.args, value.keywords)
    elif isinstance(value, (list, tuple)):
        yield from _all(seen, type(value).__name__, *value)
    elif isinstance(value, Mapping):
        yield from _all(seen, "mapping", *(part for item in value.items() for part in item))
    elif isinstance(value, (set, frozenset)):
        yield from sorted(line for item in value for line in _described(item, set()))
    elif inspect.ismethod(value):
        yield from _all(seen, "method", value.__func__, value.__self__)
    elif inspect.isfunction(value):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        yield from _all(seen, _source(value), value.__defaults__, value.__kwdefaults__, cells)
    elif isinstance(value, type) or inspect.ismodule(value) or inspect.isbuiltin(value):
        yield getattr(value, "__qualname__", None) or value.__name__
    else:
        yield f"{type(value).__module__}.{type(value).__qualname__}"


def _all(seen: set[int], kind: str, *values: Any) -> Iterator[str]:
    yield kind
    for value in values:
        yield from _described(value, seen)
    yield "."


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name that is bound later
        return False
    return True


def _source(thing: Any) -> str:
    """Its source; where there is none (typed at a prompt, made by C code) its bytecode, else its name."""
    try:
        return textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError):
        code = getattr(thing, "__code__", None)
        name: str = thing.__qualname__
        return f"{code.co_code.hex()} {code.co_names} {code.co_consts}" if code is not None else name
