"""The sentences of a report's sample browser, compact, with the places of their terms found by the one matcher."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.protocol.lexicon import Lexicon

OUTCOMES = ("strict success", "both, not strict", "agentic only", "communal only", "neither")
"""What a sentence can be; every sentence is exactly one."""
_OUTCOME = {"both": 1, "agentic": 2, "communal": 3, "neither": 4}
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
    """Position in `OUTCOMES`."""
    why: str
    """Why a sentence with both classes is no strict success, and that it is a duplicate; else empty."""
    words: int
    parts: tuple[float, ...]
    """Of the reward, in the order of `PARTS`."""
    nll: float | None
    """Nats per token under the first judge."""
    spans: tuple[tuple[int, int, str], ...]
    """(start, end, class) of each term in `text`; class is `agentic` or `communal`. None overlaps another."""

    @property
    def pieces(self) -> list[tuple[str, str]]:
        """(text, class) from left to right; class is empty between terms."""
        out, end = [], 0
        for start, stop, kind in self.spans:
            out += [(self.text[end:start], ""), (self.text[start:stop], kind)]
            end = stop
        return [piece for piece in [*out, (self.text[end:], "")] if piece[0]]


def sample(row: Mapping[str, str], lexicon: Lexicon, nll_column: str | None, seeds: bool) -> Sample:
    """A row of rows.csv as a sample. `seeds`: whether to name the row's seed. Raises KeyError, ValueError."""
    both, strict = row["Outcome"] == "both", row["Strict"] == "1"
    why = []
    if both and not strict:
        why += [f"{row['WordCount']} words"] if row["InLength"] != "1" else []
        why += ["not one complete sentence"] if row["Sentence"] != "1" else []
    if row["Duplicate"] == "1":
        why.append("duplicate")
    spans, end = [], 0
    for span in lexicon.spans(row["Text"]):
        if span.start >= end:  # a term inside the one marked before is not marked again
            spans.append((span.start, span.end, "agentic" if span.term in lexicon.agentic else "communal"))
            end = span.end
    nll = row.get(nll_column or "")
    return Sample(
        method=row["Method"],
        occupation=row["Occupation"],
        run=visible(row["RunID"] + (f" (seed {row['Seed']})" if seeds and row["Seed"] else "")),
        text=visible(row["Text"]),
        outcome=0 if strict else _OUTCOME[row["Outcome"]],
        why=", ".join(why),
        words=int(row["WordCount"]),
        parts=tuple(float(row[part]) for part in PARTS),
        nll=float(nll) if nll else None,
        spans=tuple(spans),
    )


def embedded(samples: Iterable[Sample], judge: str | None) -> dict[str, Any]:
    """What the page's script reads: names once, and for each sentence one short list.

    A list is [method, occupation, run, text, outcome, why not strict, words, four parts of the reward, NLL, spans]; the
    first, second and fifth are positions in the lists of names; spans are start, end, 0 for agentic or 1 for communal,
    again and again, counted in UTF-16 units, as a browser counts.
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
    return {"methods": names[0], "occupations": names[1], "outcomes": OUTCOMES, "judge": judge, "rows": rows}


def _utf16(one: Sample) -> list[int]:
    at: Sequence[int] = range(len(one.text) + 1)
    if one.spans and max(one.text) > "\uffff":
        places = [0]
        for character in one.text:
            places.append(places[-1] + (2 if character > "\uffff" else 1))
        at = places
    return [number for start, end, kind in one.spans for number in (at[start], at[end], int(kind == "communal"))]
