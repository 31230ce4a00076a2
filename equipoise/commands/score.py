"""`equipoise score`: the reward of sentences, in parts, for a person or for a program."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from typing import NoReturn

from equipoise.errors import UserError
from equipoise.protocol.lexicon import LEXICON
from equipoise.protocol.reward import Reward, RewardWeights, score

OPTION_HELP = {
    "base_both": "base where both classes are present",
    "base_one": "base where exactly one class is present",
    "base_none": "base where no term is present",
    "bonus_per_term": "bonus for each unique term beyond the first of its class",
    "bonus_max": "the most that the bonus comes to",
    "length_penalty": "taken off outside the length bounds",
    "min_words": "fewest words without the length penalty",
    "max_words": "most words without the length penalty",
    "repetition_penalty": "taken off if a term is repeated too often",
    "max_repeats": "how often a term may occur without the repetition penalty",
}
"""What `--help` says of each field of RewardWeights."""

_AGENTIC_COLOUR = ("\x1b[1;33m", "\x1b[0m")  # yellow and cyan: told apart with any colour vision
_COMMUNAL_COLOUR = ("\x1b[1;36m", "\x1b[0m")


def main(argv: list[str]) -> int:
    """Scores one sentence for a person, or with `--json` every line of standard input; UserError for bad input."""
    options = _parse(argv)
    weights = RewardWeights(**{field.name: getattr(options, field.name) for field in fields(RewardWeights)})
    if options.sentence:
        # Bytes that are not UTF-8 reach arguments as lone surrogates; show them as lines of input do.
        text = " ".join(options.sentence).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        given = score(text, weights)
        print(as_json(given) if options.json else describe(given, weights, colour=_wants_colour()))
    elif options.json:
        if sys.stdin is None:
            raise UserError("standard input is closed; `score --json` reads sentences from it, one a line")
        for line in read_lines(sys.stdin.buffer):
            # Flushed line by line, so that a program can hold a conversation with this one.
            print(as_json(score(line, weights)), flush=True)
    else:
        raise UserError('no sentence given; write `equipoise score "The nurse was ..."`, or --json to read lines')
    return 0


def read_lines(stream: Iterable[bytes]) -> Iterator[str]:
    r"""The lines of a binary stream as text, without their terminator, which is "\n" or "\r\n" and nothing else.

    An empty line is an empty text. Bytes that are not UTF-8 become U+FFFD.
    """
    for line in stream:
        if line.endswith(b"\n"):
            line = line[:-2] if line.endswith(b"\r\n") else line[:-1]
        yield line.decode("utf-8", errors="replace")


def as_json(given: Reward) -> str:
    """One line of JSON in ASCII, so that no encoding of the output can break it."""
    return json.dumps(asdict(given))


def describe(given: Reward, weights: RewardWeights, colour: bool) -> str:
    """The sentence with its terms marked, the terms, every part of the reward with its reason, and the total.

    Agentic terms are yellow and communal ones cyan; without colour they are in "[]" and "<>".
    """
    agentic, communal = (_AGENTIC_COLOUR, _COMMUNAL_COLOUR) if colour else (("[", "]"), ("<", ">"))

    def listed(terms: tuple[str, ...], marks: tuple[str, str]) -> str:
        return ", ".join(term.join(marks) for term in terms) or "none"

    classes = ("no term", "one class", "both classes")[bool(given.agentic) + bool(given.communal)]
    extra = len(given.agentic) + len(given.communal) - 2 if given.agentic and given.communal else 0
    parts = [
        ("base", given.base, classes),
        ("bonus", given.bonus, f"{extra} extra term{'' if extra == 1 else 's'}"),
        (
            "length penalty",
            given.length_penalty,
            f"{given.words} word{'' if given.words == 1 else 's'}, {weights.min_words} to {weights.max_words} wanted",
        ),
        ("repetition penalty", given.repetition_penalty, f"any term more than {weights.max_repeats} times"),
    ]
    return "\n".join(
        [
            LEXICON.mark(given.text, agentic, communal),
            "",
            f"{'agentic':<20}{listed(given.agentic, agentic)}",
            f"{'communal':<20}{listed(given.communal, communal)}",
            "",
            *(f"{name:<20}{_signed(value):<7} {reason}" for name, value, reason in parts),
            f"{'reward':<20}{_signed(given.reward)}",
        ]
    )


def _signed(value: float) -> str:
    return f"{value:+}" if value else " 0.0"


def _wants_colour() -> bool:
    """On a terminal, unless NO_COLOR is set (https://no-color.org) or the terminal is dumb."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout is not None and sys.stdout.isatty() and not plain


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"score: {message}; `equipoise score --help` lists the options")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="equipoise score",
        description="The reward of one sentence, in parts; with --json, of every line of standard input.",
        allow_abbrev=False,
    )
    parser.add_argument("sentence", nargs="*", help="the sentence to score")
    parser.add_argument(
        "--json", action="store_true", help="read standard input, one sentence a line; write JSON, one object a line"
    )
    weights = parser.add_argument_group("weights of the reward")
    names = ["--help", "--json"]
    for field in fields(RewardWeights):
        option = "--" + field.name.replace("_", "-")
        names.append(option)
        weights.add_argument(
            option,
            type=type(field.default),
            default=field.default,
            metavar="N",
            help=f"{OPTION_HELP[field.name]} (default: %(default)s)",
        )
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        if not name.startswith("-"):
            parser.error(f"{name!r} is apart from the rest of the sentence; put the sentence in quotation marks")
        nearest = difflib.get_close_matches(name, names, n=1)
        parser.error(f"there is no option {name}" + (f", perhaps you mean {nearest[0]}" if nearest else ""))
    return options
