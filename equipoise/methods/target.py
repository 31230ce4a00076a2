"""Sentences of a target π*(x) ∝ p₀(x)·[strict]·w(pair): written by Ctrl-G, resampled by their importance weights.

`near`: w = 1, the untrained model where it succeeds. `even`: w such that all pairs come alike, or in proportion to a
power of what they are in `near`, and within a pair still the untrained model. Both waste nothing: no policy with as
many successes and as even pairs is nearer to the untrained model. Compare the generation with distributional control of
M. Khalifa, H. Elsahar and M. Dymetman (ICLR 2021).
"""

import csv
import errno
import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from equipoise.errors import UserError
from equipoise.learning.collect import GPU_ROWS, search
from equipoise.learning.rounds import (
    Author,
    Rounds,
    Target,
    described,
    figures,
    groups_of,
    judged,
    learn_towards,
    softened,
    strata,
    together,
)
from equipoise.learning.search import Search
from equipoise.learning.supervised import Row, examples_of
from equipoise.measures.decomposition import Pair, PairRates, pair_rates, rates_document
from equipoise.measures.raking import systematic
from equipoise.methods.completions import Key, all_keys
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.guided import Guided, effective_size, grouped
from equipoise.methods.prompted import Prompted
from equipoise.policy import bundled
from equipoise.policy.config import SamplingConfig
from equipoise.policy.load import load_policy
from equipoise.policy.verify import settle
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.warm_start_config import WarmStartConfig
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task
from equipoise.runs.files import write_whole
from equipoise.runs.locks import in_turn
from equipoise.runs.rows import serialise
from equipoise.runs.targets import target_file, with_rates

SEED = 0
"""Of the sentences and of the choice: the same for every seed of a run."""
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
    keys, said = all_keys(runs, writer.task.names), writer.sampling.describe()
    if not writer.covers_all:
        raise UserError(f"a target needs all that succeeds strictly, and Ctrl-G samples at {said}: use 1 and 1")
    if writer.policy is None:
        writer.load(say)
    # Where the token limit cuts no sentence that succeeds, finishing within it is no condition of its own.
    if writer.event.partition(",")[0] != "strict":
        raise UserError(
            f"a target needs what succeeds strictly, and Ctrl-G writes {writer.event}: use the shape strict and the "
            "task's own bounds"
        )
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


def rates_of(found: Iterable[Weighted]) -> PairRates:
    """How often the untrained model succeeds with each pair."""
    return pair_rates(_groups(found))


def _groups(found: Iterable[Weighted]) -> list[list[tuple[Pair, float]]]:
    return grouped((each.occupation, each.pair, each.log_weight) for each in found)


def forced(writer: Guided, count: int, seed: int) -> list[Weighted]:
    """At most `count` strictly successful continuations of forced terms, every pair alike, for pairs that Ctrl-G hardly
    writes: of these the weight is not known, and stands at 0. Nothing where the task has no openings to force terms."""
    task = writer.task
    if not task.can_force:
        return []
    assert writer.policy is not None
    wanted = Search(forced=True, sentences=count, budget=2 * count)
    generator = torch.Generator().manual_seed(seed)
    examples, _ = search(writer.policy, wanted, task, writer.prompts, writer.sampling, generator, GPU_ROWS)
    return [weighted(task, Key(each.occupation, 0), each.text, 0.0) for each in examples]


