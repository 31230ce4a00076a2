"""`equipoise score`: the reward of sentences, in parts, for a person or for a program.

It has an argparse parser of its own, since words without quotation marks are one sentence here, which the parser of the
other commands does not offer, and since it answers within a fraction of a second.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any, NoReturn

from equipoise.documents import parse_json
from equipoise.errors import UserError
from equipoise.options import plainly, spelled
from equipoise.protocol.lexicon import Piece
from equipoise.protocol.marking import in_colour, in_marks
from equipoise.protocol.reward import Reward, RewardWeights
from equipoise.protocol.task import PROTOCOL, Task, read_task
from equipoise.short_help import ALL
from equipoise.tables.documents import flatten
from equipoise.tables.names import TEXT_NAMES, listed, named

OPTION_HELP = {
    "base_both": "base where every class is present",
    "base_one": "base where some classes are present but not all",
    "base_none": "base where no term is present",
    "bonus_per_term": "bonus for each unique term beyond the first of its class",
    "bonus_max": "the most that the bonus comes to",
    "length_penalty": "taken off outside the length bounds",
    "repetition_penalty": "taken off if a term is repeated too often",
    "max_repeats": "how often a term may occur without the repetition penalty",
}
"""What `--help` says of each field of RewardWeights."""


def main(argv: list[str]) -> int:
    """Scores one sentence for a person, or with `--json` every line of standard input; UserError for bad input."""
    options = _parse(argv)
    task = read_task(options.task) if options.task else PROTOCOL
    if options.min_words is not None or options.max_words is not None:
        task = task.with_bounds(options.min_words, options.max_words)
    weights = RewardWeights(**{field.name: getattr(options, field.name) for field in fields(RewardWeights)})
    if options.sentence:
        # Bytes that are not UTF-8 reach arguments as lone surrogates; show them as lines of input do.
        text = " ".join(options.sentence).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        given = task.score(text, weights)
        print(as_json(given, task) if options.json else describe(given, task, weights, colour=_wants_colour()))
    elif options.json:
        if sys.stdin is None:
            raise UserError("standard input is closed; `score --json` reads sentences from it, one a line")
        for text in texts(read_lines(sys.stdin.buffer)):
            # Flushed line by line, so that a program can hold a conversation with this one.
            print(as_json(task.score(text, weights), task), flush=True)
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


def texts(lines: Iterable[str]) -> Iterator[str]:
    """The sentences of the lines: a line is one, and of a line that is a JSON object the text in it.

    Raises UserError, with the line, for an object without one text, and for a line that is none after such as are.
    """
    objects = False
    for number, line in enumerate(lines, 1):
        found = _object(line)
        if found is not None:
            objects = True
            yield _text_of(found, number)
        elif objects and line.strip():
            raise UserError(f"line {number:,} of standard input is no JSON object, as a line before is: mend it")
        else:
            yield line


def _object(line: str) -> dict[str, Any] | None:
    if not line.lstrip().startswith("{"):
        return None
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _text_of(record: dict[str, Any], number: int) -> str:
    try:
        rows = flatten(record)
    except ValueError as error:
        raise UserError(f"line {number:,} of standard input: {error}") from None
    found = [name for name in named(list(rows[0]), TEXT_NAMES) if isinstance(rows[0][name], str)]
    if len(rows) != 1 or not found or len({rows[0][name] for name in found}) > 1:
        what = f"several texts ({listed(found)})" if found or len(rows) > 1 else f"no text among {listed([*rows[0]])}"
        raise UserError(
            f"line {number:,} of standard input is a JSON object with {what}: give sentences as lines, or objects with "
            "one 'text'"
        )
    return str(rows[0][found[0]])


def as_json(given: Reward, task: Task) -> str:
    """One line of JSON in ASCII, so that no encoding of the output can break it; `strict` says whether the text
    succeeds strictly."""
    return json.dumps(given.document() | {"strict": task.strict(given.text)})


def describe(given: Reward, task: Task, weights: RewardWeights, colour: bool) -> str:
    """The sentence with its terms marked, the terms, every part of the reward with its reason, and the total.

    Each class has a look of its own, without colour a kind of brackets (see `marking`).
    """
    marked = in_colour if colour else in_marks

    def listed(terms: tuple[str, ...], kind: int) -> str:
        return ", ".join(marked([Piece(term, kind)]) for term in terms) or "none"

    present = sum(map(bool, given.terms))
    some = "one class" if present == 1 else f"{present} of {len(given.terms)} classes"
    classes = task.all_classes if given.complete else some if given.some else "no term"
    extra = sum(map(len, given.terms)) - len(given.terms) if given.complete else 0
    words = f"{given.words} word{'' if given.words == 1 else 's'}"
    parts = [
        ("base", given.base, classes),
        ("bonus", given.bonus, f"{extra} extra term{'' if extra == 1 else 's'}"),
        ("length penalty", given.length_penalty, f"{words}, {task.min_words} to {task.max_words} wanted"),
        ("repetition penalty", given.repetition_penalty, f"any term more than {weights.max_repeats} times"),
    ]
    return "\n".join(
        [
            marked(task.lexicon.pieces(given.text)),
            "",
            *(
                f"{label:<20}{listed(terms, kind)}"
                for kind, (label, terms) in enumerate(zip(task.labels, given.terms, strict=True))
            ),
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
        raise UserError(f"score: {plainly(message)}; `equipoise score --help` lists the options")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="equipoise score",
        description="The reward of one sentence, in parts; with --json, of every line of standard input.",
        allow_abbrev=False,
    )
    parser.add_argument(ALL, action="help", help=argparse.SUPPRESS)  # as of the other commands; here it is all anyway
    parser.add_argument("sentence", nargs="*", help="the sentence to score")
    parser.add_argument(
        "--json", action="store_true", help="read standard input, one sentence or JSON object a line; write JSON lines"
    )
    parser.add_argument("--task", metavar="FILE", help="a task file, or the name of a packaged task")
    parser.add_argument("--min-words", type=int, metavar="N", help="fewest words without the length penalty")
    parser.add_argument("--max-words", type=int, metavar="N", help="most words without the length penalty")
    weights = parser.add_argument_group("weights of the reward")
    names = ["--help", "--json", "--task", "--min-words", "--max-words"]
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
    options, unknown = parser.parse_known_args(spelled(argv))
    if unknown:
        name = unknown[0].partition("=")[0]
        if not name.startswith("-"):
            parser.error(f"{name!r} is apart from the rest of the sentence; put the sentence in quotation marks")
        nearest = difflib.get_close_matches(name, names, n=1)
        parser.error(f"there is no option {name}" + (f", perhaps you mean {nearest[0]}" if nearest else ""))
    return options
