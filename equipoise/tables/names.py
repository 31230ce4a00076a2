"""The names that columns go by, and how one is found by its name."""

import re
from collections.abc import Iterable, Sequence

# Compared without case, spaces, "_" and "-"; the first that a file has is taken. Of a path (`output.text`) the last
# name counts.
TEXT_NAMES = (
    "text", "sentence", "output", "sample", "completion", "response", "generatedtext", "generation", "generated",
    "outputtext", "modeloutput", "continuation", "description", "assistant", "content", "answer", "texts", "sentences",
    "outputs", "samples", "completions", "responses", "generations", "continuations", "answers", "filteredresps",
    "resps",
)  # fmt: skip
OCCUPATION_NAMES = ("occupation", "job", "profession", "occupationname", "jobtitle", "role")
MODEL_NAMES = ("model", "modelname", "modelid")
SEED_NAMES = ("seed", "randomseed")
RUN_NAMES = ("runid", "run", "sampleid", "id", "index")
METHOD, LABEL = "method", "label"
KEY = "key"
"""What stands for the name under which an object holds its rows: `{"nurse": ["The nurse was …"]}`."""

_KNOWN = {*TEXT_NAMES, *OCCUPATION_NAMES, *MODEL_NAMES, *SEED_NAMES, *RUN_NAMES, METHOD, LABEL}


def key(name: str) -> str:
    """A name as names are compared."""
    return re.sub(r"[\s_-]", "", name).casefold()


def last(name: str) -> str:
    """The last name of a path, as names are compared; numbers that make names different do not count."""
    parts = name.split(".")
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    return key(parts[-1])


def is_text(name: str, given: Sequence[str] = ()) -> bool:
    """Whether a column of that name may hold texts; `given` are names that an option gave."""
    return last(name) in TEXT_NAMES or is_given(name, given)


def is_given(name: str, given: Sequence[str]) -> bool:
    return any(name == other or key(name) == key(other) or key(name) == last(other) for other in given)


def known(names: Iterable[str]) -> int:
    """How many of the names are known."""
    return sum(last(name) in _KNOWN for name in names)


def named(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns of those names, in the order of the names; a name of a column's own comes before one at the end of
    a path."""
    plain = [column for name in names for column in columns if key(column) == name]
    nested = [column for name in names for column in columns if last(column) == name and key(column) != name]
    return [*plain, *nested]


def found(columns: Sequence[str], given: str) -> list[str]:
    """The columns that a name given by an option may mean: the one of exactly that name, else those alike."""
    if given in columns:
        return [given]
    alike = [column for column in columns if key(column) == key(given)]
    return alike or [column for column in columns if last(column) == key(given)]


def listed(columns: Sequence[str]) -> str:
    """Columns in a message."""
    return ", ".join(repr(str(name)[:40]) for name in columns[:8]) + (", …" if len(columns) > 8 else "")
