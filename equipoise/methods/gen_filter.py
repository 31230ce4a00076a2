"""Generate-and-Filter: draw from the base model, keep what satisfies the constraint, stop at n or when the budget ends.

All draws go into `NAME.raw.csv`, numbered within each occupation; `NAME.csv` has the first n of each occupation that
pass, in that order, numbered anew. What is drawn next depends on the draws before and nothing else, so a killed run
goes on to the very same files. The share that passes estimates p0, and the sentences that pass are the base model
conditioned on the constraint: no distribution that always satisfies it is closer to the base model.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.measures.shares import Z_95
from equipoise.methods.completions import COMPARED, Completions, Key
from equipoise.methods.costs import Costs
from equipoise.methods.estimates import yields
from equipoise.methods.generate import NONFINITE_EXIT, Caller, Outcome, Writer, write_rows
from equipoise.methods.shared import SharedWriter
from equipoise.protocol.plural import plural
from equipoise.protocol.reward import Event
from equipoise.protocol.task import Task

if TYPE_CHECKING:
    from equipoise.methods.prompted import Prompted, Written

DRAWS_PER_ROW = 5
"""The default budget, per sentence that is wanted: enough for a yield with its interval, in a small study on a CPU.
Where one sentence in hundreds complies, no affordable number fills the file."""
MOST_RUNS = 999_999_999
"""A raw file may hold more draws than the budget of the day: what has been drawn is kept."""


def raw_path(output: Path) -> Path:
    """Where all the draws for the file `output` are kept."""
    return output.with_name(f"{output.stem}.raw{output.suffix}")


@dataclass(frozen=True)
class Wanted:
    """`n` sentences of each of the task's occupations that pass, found in at most `budget` draws in all."""

    task: Task
    event: Event
    n: int
    budget: int

    @property
    def rows(self) -> int:
        """Of the finished file."""
        return self.n * len(self.task.names)

    def passes(self, text: str) -> bool:
        return self.task.complies(text, self.event)


class Draws:
    """What to draw next, batch after batch, for the occupations that are short of sentences that pass."""

    def __init__(self, texts: Mapping[Key, str], wanted: Wanted, size: int) -> None:
        """`texts` is looked at after each batch and has to hold it by then; `size`: draws in a batch."""
        self._texts, self._wanted, self._left, self._size = texts, wanted, wanted.budget, size
        self._drawn = dict.fromkeys(wanted.task.names, 0)
        self._passed = dict.fromkeys(wanted.task.names, 0)

    @property
    def found(self) -> int:
        """Sentences that pass, at most n of each occupation."""
        return sum(min(self._wanted.n, passed) for passed in self._passed.values())

    def __iter__(self) -> Iterator[Sequence[Key]]:
        while batch := self._next():
            yield batch
            for key in batch:
                self._passed[key.occupation] += self._wanted.passes(self._texts[key])

    def expected(self, batches: int) -> list[Sequence[Key]]:
        """The next batches, fewer where the budget ends, if nothing more passes."""
        ahead = copy(self)
        ahead._drawn = dict(self._drawn)
        return [batch for _ in range(batches) if (batch := ahead._next())]

    def _next(self) -> list[Key]:
        # The least drawn first, so that the budget is shared alike whatever the size of a batch.
        names = enumerate(self._wanted.task.names)
        short = [(self._drawn[o], i, o) for i, o in names if self._passed[o] < self._wanted.n]
        heapq.heapify(short)
        size = min(self._size, self._left) if short else 0
        self._left -= size
        batch = []
        for _ in range(size):
            drawn, i, occupation = short[0]
            heapq.heapreplace(short, (drawn + 1, i, occupation))
            self._drawn[occupation] = drawn + 1
            batch.append(Key(occupation, drawn + 1))
        return batch


class Ahead:
    """A shared writer that is asked for one batch after the other, and has those written ahead that are expected next,
    one by each process. They count once they are asked for: what comes otherwise, as whenever an occupation has got
    enough, is forgotten, so that files and costs are those of one process."""

    def __init__(self, writer: SharedWriter, draws: Draws) -> None:
        self._writer, self._draws = writer, draws
        self._kept: dict[Sequence[Key], Mapping[Key, Written]] = {}
        self.batch_size, self.notices = writer.size, writer.notices
        self.describe, self.load = writer.describe, writer.load

    def __call__(self, keys: Sequence[Key], say: Callable[[str], None]) -> Mapping[Key, "Written"]:
        if tuple(keys) not in self._kept:
            parts = [tuple(keys), *map(tuple, self._draws.expected(self._writer.ranks.size - 1))]
            written = self._writer([key for part in parts for key in part], say)
            self._kept = {part: {key: written[key] for key in part} for part in parts}
        return self._kept.pop(tuple(keys))


