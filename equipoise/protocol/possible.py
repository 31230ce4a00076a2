"""Whether sentences that succeed can exist at all, said of a task alone: no model, no tokenizer, no automaton."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from equipoise.errors import UserError
from equipoise.protocol.lexicon import Lexicon, TermClass
from equipoise.protocol.prompts import PLACE, QUOTES, is_complete_sentence, word_count


class Occupation(NamedTuple):
    """An occupation by its three spellings."""

    name: str
    """In files."""
    frame: str
    """In the frame."""
    prompt: str
    """In prompts."""


def listed_occupations(occupations: Sequence[Occupation]) -> list[str] | dict[str, Any]:
    """As a task file lists them: by name alone where that says everything."""
    if all(name == frame == prompt for name, frame, prompt in occupations):
        return [occupation.name for occupation in occupations]
    return {
        name: frame if frame == prompt else {"frame": frame, "prompt": prompt} for name, frame, prompt in occupations
    }


def check_bounds(
    min_words: int, max_words: int, frame: str, occupations: Iterable[Occupation], lexicon: Lexicon
) -> None:
    """Raises UserError for bounds that leave no length, or none that a sentence with a term of each class can have."""
    if min_words < 0 or min_words > max_words:
        raise UserError(
            f"sentences of {min_words} to {max_words} words cannot be; give the fewest words first, and none below 0"
        )
    shortest = [min(word_count(term) for term in each.terms) for each in lexicon.classes]

    def fewest(occupation: Occupation) -> int:
        begun = frame.replace(PLACE, occupation.frame)
        present = lexicon.match(begun).terms
        return word_count(begun) + sum(n for n, terms in zip(shortest, present, strict=True) if not terms)

    longest = max(occupations, key=fewest)
    if max_words < fewest(longest):
        raise UserError(
            f"{frame.replace(PLACE, longest.frame)!r} and a term of each class come to {fewest(longest)} words, "
            f"more than the {max_words} allowed; raise the upper bound"
        )


def check_beginning(begun: str, abbreviations: tuple[str, ...]) -> None:
    """Raises UserError for a frame, with its occupation in it, that no one sentence can begin with."""
    if begun[0] in QUOTES:
        raise UserError(f"{begun!r} begins with a quotation mark, which is taken off sentences; begin it with a word")
    if not is_complete_sentence(f"{begun} x.", abbreviations):
        raise UserError(
            f"what begins with {begun!r} is more than one sentence; leave its end mark out, or list it under "
            "`abbreviations`"
        )


def unsayable(classes: Sequence[TermClass], abbreviations: tuple[str, ...]) -> TermClass | None:
    """The first class none of whose terms can stand in one sentence, since a sentence ends in each of them."""
    for each in classes:
        if not any(is_complete_sentence(f"x {term.removesuffix('*')}.", abbreviations) for term in each.terms):
            return each
    return None


def check_opening(opening: str, text: str, begun: str, max_words: int, abbreviations: tuple[str, ...]) -> None:
    """Raises UserError for an opening that no sentence which succeeds goes on from. `text`: the opening with the
    shortest words in it, as it follows `begun`, the shortest frame with its occupation."""
    if not is_complete_sentence(f"{begun}{text} x.", abbreviations) and not is_complete_sentence(
        f"{begun}{text}", abbreviations
    ):
        raise UserError(f"the opening {opening!r} is more than one sentence; leave its end mark out")
    if (words := word_count(begun + text)) > max_words:
        raise UserError(
            f"the opening {opening!r} makes sentences of {words} words or more, as in {begun + text!r}, and at most "
            f"{max_words} are allowed; shorten it, or raise the upper bound"
        )
