"""The pairs of first terms that sentences hold, as `Method.pairs` of evaluation.json has them: written and read.

A pair is the combination of a sentence's first term of each class, however many classes there are.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

Table = tuple[tuple[int, ...], ...]


def table(pairs: Counter[tuple[str, ...]], classes: Mapping[str, Sequence[str]]) -> Table:
    """Numbers in the form that `Method.pairs` describes."""
    places = [{term: i for i, term in enumerate(terms)} for terms in classes.values()]
    found = [(tuple(own[term] for own, term in zip(places, pair, strict=True)), n) for pair, n in pairs.items()]
    if len(places) > 2:
        return tuple((*at, n) for at, n in sorted(found, key=lambda each: each[::-1], reverse=True))
    rows = [[0] * len(places[-1]) for _ in range(len(places[0]) if len(places) == 2 else 1)]
    for at, n in found:
        rows[at[0] if len(places) == 2 else 0][at[-1]] = n
    return tuple(map(tuple, rows))


def counted(pairs: Table, classes: Mapping[str, Sequence[str]]) -> list[tuple[tuple[str, ...], int]]:
    """Every pair that occurs with the number of its sentences, the commonest first; of equals the last in the lists."""
    terms = list(classes.values())
    if len(terms) > 2:
        return [(tuple(own[i] for own, i in zip(terms, row[:-1], strict=True)), row[-1]) for row in pairs]
    firsts = [(term,) for term in terms[0]] if len(terms) == 2 else [()]
    found = [
        ((*first, last), n)
        for first, row in zip(firsts, pairs, strict=True)
        for last, n in zip(terms[-1], row, strict=True)
        if n
    ]
    return sorted(reversed(found), key=lambda each: -each[1])


def total(pairs: Table, classes: Mapping[str, Sequence[str]]) -> int:
    """The sentences that hold every class."""
    return sum(n for _, n in counted(pairs, classes))
