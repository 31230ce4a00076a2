"""How two documents differ, in lines short enough to be read: what is alike in two long texts is left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

LONG = 60
"""Characters of a text that are shown in full."""
LONGEST = 120
"""Characters that are shown of what differs."""
AROUND = 15
"""Characters that are shown before the place where two long texts begin to differ, and after the end of it."""
MOST = 8
"""Lines about two documents; of more, so many and their number."""


def differences(mine: Any, other: Any) -> list[str]:
    """A line for each place where the other document says something else: "words: [8, 15] → [6, 20]"."""
    lines = _differences(mine, other, "")
    return lines if len(lines) <= MOST else [*lines[: MOST - 1], f"and {len(lines) - MOST + 1} more"]


def apart(old: str, new: str) -> str:
    """`old → new`; of texts too long to be shown in full the part that differs, and a little around it."""
    return " → ".join(sides(old, new))


def sides(old: str, new: str) -> tuple[str, str]:
    """What `apart` shows of each text."""
    if max(len(old), len(new)) > LONG:
        alike = _alike(old, new)
        ends = _alike(old[alike:][::-1], new[alike:][::-1])
        first, last = max(0, alike - AROUND), max(0, ends - AROUND)
        old, new = (("…" if first else "") + text[first : len(text) - last] + "…" * (last > 0) for text in (old, new))
    cut = [text if len(text) <= LONGEST else text[: LONGEST - 1] + "…" for text in (old, new)]
    return cut[0], cut[1]


def _alike(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _differences(mine: Any, other: Any, where: str) -> list[str]:
    if not (isinstance(mine, dict) and isinstance(other, dict)):
        if isinstance(mine, list) and isinstance(other, list):
            return _of_lists(mine, other, where)
        return [] if mine == other else [f"{where}: {apart(_shown(mine), _shown(other))}"]
    lines: list[str] = []
    for key in [*mine, *(key for key in other if key not in mine)]:
        lines += _differences(mine.get(key), other.get(key), f"{where}.{key}" if where else key)
    if not lines and list(mine) != list(other):
        lines.append(f"{where}: the order {apart(_shown(list(mine)), _shown(list(other)))}")
    return lines


def _of_lists(mine: Sequence[Any], other: Sequence[Any], where: str) -> list[str]:
    if mine == other:
        return []
    old, new = _shown(list(mine)), _shown(list(other))
    if max(len(old), len(new)) <= LONGEST:
        return [f"{where}: {old} → {new}"]
    gone, come = [each for each in mine if each not in other], [each for each in other if each not in mine]
    if not gone and not come:
        return [f"{where}: the order {apart(old, new)}"]
    return [f"{where}: {_few(gone)} → {_few(come)}"]


def _few(values: Sequence[Any]) -> str:
    """Of a long list the first few."""
    return "nothing" if not values else _shown(list(values[:4])) + (f" and {len(values) - 4} more" * (len(values) > 4))


def _shown(value: Any) -> str:
    """A value in one line: a text without quotation marks around it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    written = json.dumps(value, ensure_ascii=False)
    return "nothing" if value is None else written[1:-1] if isinstance(value, str) else written
