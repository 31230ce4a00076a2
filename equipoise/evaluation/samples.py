"""The sentences of a report's sample browser, compact, with the places of their terms found by the one matcher."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.evaluation.visible import visible
from equipoise.evaluation.wording import outcomes
from equipoise.protocol.lexicon import NO_CLASS
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task

PARTS = ("Base", "Bonus", "LengthPenalty", "RepetitionPenalty")


@dataclass(frozen=True)
class Sample:
    """A sentence with everything that the browser shows of it."""

    method: str
    occupation: str
    run: str
    """Its number within the occupation, and its seed where the method has several."""
    text: str
    """With what cannot be shown made visible."""
    outcome: int
    """Position in `kinds`."""
    why: str
    """Why a sentence with every class is no strict success, and that it is a duplicate; else empty."""
    words: int
    parts: tuple[float, ...]
    """Of the reward, in the order of `PARTS`."""
    nll: float | None
    """Nats per token under the first judge."""
    spans: tuple[tuple[int, int, int], ...]
    """(start, end, number of its class) of each term in `text`. None overlaps another."""

    @property
    def pieces(self) -> list[tuple[str, int | None]]:
        """(text, number of its class) from left to right; None between terms."""
        out: list[tuple[str, int | None]] = []
        end = 0
        for start, stop, kind in self.spans:
            out += [(self.text[end:start], None), (self.text[start:stop], kind)]
            end = stop
        return [piece for piece in [*out, (self.text[end:], None)] if piece[0]]


def kinds(task: Task) -> tuple[str, ...]:
    """What a sentence can be; every sentence is exactly one."""
    return ("strict success", *outcomes(task).values())


def sample(row: Mapping[str, str], task: Task, nll_column: str | None, seeds: bool) -> Sample:
    """A row of rows.csv as a sample. `seeds`: whether to name the row's seed. Raises KeyError, ValueError."""
    both, strict = row["Outcome"] == "both", row["Strict"] == "1"
    why = []
    if both and not strict:
        why += [f"{plural(int(row['WordCount']), 'word')}"] if row["InLength"] != "1" else []
        why += ["not one complete sentence"] if row["Sentence"] != "1" else []
    if row["Duplicate"] == "1":
        why.append("duplicate")
    spans, end = [], 0
    for piece in task.lexicon.pieces(row["Text"]):
        start, end = end, end + len(piece.text)
        if piece.kind != NO_CLASS:
            spans.append((start, end, piece.kind))
    nll = row.get(nll_column or "")
    return Sample(
        method=row["Method"],
        occupation=row["Occupation"],
        run=visible(row["RunID"] + (f" (seed {row['Seed']})" if seeds and row["Seed"] else "")),
        text=visible(row["Text"]),
        outcome=0 if strict else 1 + list(outcomes(task)).index(row["Outcome"]),
        why=", ".join(why),
        words=int(row["WordCount"]),
        parts=tuple(float(row[part]) for part in PARTS),
        nll=float(nll) if nll else None,
        spans=tuple(spans),
    )


def embedded(samples: Iterable[Sample], task: Task, judge: str | None) -> dict[str, Any]:
    """What the page's script reads: names once, and for each sentence one short list.

    A list is [method, occupation, run, text, outcome, why not strict, words, four parts of the reward, NLL, spans]; the
    first, second and fifth are positions in the lists of names; spans are start, end and the number of the class, again
    and again, counted in UTF-16 units, as a browser counts.
    """
    methods: dict[str, int] = {}
    occupations: dict[str, int] = {}
    rows = [
        [
            methods.setdefault(one.method, len(methods)),
            occupations.setdefault(one.occupation, len(occupations)),
            one.run,
            one.text,
            one.outcome,
            one.why,
            one.words,
            *one.parts,
            None if one.nll is None else round(one.nll, 2),
            _utf16(one),
        ]
        for one in samples
    ]
    names: list[Sequence[str]] = [[visible(name) for name in group] for group in (methods, occupations)]
    return {
        "methods": names[0],
        "occupations": names[1],
        "outcomes": [visible(kind) for kind in kinds(task)],
        "judge": judge,
        "rows": rows,
    }


def _utf16(one: Sample) -> list[int]:
    at: Sequence[int] = range(len(one.text) + 1)
    if one.spans and max(one.text) > "\uffff":
        places = [0]
        for character in one.text:
            places.append(places[-1] + (2 if character > "\uffff" else 1))
        at = places
    return [number for start, end, kind in one.spans for number in (at[start], at[end], kind)]