def gen_filter(
    writer: "Prompted | SharedWriter",
    settings: Mapping[str, Any],
    output: Path,
    wanted: Wanted,
    caller: Caller,
    *,
    overwrite: bool,
) -> Outcome:
    """Draw, or go on drawing, and write both files. Raises UserError."""
    raw, task, event, say = raw_path(output), wanted.task, wanted.event, caller.say
    with (
        Completions(output, {**settings, "filter": event}, task, wanted.n, overwrite, COMPARED) as kept,
        Completions(raw, settings, task, MOST_RUNS, overwrite, COMPARED) as drawn,
    ):
        if drawn.texts:
            say(f"{raw} holds {plural(len(drawn.texts), 'draw')}")
        costs = Costs(output, "gen-filter", task, drawn.texts)
        size = writer.size if isinstance(writer, SharedWriter) else writer.batch_size
        draws = Draws(drawn.texts, wanted, size)
        through: Writer = Ahead(writer, draws) if isinstance(writer, SharedWriter) else writer
        most = f"at most {plural(wanted.budget, 'draw')} in all"
        say(
            f"drawing until {plural(wanted.n, 'sentence')} of each occupation pass{'es' * (wanted.n == 1)} "
            f"({event}), {most}"
        )
        of_found = caller._replace(progress=lambda _done, _total: caller.progress(draws.found, wanted.rows))
        status = write_rows(through, drawn, draws, wanted.budget, of_found, costs)
        if status == "stopped":
            assert caller.stop.received is not None
            say(
                f"stopped by {caller.stop.received.name} after {plural(len(drawn.texts), 'draw')}. The same "
                "command continues."
            )
            return Outcome("stopped", {}, caller.stop.exit_code, task)
        if status == "nonfinite":
            return Outcome("nonfinite", {}, NONFINITE_EXIT, task)
        drawn.finish()
        texts = select(drawn.texts, wanted)
        missing = {key: text for key, text in texts.items() if key not in kept.texts}
        if missing or not kept.texts:
            kept.start({"raw": raw.name})
            kept.append(missing)
        kept.finish()  # also where a kill came between the rows and their order
        known = yields(drawn.texts, task, event)
        costs.close(
            rows=len(texts), accepted=known["yield"]["accepted"], kl=_kl(known, len(texts) == wanted.rows),
            **known, filter=event, budget=wanted.budget,
        )  # fmt: skip
        say(_result(known, len(texts), wanted))
        return Outcome("done", texts, 0, task)


def select(texts: Mapping[Key, str], wanted: Wanted) -> dict[Key, str]:
    """The first n draws of each occupation that pass, numbered from 1."""
    kept: dict[Key, str] = {}
    counts = dict.fromkeys(wanted.task.names, 0)
    for key in sorted(texts):
        if counts[key.occupation] < wanted.n and wanted.passes(texts[key]):
            counts[key.occupation] += 1
            kept[Key(key.occupation, counts[key.occupation])] = texts[key]
    return kept


def _kl(known: Mapping[str, Any], complete: bool) -> dict[str, Any] | None:
    """KL of the sentences that pass to the base model's: −ln of the probability to pass.

    With equally many sentences of each occupation it is the mean of each one's; the interval is by the delta method
    (the variance of ln p̂ is (1−p)/accepted). Where the budget ended before, occupations are as frequent as they pass,
    and it is that of the joint distribution, −ln p0.
    """
    if complete:
        parts = [(part["value"], part["accepted"]) for part in known["yields"].values()]
        value = -sum(math.log(p) for p, _ in parts) / len(parts)
        half = Z_95 * math.sqrt(sum((1 - p) / count for p, count in parts)) / len(parts)
        how = "mean over occupations of −ln(yield), 95 % interval by the delta method"
        return {"value": value, "low": max(0.0, value - half), "high": value + half, "how": how}
    p0 = known["p0"]
    if p0 is None or not p0["value"]:
        return None
    value, low, high = (-math.log(p0[end]) + 0.0 for end in ("value", "high", "low"))
    return {"value": value, "low": low, "high": high, "how": "−ln p0 and its interval"}


def _result(known: Mapping[str, Any], rows: int, wanted: Wanted) -> str:
    share = known["yield"]
    line = (
        f"{share['accepted']:,} of {share['drawn']:,} draws pass: {percent(share['value'])} "
        f"({percent(share['low'])} to {percent(share['high'])})"
    )
    if rows < wanted.rows:
        fewest = min(known["yields"].values(), key=lambda part: part["accepted"])["accepted"]
        line += (
            f". The budget of {wanted.budget:,} draws ended with {rows:,} of the {wanted.rows:,} rows, {fewest} for "
            "the scarcest occupation: the file has fewer rows, the yield is valid all the same; a larger --budget "
            "continues"
        )
    return line


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"
