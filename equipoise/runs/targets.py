"""How files with the sentences of a target, which a run begins with, are named."""

import re
from pathlib import PurePath


def target_file(target: str, digest: str) -> str:
    """The name of the file with the sentences of a target, `digest` (hexadecimal) being of all that decides them."""
    return f"{target}-{digest}.csv"


def is_target_file(target: str, file: str) -> bool:
    """Whether `file` is named as `target_file` names this target's sentences: written for a run, not given."""
    return target != "off" and re.fullmatch(rf"{target}-[0-9a-f]+\.csv", PurePath(file).name) is not None


def with_rates(file: str) -> tuple[str, str]:
    """A target's file, and the one beside it with the untrained model's probabilities of pairs."""
    return file, f"{file}.json"
