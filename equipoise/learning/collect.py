"""Sentences to learn from: found among the model's own, freely written or after terms that are put there."""

import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, permutations
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from equipoise.errors import UserError
from equipoise.learning.search import BATCH, Search
from equipoise.learning.supervised import Example, as_rollout
from equipoise.measures.shares import wilson
from equipoise.policy.config import SamplingConfig
from equipoise.policy.likelihood import EVALUATION_ROWS, continuation_nll, kl_to_reference
from equipoise.policy.load import Policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import continuation_ids, sentences_of
from equipoise.policy.sample import sample_dealt
from equipoise.protocol.plural import plural
from equipoise.protocol.prompts import open_with, word_count
from equipoise.protocol.task import Task
from equipoise.runs.ranks import ALONE, Ranks

FORCED_TOP_P = 0.95  # what follows forced terms is meant to be imitated, not to be an unbiased sample
GPU_ROWS = 512  # drawn at a time where a row more costs next to nothing
CPU_ROWS = 128
CPU_TRIES = 4  # of one beginning: on a CPU, running it through the model takes as long as all that follows it
TOKENS_PER_WORD = 4 / 3  # of English, rounded up: a sentence of 15 words has ended after 20 tokens
FEW = 0.25  # of what is wanted after forced terms: a search that cannot come to so many is given up,
USUAL_TRIES = 16  # unless the budget allows fewer samples than so many for each: then that share of what it can give
SECONDS = 10  # between lines about a search, at most
MOST_CASES = 1_000_000  # beginnings that are shuffled as one list; of more, each is drawn by itself


Progress = Callable[[int, int, int], None]
"""Gets how many sentences are found, how many are wanted, and how many samples were drawn."""


class Found(NamedTuple):
    example: Example
    pair: tuple[str, ...]
    """The first term of each class in it."""


class TooFewError(UserError):
    """The model's own sentences that comply are too few to learn from."""

    def __init__(self, found: int, drawn: int, wanted: Search, earlier: int = 0) -> None:
        """`earlier`: rounds of the warm start that have been learnt from, and changed what the model writes."""
        after = " that began with a term of each class" if wanted.forced else ""
        if earlier:
            after += f" after {plural(earlier, 'round')}"
            remedy = f"use --warm-start-rounds {earlier}, or raise --warm-start-budget"
        else:
            other = "another model" if wanted.forced else "--warm-start forced"
            remedy = f"use {other}, raise --warm-start-budget, give sentences with --warm-start-file, or leave it off"
        super().__init__(
            f"the warm start found {plural(found, 'sentence')} in {plural(drawn, 'sample')}{after} and needs at least "
            f"{BATCH}: {remedy}"
        )
        self.found, self.drawn = found, drawn
        self._made_of = (found, drawn, wanted, earlier)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of


class Collected(NamedTuple):
    examples: list[Example]
    drawn: int
    """Samples that it took."""


def collect(
    policy: Policy,
    wanted: Search,
    task: Task,
    prompts: dict[str, list[int]],
    sampling: SamplingConfig,
    generator: torch.Generator,
    batch_size: int,
    progress: Progress = lambda found, wanted, drawn: None,
    ranks: Ranks = ALONE,
) -> list[Example]:
    """What `search` finds. Raises TooFewError (a UserError) where that is fewer than `BATCH`."""
    examples, drawn = search(policy, wanted, task, prompts, sampling, generator, batch_size, progress, ranks)
    if len(examples) < BATCH:
        raise TooFewError(len(examples), drawn, wanted)
    return examples


