"""Sentences of a target π*(x) ∝ p₀(x)·[strict]·w(pair): written by Ctrl-G, resampled by their importance weights.

`near`: w = 1, the untrained model where it succeeds. `even`: w such that all pairs come alike, and within a pair still
the untrained model. Both waste nothing: no policy with as many successes and as even pairs is nearer to the untrained
model. Compare the generation with distributional control of M. Khalifa, H. Elsahar and M. Dymetman (ICLR 2021).
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from equipoise.errors import UserError
from equipoise.measures.decomposition import Pair, PairRates, pair_rates
from equipoise.methods.completions import Key, all_keys
from equipoise.methods.guided import Guided, effective_size
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task

Target = Literal["near", "even"]
COPIES = 4
"""A sentence is learnt so many times at most, where a pair has too few."""


class Weighted(NamedTuple):
    """A sentence of Ctrl-G."""

    occupation: str
    text: str
    pair: Pair
    log_weight: float
    """log p₀(x)/q(x), nats."""


class Chosen(NamedTuple):
    sentences: list[Weighted]
    effective: float
    """Kish's effective sample size of the weights that they were drawn by: of all, or for `even` the sum over pairs."""


def write(writer: Guided, runs: int, say: Callable[[str], None]) -> list[Weighted]:
    """`runs` sentences for each occupation. Raises UserError where Ctrl-G does not write strictly successful ones."""
    if not writer.covers_all or writer.event != "strict":
        raise UserError(
            "a target needs all that succeeds strictly: Ctrl-G at temperature 1 and top-p 1, its shape strict"
        )
    keys = all_keys(runs, writer.task.names)
    if writer.policy is None:
        writer.load(say)
    size = writer.batch_size
    found = []
    for first in range(0, len(keys), size):
        part = keys[first : first + size]
        for key, written in writer(part, say).items():
            assert written.log_weight is not None
            found.append(weighted(writer.task, key, written.text, written.log_weight))
    return found


def weighted(task: Task, key: Key, text: str, log_weight: float) -> Weighted:
    pair = task.match(text).first
    assert pair is not None, "a sentence that succeeds strictly holds every class"
    return Weighted(key.occupation, text, pair, log_weight)


def rates_of(found: Sequence[Weighted]) -> PairRates:
    """How often the untrained model succeeds with each pair."""
    groups: dict[str, list[tuple[Pair, float]]] = defaultdict(list)
    for each in found:
        groups[each.occupation].append((each.pair, math.exp(each.log_weight)))
    return pair_rates(groups.values())


def resample(found: Sequence[Weighted], target: Target, count: int, seed: int) -> Chosen:
    """About `count` sentences of the target: drawn without replacement in proportion to their weights, by the
    Gumbel-top-k trick (W. Kool, H. van Hoof and M. Welling 2019), of all of them or, for `even`, of each pair alike.

    No sentence comes twice as long as there are others, so a weight above the rest counts once: the more are drawn of
    those there are, the nearer is the result to what Ctrl-G wrote. A pair with fewer sentences than its share has them
    up to `COPIES` times. Raises UserError for more than there are.
    """
    if not 0 < count <= len(found):
        raise UserError(
            f"{plural(count, 'sentence')} cannot be drawn from {len(found):,}: ask for fewer, or write more"
        )
    generator = random.Random(seed)
    keyed = [(each.log_weight - math.log(generator.expovariate(1.0)), place) for place, each in enumerate(found)]
    if target == "near":
        chosen = [found[place] for _, place in sorted(keyed, reverse=True)[:count]]
        return Chosen(chosen, effective_size([each.log_weight for each in found]))
    of_pair: dict[Pair, list[tuple[float, int]]] = defaultdict(list)
    for key, place in keyed:
        of_pair[found[place].pair].append((key, place))
    quota, chosen, effective = math.ceil(count / len(of_pair)), [], 0.0
    for pair in sorted(of_pair):
        own = sorted(of_pair[pair], reverse=True)[:quota]
        copies = min(COPIES, -(-quota // len(own)))
        chosen += [found[place] for _, place in (own * copies)[:quota]]
        effective += effective_size([found[place].log_weight for _, place in of_pair[pair]])
    return Chosen(chosen, effective)