def resample(
    found: Sequence[Weighted], target: Target, count: int, seed: int, spare: Sequence[Weighted] = ()
) -> Chosen:
    """About `count` sentences of the target: drawn without replacement in proportion to their weights, by the
    Gumbel-top-k trick (W. Kool, H. van Hoof and M. Welling 2019), of all of them or, for `even`, of each pair alike, or
    in proportion to the target's power of its share of the weights; a pair whose share is not known, that of `spare`
    alone among them, counts as the rarest of the others, as it does for PPO (`ppo.even`).

    No sentence comes twice as long as there are others, so a weight above the rest counts once: the more are drawn of
    those there are, the nearer is the result to what Ctrl-G wrote. A pair that has too few gets those of `spare`, and
    what it then has up to `COPIES` times. Raises UserError for more than there are.
    """
    if not 0 < count <= len(found):
        raise UserError(
            f"{plural(count, 'sentence')} cannot be drawn from {len(found):,}: ask for fewer, or write more"
        )
    generator = random.Random(seed)
    keyed = [(each.log_weight - math.log(generator.expovariate(1.0)), each) for each in found]
    keyed.sort(key=itemgetter(0), reverse=True)
    weights = [each.log_weight for each in found]
    if target.name == "near":
        return Chosen([each for _, each in keyed[:count]], effective_size(weights))
    of_pair: dict[Pair, list[Weighted]] = defaultdict(list)
    for each in (*(each for _, each in keyed), *spare):
        of_pair[each.pair].append(each)
    powers = dict.fromkeys(of_pair, 1.0)
    if target.power:
        known = {pair: rate.value for pair, rate in rates_of(found).rates.items() if rate.value > 0}
        least = min(known.values(), default=1.0)
        powers = {pair: known.get(pair, least) ** target.power for pair in of_pair}
    chosen = []
    for pair in sorted(of_pair):
        quota = math.ceil(count * powers[pair] / math.fsum(powers.values()))
        own = of_pair[pair][:quota]
        chosen += (own * min(COPIES, -(-quota // len(own))))[:quota]
    of_weights: dict[Pair, list[float]] = defaultdict(list)
    for each in found:
        of_weights[each.pair].append(each.log_weight)
    return Chosen(chosen, math.fsum(map(effective_size, of_weights.values())))


def prepared(config: TrainConfig, say: Callable[[str], None] = print) -> TrainConfig:
    """The configuration with the file that its `warm_start_target` stands for, if it has one. What Ctrl-G wrote is kept
    in the cache folder, for both targets and every run of this model, task and prompt; so are the sentences of the
    target, and beside them, `.json` added, the probabilities of the pairs.

    Raises UserError, NonFiniteLogits, NonFiniteError.
    """
    warm = config.warm_start
    if warm.target == "off":
        return config
    if warm.warm_start_file:
        return _begun_with(config, warm.warm_start_file)
    if config.system:
        raise UserError("--warm-start-target knows no system message: leave --system out, or --warm-start-target")
    sampling = SamplingConfig(1.0, 1.0, config.sampling.max_new_tokens)
    policy = replace(config.policy, tuning="full")
    _enough(warm, config.task)
    writer = Guided(policy, CtrlGConfig(), prompt=config.prompt, sampling=sampling, seed=SEED, task=config.task)
    named = [_runs(config), writer.settings, config.task.document()]
    pool = bundled.cache_folder() / f"pool-{_named(*named)}.csv"
    file = str(pool.with_name(target_file(warm.warm_start_target, _named(*named, *_decisive(config)))))
    path, beside = map(Path, with_rates(file))
    if not (path.is_file() and beside.is_file()):
        for each in (pool, path, beside):
            if each.exists() and not each.is_file():  # known now, not after the minutes that its content takes
                raise UserError(f"{each} is no file: move it away, or set EQUIPOISE_CACHE to another folder")
        with _alone(path, say):
            if not (path.is_file() and beside.is_file()):  # another may have written them meanwhile
                _write_target(config, writer, pool, (path, beside), say)
    return _begun_with(config, file)


def _write_target(
    config: TrainConfig, writer: Guided, pool: Path, files: tuple[Path, Path], say: Callable[[str], None]
) -> None:
    """Write the sentences of the target and the probabilities of the pairs, and what Ctrl-G writes for them to `pool`,
    where it is not there."""
    warm, (path, beside) = config.warm_start, files
    with _alone(pool, say):
        found = _pool(pool, writer, _runs(config), say)
    spare = []
    if warm.warm_start_target == "even":
        Prompted.load(writer, say)
        first = len(found) // FIRST if warm.warm_start_target_rounds else warm.warm_start_sentences
        spare = forced(writer, 2 * first, SEED)
    writer.unload()
    rates, rows = _of_target(config, writer, found, spare, say)
    _put(beside, json.dumps(rates_document(rates), indent=1).encode())
    _put(
        path,
        serialise([("Occupation", "RunID", "Text"), *((o, str(i), text) for i, (o, text) in enumerate(rows, 1))]),
    )


def _runs(config: TrainConfig) -> int:
    """Sentences that Ctrl-G writes for each occupation."""
    return -(-config.warm_start.warm_start_pool // len(config.task.names))


@contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """While this process writes a file of the cache, others that want it wait for it. Raises UserError."""
    lock = path.with_name(f"{path.name}.lock")
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            waits = partial(say, f"another process writes {path.name}: waiting for it")
            held.enter_context(in_turn(lock, waits))
        except OSError as error:
            raise _unwritable(lock, error) from None
        yield


def _begun_with(config: TrainConfig, file: str) -> TrainConfig:
    """The configuration with a target's file, and with the rates beside it, if they are there and no others given."""
    evaluation, beside = config.evaluation, with_rates(file)[1]
    if not evaluation.pair_rates and Path(beside).is_file():
        evaluation = replace(evaluation, pair_rates=beside)
    return replace(config, warm_start=replace(config.warm_start, warm_start_file=file), evaluation=evaluation)


def _decisive(config: TrainConfig) -> list[Any]:
    """What decides which sentences of Ctrl-G's the target has, and which others."""
    warm = config.warm_start
    # How much memory was free decides of passes that are computed again; that rounds otherwise, and nothing else.
    policy = replace(config.policy, gradient_checkpointing=False, tensor_parallel=1)
    decisive: list[Any] = [warm.warm_start_sentences, warm.warm_start_copies, warm.warm_start_target_rounds]
    decisive += [warm.warm_start_target_samples, warm.warm_start_fluency, asdict(policy), VERSION]
    decisive += [warm.warm_start_learning_rate, warm.warm_start_batch_size]
    power = config.diversity.even_power
    if not power or warm.warm_start_target != "even":
        return decisive
    # Without rounds shares below 2e-4 once counted as that.
    shares = {} if warm.warm_start_target_rounds else {"shares": "as PPO has them"}
    return [*decisive, {"even_power": power} | shares]


def _enough(warm: WarmStartConfig, task: Task) -> None:
    """Raises UserError where a sample would have fewer than two sentences of an occupation, from which no probability
    can be estimated with its error."""
    least = 2 * len(task.names)
    sizes = {"warm-start-pool": warm.warm_start_pool}
    if warm.warm_start_target_rounds:
        sizes["warm-start-target-samples"] = warm.warm_start_target_samples
    for name, size in sizes.items():
        if size < least:
            raise UserError(
                f"{name} {size} is less than two sentences for each of the {len(task.names)} occupations: give at "
                f"least {least}"
            )


def _pool(pool: Path, writer: Guided, runs: int, say: Callable[[str], None]) -> list[Weighted]:
    """Ctrl-G's sentences: those that are kept, or new ones, which then are."""
    found = _kept(pool, writer.task)
    if found is None:
        say(f"writing {plural(runs * len(writer.task.names), 'sentence')} with Ctrl-G, for the target to begin with")
        found = write(writer, runs, say)
        _put(pool, serialise([POOL, *((each.occupation, each.text, repr(each.log_weight)) for each in found)]))
    return found


def _of_target(
    config: TrainConfig, writer: Guided, found: list[Weighted], spare: list[Weighted], say: Callable[[str], None]
) -> tuple[PairRates, list[tuple[str, str]]]:
    """How often the untrained model succeeds with each pair, and (occupation, text) of sentences of the target."""
    warm, task = config.warm_start, config.task
    assert warm.warm_start_target != "off"
    count = warm.warm_start_sentences
    target = Target(warm.warm_start_target, config.diversity.even_power)
    if not warm.warm_start_target_rounds:
        chosen = resample(found, target, count, SEED, spare)
        say(f"{plural(len(chosen.sentences), 'sentence')} chosen, effective sample size {chosen.effective:,.0f}")
        return rates_of(found), [(each.occupation, each.text) for each in chosen.sentences]
    # All pairs alike, whatever the power: a policy that hardly writes a pair is a poor judge of how rare it is to be.
    chosen = resample(found, Target(target.name), max(1, len(found) // FIRST), SEED, spare)
    how = Rounds(
        rounds=warm.warm_start_target_rounds - 1,
        samples=warm.warm_start_target_samples,
        learnt=-(-warm.warm_start_target_samples // LEARNT),
        learning_rate=warm.warm_start_learning_rate,
        batch_size=warm.warm_start_batch_size,
        copies=COPIES,
        seed=SEED,
    )
    torch.manual_seed(SEED)  # adapters start at random
    policy = load_policy(config.policy, task.prompt(config.prompt), value_head=False)
    prompts, tokens = writer.prompts, config.sampling.max_new_tokens
    settle(policy, list(prompts.values()), tokens, say)
    rows = [Row(each.occupation, each.text) for each in chosen.sentences]
    first = examples_of(rows, policy.tokenizer, task, prompts, policy.stop_ids, "strict").examples
    author = Author(policy, task, prompts, tokens)
    samples = learn_towards(author, first, target, how, say)
    rates = pair_rates(_groups(found), *map(groups_of, samples))
    tilt, copies = warm.warm_start_fluency, warm.warm_start_copies
    whole = together(samples, target)
    made = judged(author, whole, target, tilt, CANDIDATES * count, copies, SEED)
    say(described(figures(made, rates), whole.effective))
    exponent, shares = softened(whole.found, whole.shares, target, count / 2)
    if exponent < 1:
        say(f"chosen by weights to the power {exponent:.2f}: too few sentences carry the target")
        made = judged(author, whole._replace(shares=shares), target, tilt, CANDIDATES * count, copies, SEED)
    taken = systematic(made.shares, strata(made.found), count, copies, SEED)
    examples = [made.found[i].example for i in taken.places]
    return rates, [(each.occupation, each.text) for each in examples]


CANDIDATES = 2
"""Sentences whose fluency is measured, for each that is chosen."""
FIRST = 6
"""The first round learns from the sixth part of what Ctrl-G wrote, by its weights,"""
LEARNT = 4
"""and the others from the fourth part of what the policy wrote."""


VERSION = 4
"""Raised when other sentences would be chosen."""
POOL = ("Occupation", "Text", "LogWeight")


def _named(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _kept(pool: Path, task: Task) -> list[Weighted] | None:
    """What was written before. None where there is none: a file is there whole or not at all."""
    try:
        with pool.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if not all(task.strict(row["Text"]) for row in rows):
            return None
        return [weighted(task, Key(row["Occupation"], 0), row["Text"], float(row["LogWeight"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _put(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "make room" if full else "see to it that a file can be written there"
    return UserError(f"cannot write {path} ({error.strerror}): {remedy}, or set EQUIPOISE_CACHE to another folder")