def search(
    policy: Policy,
    wanted: Search,
    task: Task,
    prompts: dict[str, list[int]],
    sampling: SamplingConfig,
    generator: torch.Generator,
    batch_size: int,
    progress: Progress = lambda found, wanted, drawn: None,
    ranks: Ranks = ALONE,
) -> Collected:
    """Strictly successful sentences, each once, and fewer than wanted where the budget ends before, or where
    what has been drawn says that all of it would be too few (`hopeless`).

    `prompts` maps occupations to token ids; `progress` is called after each batch. At least
    `batch_size` are drawn at a time, more where the device does that better.
    """
    found: dict[str, Found] = {}
    tries = 1
    if wanted.forced:
        sampling = replace(sampling, top_p=min(sampling.top_p, FORCED_TOP_P))
    if policy.device.type == "cuda":
        batch_size = max(batch_size, GPU_ROWS)
    elif wanted.forced:
        batch_size, tries = max(batch_size, CPU_ROWS), CPU_TRIES
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, tokens_enough(policy, task)))
    target = wanted.sentences * wanted.candidates
    fewest = max(BATCH, int(FEW * min(target, wanted.budget // USUAL_TRIES))) if wanted.forced else BATCH
    occupations = sorted(prompts)
    cases = forced_cases(occupations, task, generator) if wanted.forced else free_cases(occupations, generator)
    spelt: dict[tuple[str, str], list[int]] = {}
    drawn = 0
    while len(found) < target and drawn < wanted.budget and not hopeless(len(found), drawn, wanted.budget, fewest):
        chosen, forced = [], []
        for _ in range(batch_size // tries):
            occupation, text = next(cases)
            chosen += [occupation] * tries
            if text and (occupation, text) not in spelt:
                spelt[occupation, text] = continuation_ids(policy.tokenizer, prompts[occupation], text)
            forced += [spelt[occupation, text] if text else []] * tries
        starts = [prompts[o] + f for o, f in zip(chosen, forced, strict=True)]
        rollout = sample_dealt(policy, starts, sampling, generator, ranks)
        drawn += batch_size
        made = [
            Example(occupation, prompts[occupation], start + tokens, "")
            for occupation, start, tokens in zip(chosen, forced, rollout.completions(), strict=True)
        ]
        texts = sentences_of(policy.tokenizer, as_rollout(made), chosen, task)
        for example, text, done in zip(made, texts, rollout.finished_B.tolist(), strict=True):
            if done and task.strict(text):
                pair = task.match(text).first
                assert pair is not None, "a sentence that succeeds strictly holds every class"
                found.setdefault(text, Found(example._replace(text=text), pair))
        progress(min(len(found), target), target, drawn)
    return Collected(_kept(policy, wanted, task, list(found.values()), sampling, generator, ranks), drawn)


def hopeless(found: int, drawn: int, budget: int, fewest: int = BATCH) -> bool:
    """Whether a budget of samples gives fewer than `fewest` sentences even at the upper end of the 95 % interval of how
    often one is found. Else a model that hardly ever complies would be sampled for minutes to no end."""
    return found + wilson(found, drawn).high * (budget - drawn) < fewest


def tokens_enough(policy: Policy, task: Task) -> int:
    """New tokens after which a sentence within the task's bounds has ended, by how many tokens the model takes for a
    word of the task's frames and terms: English needs about one, German under an English tokenizer three. At least
    20."""
    texts = [task.prefix(name) for name in task.names]
    texts += [f" {word}" for number in range(len(task.classes)) for word in task.words_of(number)]
    tokens = sum(len(policy.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return max(20, math.ceil(task.max_words * max(TOKENS_PER_WORD, tokens / sum(map(word_count, texts)))))


def _kept(
    policy: Policy,
    wanted: Search,
    task: Task,
    found: Sequence[Found],
    sampling: SamplingConfig,
    generator: torch.Generator,
    ranks: Ranks,
) -> list[Example]:
    """Those of the candidates that are learnt."""
    count = wanted.sentences
    if wanted.candidates == 1 or len(found) <= 1:
        return [f.example for f in found][:count]
    if wanted.keep != "likeliest" and not wanted.forced:
        return conditional(policy, found, count, sampling, generator, ranks, alike=wanted.keep == "even")
    return likeliest(policy, found, task, count, ranks)


def said(
    say: Callable[[str], None],
    label: str = "",
    check: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """A `progress` that says a line at every tenth of the way, and when none was said for ten seconds. It calls `check`
    first."""
    due, last = 0.0, clock()

    def progress(found: int, wanted: int, drawn: int) -> None:
        nonlocal due, last
        check()
        if found >= due or found == wanted or clock() - last >= SECONDS:
            say(f"{label}{found:,} of {wanted:,} sentences found, {plural(drawn, 'sample')} drawn")
            due, last = found + wanted / 10, clock()

    return progress


def forced_cases(occupations: Sequence[str], task: Task, generator: torch.Generator) -> Iterator[tuple[str, str]]:
    """(occupation, how its sentence goes on after the prefix) without end: all combinations of a term of each class, in
    every order of the classes, equally often. The task must have openings (`Task.can_force`)."""
    classes = len(task.classes)
    combinations = math.factorial(classes) * math.prod(len(task.words_of(number)) for number in range(classes))
    if combinations * len(occupations) > MOST_CASES:
        yield from _drawn_cases(occupations, task, generator)
    cases = [opening.texts for opening in task.forced_openings()]
    while True:
        for place in torch.randperm(len(cases) * len(occupations), generator=generator).tolist():
            texts = cases[place // len(occupations)]
            text = texts[int(torch.randint(len(texts), (), generator=generator))]
            yield occupations[place % len(occupations)], text


def _drawn_cases(occupations: Sequence[str], task: Task, generator: torch.Generator) -> Iterator[tuple[str, str]]:
    """The same where there are too many combinations to go through: each is drawn by itself, even on the average."""

    def draw(values: Sequence[Any]) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    orders = list(permutations(range(len(task.classes))))
    while True:
        for place in torch.randperm(len(occupations), generator=generator).tolist():
            terms = tuple(draw(task.words_of(number)) for number in draw(orders))
            yield occupations[place], open_with(draw(task.openings), terms)


def free_cases(occupations: Sequence[str], generator: torch.Generator) -> Iterator[tuple[str, str]]:
    """(occupation, nothing) without end, the occupations equally often."""
    while True:
        for place in torch.randperm(len(occupations), generator=generator).tolist():
            yield occupations[place], ""


def likeliest(policy: Policy, found: Sequence[Found], task: Task, count: int, ranks: Ranks = ALONE) -> list[Example]:
    """The `count` sentences with the smallest `continuation_nll`, in nats per token, taken from all pairs in turn.

    Sentences that repeat themselves are left out where there are enough others: a loop is what a small model finds
    likeliest of all. Each is compared with the median of its occupation, so that no occupation is left out for being
    unusual. A mould (terms and occupation masked) comes once as long as there are others.
    """
    flowing = [f for f in found if not repeats(f.example.text)]
    found = flowing if len(flowing) >= min(count, len(found)) else found
    texts, jobs = [f.example.text for f in found], [f.example.occupation for f in found]
    nll = RowLimit(EVALUATION_ROWS, lambda _: None).run(
        policy, lambda rows: continuation_nll(policy, texts, jobs, task, rows, ranks)
    )
    assert len(nll) == len(found), "strict sentences all continue the prefix"
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
        mould = task.mould(example.text, example.occupation)
        if first_of_mould.setdefault(mould, example) is not example:
            again.append(example)
    return [*first_of_mould.values(), *again][:count]


def repeats(text: str) -> bool:
    """Whether a word follows itself, or two words in a row come twice."""
    words = text.lower().rstrip(".!?").split()
    pairs = list(pairwise(words))
    return any(first == second for first, second in pairs) or len(set(pairs)) < len(pairs)


def conditional(
    policy: Policy,
    found: Sequence[Found],
    count: int,
    sampling: SamplingConfig,
    generator: torch.Generator,
    ranks: Ranks = ALONE,
    *,
    alike: bool = False,
) -> list[Example]:
    """`count` sentences drawn without replacement in proportion to π_ref/π, π being the policy that wrote them.

    With all of them that is importance resampling towards π_ref conditioned on success; with a share of them it goes
    part of the way, which the next round goes on from. Drawn by the Gumbel-top-k trick (Kool, van Hoof & Welling 2019).
    `alike`: as many of each pair, as far as they go, so that the proportion holds within the pairs only.
    """
    examples = [f.example for f in found]
    log_ratio = RowLimit(EVALUATION_ROWS, lambda _: None).run(
        policy, lambda r: kl_to_reference(policy, [as_rollout(examples)], sampling, r, ranks)
    )
    uniform = torch.rand(len(examples), generator=generator, dtype=torch.float64)
    keys = -log_ratio - torch.log(-torch.log(uniform))
    order = keys.argsort(descending=True).tolist()
    if alike:
        places: Counter[tuple[str, ...]] = Counter()
        rank = {}
        for i in order:
            rank[i] = places[found[i].pair]
            places[found[i].pair] += 1
        order.sort(key=rank.__getitem__)
    return [examples[i] for i in order[:count]]
