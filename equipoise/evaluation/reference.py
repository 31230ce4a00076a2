"""Published numbers beside ours: the public study's, built in, and others from a file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from equipoise.documents import LARGEST_YAML, read_json, read_yaml
from equipoise.errors import UserError
from equipoise.evaluation.results import Reference
from equipoise.protocol.task import PROTOCOL, Task

STUDY = "arXiv 2510.22084"

_SAME = "the same substring formula; models and decoding differ"
_UNFILTERED = "the rows called filtered were scored unfiltered"
_BEAMS = "at most 16 beam outputs per occupation, repeated up to N"
_NO_LENGTH = "the same substring formula; the texts were not checked for length"
_PPL = "its perplexities compare full sentences with continuations"
_PER_LIST = "presence or occurrence of terms: the paper does not say which is counted"


def _rows() -> list[Reference]:
    out: list[Reference] = []

    def add(
        method: str, n: int, comparable: bool, why: str, metric: str, value: float, high: float | None = None
    ) -> None:
        fluency, term_use = metric.startswith("study/ppl"), metric.startswith("study/entropy")
        reason = _PPL if fluency else f"{why}; {_PER_LIST}" if term_use else why
        out.append(Reference(STUDY, method, metric, value, high, n, comparable and not fluency, reason))

    ppl = "study/ppl@gpt2"
    for model, either, perplexity in (
        ("GPT-4o", 0.1281, 65.0),
        ("Llama-4-Scout", 0.2033, 65),
        ("Llama-3.3-70B", 0.1795, 111),
    ):
        method = f"prompt-only, {model}"
        add(method, 2100, True, _SAME, "study/both", 0.0)
        add(method, 2100, True, _SAME, "study/either", either)
        add(method, 2100, True, _SAME, ppl, perplexity)
    add("prompt-only, three models", 2100, True, _SAME, "study/entropy", 0.79, 1.18)
    for model, either in (("GPT-4o", 0.1275), ("Llama-4-Scout", 0.2055), ("Llama-3.3-70B", 0.1795)):
        method = f"generate-and-filter, {model}"
        add(method, 2000, False, _UNFILTERED, "study/both", 0.0)
        add(method, 2000, False, _UNFILTERED, "study/either", either)
    add("generate-and-filter, three models", 2000, False, _UNFILTERED, "study/entropy", 0.82, 1.21)
    add("generate-and-filter, three models", 2000, False, _UNFILTERED, ppl, 64, 110)
    for method, n, both, either_share, bits, pairs, other_ppl in (
        ("Ctrl-G (OR), gpt2-large", 10_240, 0.0, 0.9969, 0.945, 0, 20.31),
        ("Ctrl-G (AND), gpt2-large", 10_000, 1.0, 1.0, 1.313, 13, 29.53),
    ):
        for metric, value in (("both", both), ("either", either_share), ("entropy", bits), ("pairs", pairs)):
            add(method, n, False, _BEAMS, f"study/{metric}", value)
        add(method, n, False, _BEAMS, ppl, other_ppl)
    for method, both, spread, other, bits, pairs, other_ppl in (
        ("SFT (LoRA, 750 template sentences)", 0.9987, 0.0015, None, 3.284, 100, 67.77),
        ("DPO", 0.0453, 0.0082, 0.3371, 1.845, 24, 76.77),
        ("INLP", 0.0009, 0.0005, None, 1.956, 4, 33.57),
    ):
        add(method, 15_000, True, f"{_NO_LENGTH}; ± {spread:.2%} in the paper", "study/both", both)
        if other is not None:
            add(method, 15_000, True, _NO_LENGTH, "study/either", other)
        add(method, 15_000, True, _NO_LENGTH, "study/entropy", bits)
        add(method, 15_000, True, f"{_NO_LENGTH}; grows with n", "study/pairs", pairs)
        add(method, 15_000, True, _NO_LENGTH, ppl, other_ppl)
    return out


STUDY_ROWS: tuple[Reference, ...] = tuple(_rows())
"""The public study's table. Shares are 0 to 1 as ours are."""

NOT_OURS = (
    f"the numbers published in {STUDY} are left out: they are of the terms, occupations and frame of the task "
    f"{PROTOCOL.name}"
)
"""Why an evaluation of another task has none of them."""


def is_of_the_study(task: Task) -> bool:
    """Whether the task asks for what the public study's methods were asked for; it checked no length."""
    return (task.classes, task.occupations, task.frame) == (PROTOCOL.classes, PROTOCOL.occupations, PROTOCOL.frame)


def read_reference(path: Path) -> tuple[Reference, ...]:
    """Rows of a YAML or JSON list of objects with method, metric and value, and any of source, high, n, comparable,
    why. Without `comparable` a row is not. Raises UserError."""
    try:
        json = path.suffix.lower() == ".json"
        document = read_json(path, largest=LARGEST_YAML, unique=True) if json else read_yaml(path, "a reference")
        if not isinstance(document, list):
            raise ValueError("it is no list")
        return tuple(_row(item, path) for item in document)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the reference {path} ({error.strerror}): give a YAML or JSON file") from None
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} holds no reference rows ({reason}): give a list of {{method, metric, value}}"
        ) from None


_FIELDS = ("source", "method", "metric", "value", "high", "n", "comparable", "why")


def _row(item: Any, path: Path) -> Reference:
    if not isinstance(item, Mapping) or not {"method", "metric", "value"} <= item.keys():
        raise ValueError(f"a row is {str(item)[:60]!r}, expected method, metric and value")
    if unknown := [name for name in item if name not in _FIELDS]:
        raise ValueError(f"there is no field {unknown[0]!r}; the fields are {', '.join(_FIELDS)}")
    value, high = (None if item.get(name) is None else float(item[name]) for name in ("value", "high"))
    if any(x is not None and not math.isfinite(x) for x in (value, high)):
        raise ValueError(f"the value of {item['method']!r} is not finite")
    n = None if item.get("n") is None else int(item["n"])
    comparable = item.get("comparable", False)
    if not isinstance(comparable, bool):
        raise ValueError(f"comparable is {comparable!r}, expected true or false")
    why = str(item.get("why", "" if comparable else "the file does not say that it is comparable"))
    source, method, metric = str(item.get("source", path.name)), str(item["method"]), str(item["metric"])
    return Reference(source, method, metric, value, high, n, comparable, why)
