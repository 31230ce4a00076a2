"""Warm start: a short supervised stage on sentences the model wrote itself under the constraint, before PPO.

Where compliance is rare PPO has next to nothing to learn from in its first steps. These sentences show the policy what
is paid for without leaving the model's own language: samples that happen to comply, or continuations of forced terms.
They may also come from a file, such as the sentences of another method.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from equipoise.errors import UserError
from equipoise.policy.load import Policy
from equipoise.policy.prompt import sentences_of
from equipoise.policy.sample import SamplingConfig, sample
from equipoise.ppo.evaluate import EVALUATION_ROWS, kl_to_reference, plain_nll
from equipoise.ppo.supervised import BATCH, Example, as_rollout, examples_of, read_rows, supervise
from equipoise.ppo.update import RowLimit
from equipoise.ppo.window import masked
from equipoise.protocol.lexicon import LEXICON
from equipoise.protocol.reward import strict_success


@dataclass(frozen=True)
class WarmStartConfig:
    warm_start: Literal["off", "forced", "samples"] = "off"
    """`forced` begins each sentence with one agentic and one communal term, every pair alike, and lets the model go on
    at top-p 0.95; `samples` keeps those of its free samples that comply, unchanged but rare."""
    warm_start_file: str = ""
    """Take the sentences from this completions file, of any method, whatever --warm-start says: those that succeed
    strictly."""
    warm_start_sentences: int = 256
    """Distinct sentences to learn from."""
    warm_start_candidates: int = 1
    """Find so many sentences for each that is learnt, and keep some of them as `--warm-start-keep` says."""
    warm_start_keep: Literal["likeliest", "conditional"] = "likeliest"
    """`likeliest`: of each pair of terms alike, those that the untrained model finds the likeliest, no two of one
    mould: variety, at the least price in fluency. `conditional`: resampled in proportion to π_ref/π, towards what the
    untrained model itself writes where it complies: nearness, from the second round on."""
    warm_start_rounds: int = 1
    """Rounds of finding and learning. After the first the sentences are the policy's own, as the last round left it."""
    warm_start_batch_size: int = BATCH
    """Sentences of one optimizer step."""
    warm_start_epochs: int = 2
    warm_start_learning_rate: float = 1e-4
    """Highest of the stage: it rises over a tenth of the steps and then falls to 0."""
    warm_start_budget: int = 20_000
    """Samples drawn at most in search of them."""

    @property
    def wanted(self) -> bool:
        return self.warm_start != "off" or bool(self.warm_start_file)

    def __post_init__(self) -> None:
        if self.warm_start_sentences < BATCH:
            raise UserError(f"warm-start-sentences {self.warm_start_sentences} must be at least {BATCH}")
        for name in ("warm_start_candidates", "warm_start_rounds", "warm_start_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.warm_start_epochs < 1 or self.warm_start_learning_rate <= 0:
            raise UserError(
                f"warm-start-epochs {self.warm_start_epochs} must be at least 1 and warm-start-learning-rate "
                f"{self.warm_start_learning_rate} above 0: --warm-start off leaves the stage out"
            )


def _article(term: str) -> str:
    return "an" if term[0] in "aeiou" else "a"


# How a forced sentence begins after `The X was`. Several, so that what is learnt is the terms and not one opening.
OPENINGS: tuple[Callable[[str, str], str], ...] = (
    lambda first, second: f" {first} and {second}",
    lambda first, second: f" {first}, {second},",
    lambda first, second: f" both {first} and {second}",
    lambda first, second: f" {first} but {second}",
    lambda first, second: f" {_article(first)} {first} and {second}",
    lambda first, second: f" {_article(first)} {first}, {second}",
)

FORCED_TOP_P = 0.95  # what follows a forced pair is meant to be imitated, not to be an unbiased sample
GPU_ROWS = 512  # drawn at a time where a row more costs next to nothing
CPU_ROWS = 128
CPU_TRIES = 4  # of one beginning: on a CPU, running it through the model takes as long as all that follows it
CPU_NEW_TOKENS = 20  # after a forced pair: a sentence of 15 words has ended by then


class Found(NamedTuple):
    example: Example
    pair: tuple[str, str]
    """Its first agentic and its first communal term."""


class Collected(NamedTuple):
    examples: list[Example]
    drawn: int
    """Samples that it took."""


def collect(
    policy: Policy,
    config: WarmStartConfig,
    prompts: dict[str, list[int]],
    sampling: SamplingConfig,
    generator: torch.Generator,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda found, wanted: None,
) -> list[Example]:
    """What `search` finds. Raises UserError when the budget ends with fewer than `BATCH`."""
    examples, drawn = search(policy, config, prompts, sampling, generator, batch_size, progress)
    if len(examples) < BATCH:
        raise UserError(
            f"the warm start found {len(examples)} sentences in {drawn} samples and needs at least {BATCH}: "
            "use --warm-start forced, raise --warm-start-budget, or leave it off"
        )
    return examples


def search(
    policy: Policy,
    config: WarmStartConfig,
    prompts: dict[str, list[int]],
    sampling: SamplingConfig,
    generator: torch.Generator,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda found, wanted: None,
) -> Collected:
    """Strictly successful sentences, each once, and fewer than wanted where the budget ends before.

    `prompts` maps occupations to token ids; `progress` gets the sentences found and wanted after each batch. At least
    `batch_size` are drawn at a time, more where the device does that better.
    """
    found: dict[str, Found] = {}
    is_forced = config.warm_start == "forced"
    tries = 1
    if is_forced:
        sampling = replace(sampling, top_p=min(sampling.top_p, FORCED_TOP_P))
    if policy.device.type == "cuda":
        batch_size = max(batch_size, GPU_ROWS)
    elif is_forced:
        batch_size, tries = max(batch_size, CPU_ROWS), CPU_TRIES
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, CPU_NEW_TOKENS))
    wanted = config.warm_start_sentences * config.warm_start_candidates
    cases = forced_cases(sorted(prompts), generator) if is_forced else free_cases(sorted(prompts), generator)
    drawn = 0
    while len(found) < wanted and drawn < config.warm_start_budget:
        chosen, forced = [], []
        for _ in range(batch_size // tries):
            occupation, text = next(cases)
            chosen += [occupation] * tries
            forced += [list(policy.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []] * tries
        starts = [prompts[o] + f for o, f in zip(chosen, forced, strict=True)]
        rollout = sample(policy, starts, sampling, generator)
        drawn += batch_size
        made = [
            Example(occupation, prompts[occupation], start + tokens, "")
            for occupation, start, tokens in zip(chosen, forced, rollout.completions(), strict=True)
        ]
        texts = sentences_of(policy.tokenizer, as_rollout(made), chosen)
        for example, text, done in zip(made, texts, rollout.finished_B.tolist(), strict=True):
            if done and strict_success(text):
                terms = LEXICON.match(text)
                found.setdefault(text, Found(example._replace(text=text), (terms.agentic[0], terms.communal[0])))
        progress(min(len(found), wanted), wanted)
    return Collected(_kept(policy, config, list(found.values()), sampling.temperature, generator), drawn)


def _kept(
    policy: Policy, config: WarmStartConfig, found: Sequence[Found], temperature: float, generator: torch.Generator
) -> list[Example]:
    """Those of the candidates that are learnt."""
    count = config.warm_start_sentences
    if config.warm_start_candidates == 1 or len(found) <= 1:
        return [f.example for f in found][:count]
    if config.warm_start_keep == "conditional" and config.warm_start != "forced":
        return conditional(policy, found, count, temperature, generator)
    return likeliest(policy, found, count)


def said(
    say: Callable[[str], None], label: str = "", check: Callable[[], None] = lambda: None
) -> Callable[[int, int], None]:
    """A `progress` that says a line at every tenth of the way, and calls `check` first."""
    due = 0.0

    def progress(found: int, wanted: int) -> None:
        nonlocal due
        check()
        if found >= due or found == wanted:
            say(f"{label}{found:,} of {wanted:,} sentences found")
            due = found + wanted / 10

    return progress


def forced_cases(occupations: Sequence[str], generator: torch.Generator) -> Iterator[tuple[str, str]]:
    """(occupation, how its sentence begins) without end: all pairs of terms, in both orders, equally often."""
    pairs = [(a, c) for a in LEXICON.agentic for c in LEXICON.communal]
    pairs += [(c, a) for a, c in pairs]
    while True:
        for place in torch.randperm(len(pairs) * len(occupations), generator=generator).tolist():
            first, second = pairs[place // len(occupations)]
            opening = OPENINGS[int(torch.randint(len(OPENINGS), (), generator=generator))]
            yield occupations[place % len(occupations)], opening(first, second)


def free_cases(occupations: Sequence[str], generator: torch.Generator) -> Iterator[tuple[str, str]]:
    """(occupation, nothing) without end, the occupations equally often."""
    while True:
        for place in torch.randperm(len(occupations), generator=generator).tolist():
            yield occupations[place], ""


def likeliest(policy: Policy, found: Sequence[Found], count: int) -> list[Example]:
    """The `count` sentences with the smallest `plain_nll`, in nats per token, taken from all pairs in turn.

    Sentences that repeat themselves are left out where there are enough others: a loop is what a small model finds
    likeliest of all. Each is compared with the median of its occupation, so that no occupation is left out for being
    unusual. A mould (terms and occupation masked) comes once as long as there are others.
    """
    flowing = [f for f in found if not repeats(f.example.text)]
    found = flowing if len(flowing) >= min(count, len(found)) else found
    nll = RowLimit(EVALUATION_ROWS, lambda _: None).run(
        policy, lambda r: plain_nll(policy, [f.example.text for f in found], [f.example.occupation for f in found], r)
    )
    assert len(nll) == len(found), "strict sentences all continue `The X was`"
    of_occupation = defaultdict(list)
    for f, value in zip(found, nll, strict=True):
        of_occupation[f.example.occupation].append(value)
    middle = {occupation: statistics.median(values) for occupation, values in of_occupation.items()}
    of_pair = defaultdict(list)
    for f, value in zip(found, nll, strict=True):
        of_pair[f.pair].append((value - middle[f.example.occupation], f.example.text, f.example))
    by_nll = itemgetter(0, 1)
    ranked = [(place, *entry) for own in of_pair.values() for place, entry in enumerate(sorted(own, key=by_nll))]
    ranked.sort(key=itemgetter(0, 1, 2))
    first_of_mould: dict[str, Example] = {}
    again = []
    for *_, example in ranked:
        mould = masked(example.text, example.occupation)
        if first_of_mould.setdefault(mould, example) is not example:
            again.append(example)
    return [*first_of_mould.values(), *again][:count]


def repeats(text: str) -> bool:
    """Whether a word follows itself, or two words in a row come twice."""
    words = text.lower().rstrip(".!?").split()
    pairs = list(pairwise(words))
    return any(first == second for first, second in pairs) or len(set(pairs)) < len(pairs)


def conditional(
    policy: Policy, found: Sequence[Found], count: int, temperature: float, generator: torch.Generator
) -> list[Example]:
    """`count` sentences drawn without replacement in proportion to π_ref/π, π being the policy that wrote them.

    With all of them that is importance resampling towards π_ref conditioned on success; with a share of them it goes
    part of the way, which the next round goes on from. Drawn by the Gumbel-top-k trick (Kool, van Hoof & Welling 2019).
    """
    examples = [f.example for f in found]
    log_ratio = RowLimit(EVALUATION_ROWS, lambda _: None).run(
        policy, lambda r: kl_to_reference(policy, [as_rollout(examples)], temperature, r)
    )
    uniform = torch.rand(len(examples), generator=generator, dtype=torch.float64)
    keys = -log_ratio - torch.log(-torch.log(uniform))
    return [examples[i] for i in keys.topk(min(count, len(examples))).indices.tolist()]


def read(
    path: Path, policy: Policy, config: WarmStartConfig, prompts: dict[str, list[int]], generator: torch.Generator
) -> list[Example]:
    """Strictly successful sentences of a completions file, each once, at most `config.warm_start_sentences`.

    Raises UserError for a file that is none, and for fewer than `BATCH` sentences.
    """
    found = examples_of(read_rows(path), policy.tokenizer, prompts, policy.stop_ids, "strict")
    examples = list({example.text: example for example in found.examples}.values())
    if len(examples) < BATCH:
        raise UserError(
            f"the warm start can learn from {len(examples)} sentences of {path} and needs at least {BATCH} "
            f"({found.describe()}): give another --warm-start-file"
        )
    chosen = torch.randperm(len(examples), generator=generator)[: config.warm_start_sentences]
    return [examples[i] for i in chosen.tolist()]


def warm_start(
    policy: Policy,
    config: WarmStartConfig,
    prompts: dict[str, list[int]],
    sampling: SamplingConfig,
    generator: torch.Generator,
    batch_size: int,
    *,
    packed: bool,
    say: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> None:
    """The whole stage: find the sentences, learn from them, as often as asked. `check` is called now and then, and may
    raise to end it. Raises UserError; NonFiniteError."""
    for number in range(config.warm_start_rounds):
        label = (
            f"warm start {number + 1} of {config.warm_start_rounds}" if config.warm_start_rounds > 1 else "warm start"
        )
        if config.warm_start_file and number == 0:
            examples = read(Path(config.warm_start_file), policy, config, prompts, generator)
        else:
            how = config if number == 0 else replace(config, warm_start="samples", warm_start_file="")
            examples = collect(policy, how, prompts, sampling, generator, batch_size, said(say, f"{label}: ", check))
        say(f"{label}: learning from {len(examples):,} sentences, such as {examples[0].text!r}")
        supervise(
            policy, examples, generator, batch_size=config.warm_start_batch_size, epochs=config.warm_start_epochs,
            learning_rate=config.warm_start_learning_rate, warmup=0.1, decay=True, packed=packed,
            say=partial(_labelled, say, label), check=check,
        )  # fmt: skip
        # Every new optimizer moves the weights: what was recorded before reads them where they no longer are.
        policy.graphs.clear()
        policy.decoders.clear()


def _labelled(say: Callable[[str], None], label: str, line: str) -> None:
    say(f"{label}: {line}")
