"""`FILE.costs.json`: what making a file's rows cost, and its method's distance to the base model, if it can tell.

    {"method": "Generate-and-Filter", "seconds": 812.5, "load_seconds": 4.2, "tokens": 1234567, "generations": 11520,
     "accepted": 40, "generations_per_accepted": 288.0, "rows": 5000, "ess": 1234.5,
     "kl": {"value": 5.65, "low": 5.4, "high": 5.9, "how": "…"},
     "p0": {"value": 0.0035, "low": 0.0016, "high": 0.0066, "n": 2560, "event": "both", "how": "…"},
     "outcomes": {"strict": [{"pair": ["bold", "caring"], "n": 17, "mean": 9.1, "variance": 4.2}, …], "both": […]},
     "pair_rates": {"event": "strict", "unseen": 1e-7, "n": 5000,
                    "pairs": [{"pair": ["bold", "caring"], "value": 2e-6, "variance": 1e-14}, …]}}

Every field may be missing. `kl` is nats per sentence; `p0` is the probability of an event under the base model. One of
`both` or `strict` serves for that event; of another event, or of none that is named, it serves for nothing.
`outcomes` are the sentences that the KL was estimated from, by pair (null: those that fail), with mean and variance of
log q − log p; `pair_rates` the probabilities of success with each pair under the base model. From both together comes
what the KL is spent on (`measures/decomposition.py`). The file
lies beside `FILE`: it may be `completions.csv.costs.json` or `completions.costs.json` for `completions.csv`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.evaluation.results import Cost, Estimate
from equipoise.measures.decomposition import Outcomes, Pair, PairRates, read_outcomes, read_rates


@dataclass(frozen=True)
class Side:
    method: str
    numbers: dict[str, float]
    kl: Estimate | None
    p0: Estimate | None
    event: str
    """What `p0` is the probability of: `both`, `strict`, or any other event by its name; empty where none is named."""
    outcomes: Mapping[str, Mapping[Pair | None, Outcomes]] = field(default_factory=dict)
    """By event."""
    pair_rates: Mapping[str, PairRates] = field(default_factory=dict)
    """By event."""


_NUMBERS = ("seconds", "load_seconds", "tokens", "generations", "accepted", "generations_per_accepted", "rows", "ess")


def read_side(path: str) -> Side | None:
    """The side file of a completions file; None if there is none. Raises UserError for one that cannot be used."""
    file = Path(path).expanduser()
    places = [file.with_name(file.name + ".costs.json"), file.with_suffix(".costs.json")]
    place = next((p for p in places if p.is_file()), None)
    if place is None:
        return None
    try:
        document = read_json(place)
        if not isinstance(document, Mapping):
            raise ValueError("no JSON object")
        numbers = {name: _number(document[name], name) for name in _NUMBERS if document.get(name) is not None}
        kl, p0 = document.get("kl"), document.get("p0")
        event = p0.get("event", "") if isinstance(p0, Mapping) else ""
        if not isinstance(event, str):
            raise ValueError(f"p0's event is {event!r:.40}, expected its name")
        return Side(
            str(document.get("method", "")),
            numbers,
            _estimate(kl, "kl", math.inf),
            _estimate(p0, "p0", 1.0),
            event,
            {name: read_outcomes(found) for name, found in _members(document, "outcomes").items()},
            {str(r["event"]): read_rates(r) for r in [_members(document, "pair_rates")] if "event" in r},
        )
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{place} cannot be used ({error}): mend it, or move it away to go without") from None


def _members(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} is {found!r:.40}, expected an object")
    return found


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r:.40}, expected a number of 0 or more")
    return float(value)


def _estimate(given: Any, name: str, most: float) -> Estimate | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} is {given!r:.40}, expected an object with value, low and high")
    ends = {k: None if given.get(k) is None else _finite(given[k], f"{name}.{k}") for k in ("value", "low", "high")}
    if ends["value"] is None:
        return None
    if name == "p0" and any(x is not None and not 0 <= x <= most for x in ends.values()):
        raise ValueError("p0 is no probability")
    n = int(_number(given.get("n") or 0, f"{name}.n"))
    whole = ends["low"] is not None and ends["high"] is not None
    kind: Literal["given", "none"] = "given" if whole else "none"
    return Estimate(ends["value"], ends["low"], ends["high"], n, kind, note=str(given.get("how", "")))


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r:.40}, expected a finite number")
    return float(value)


def cost(sides: Sequence[Side]) -> Cost | None:
    """Sums over a method's files; generations per accepted sentence from the sums where both are known."""
    if not sides:
        return None

    def total(name: str) -> float | None:
        values = [side.numbers[name] for side in sides if name in side.numbers]
        return sum(values) if values else None

    def whole(name: str) -> int | None:
        value = total(name)
        return None if value is None else round(value)

    generations, accepted = total("generations"), total("accepted")
    ratios = [side.numbers["generations_per_accepted"] for side in sides if "generations_per_accepted" in side.numbers]
    ratio = sum(ratios) / len(ratios) if ratios else None
    if generations is not None and accepted:
        ratio = generations / accepted
    return Cost(
        total("seconds"), total("load_seconds"), whole("tokens"), whole("generations"), whole("accepted"), ratio,
        total("ess"),
    )  # fmt: skip


def distance(sides: Sequence[Side]) -> Estimate | None:
    """The KL of a method: its file's, or the mean over its files, whose spread then makes the interval."""
    found = [side.kl for side in sides if side.kl is not None]
    if len(found) < 2:
        return found[0] if found else None
    from equipoise.evaluation.intervals import mean_with_t

    values = [kl.value for kl in found if kl.value is not None]
    interval = mean_with_t(values)
    assert interval is not None
    if interval.is_point:
        return Estimate(sum(values) / len(values), n=len(values), note=f"mean of {len(values)} files, which agree")
    return Estimate(
        sum(values) / len(values), max(interval.low, 0.0), interval.high, len(values), "given",
        note=f"mean of {len(values)} files, interval over them",
    )  # fmt: skip
