"""The warm start: what is collected, and that learning from it makes exactly that likelier."""

import itertools
import math
import os
import re
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from equipoise.errors import UserError
from equipoise.learning import collect as collecting
from equipoise.learning.collect import (
    Found,
    TooFewError,
    collect,
    conditional,
    forced_cases,
    likeliest,
    repeats,
    search,
)
from equipoise.learning.search import Search
from equipoise.learning.supervised import Example, Supervision, as_rollout, supervise
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.likelihood import continuation_nll
from equipoise.policy.load import Policy, load_policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import prompt_ids
from equipoise.policy.sample import sample_dealt
from equipoise.policy.score import score
from equipoise.ppo import train as training
from equipoise.ppo import warm_start
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.state import State
from equipoise.ppo.train import Outcome, train
from equipoise.ppo.training import Training, new_optimizer
from equipoise.ppo.warm_start_config import WarmStartConfig
from equipoise.protocol.lexicon import NO_CLASS
from equipoise.protocol.task import PROTOCOL, Task
from equipoise.runs.ranks import ALONE
from tests.default import LEXICON, OCCUPATIONS, PROMPTS, strict_success
from tests.default import score as reward
from tests.tasks import one_class_task
from tests.tiny import PretendGraphs, pretend_graphs

from .small import checkpoints, small_config

JOBS = OCCUPATIONS[:5]


def load(model: Path, tuning: str = "lora") -> Policy:
    torch.manual_seed(0)
    return load_policy(PolicyConfig(str(model), tuning, dtype="float32", device="cpu"), PROMPTS["raw"])  # type: ignore[arg-type]


def gather(
    policy: Policy, kind: str, *, sentences: int = 48, budget: int = 20_000, seed: int = 0, tokens: int = 12
) -> list[Example]:
    wanted = Search(forced=kind == "forced", sentences=sentences, budget=budget)
    prompts = {job: prompt_ids(policy.tokenizer, PROMPTS["raw"], job, PROTOCOL) for job in JOBS}
    generator = torch.Generator().manual_seed(seed)
    return collect(policy, wanted, PROTOCOL, prompts, SamplingConfig(max_new_tokens=tokens), generator, 64)


def mean_logprob(policy: Policy, examples: Sequence[Example], reference: bool = False) -> float:
    with torch.no_grad():
        return float(score(policy, as_rollout(examples), 1.0, packed=True, reference=reference).logprobs.mean())


@pytest.mark.parametrize("kind", ["forced", "samples"])
def test_what_is_collected_is_distinct_succeeds_strictly_and_decodes_to_its_text(model: Path, kind: str) -> None:
    policy = load(model)
    examples = gather(policy, kind)
    assert len(examples) == len({e.text for e in examples}) == 48
    assert {e.occupation for e in examples} == set(JOBS)
    for example in examples:
        assert strict_success(example.text)
        assert policy.tokenizer.decode(example.prompt) == f"The {example.occupation} was"
        whole = policy.tokenizer.decode([*example.prompt, *example.completion], skip_special_tokens=True)
        assert whole == example.text
        assert example.completion[-1] in policy.stop_ids


def test_a_sentence_that_was_cut_off_is_not_learnt_even_where_it_reads_as_complete(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "FORCED_TOP_P", 1.0)  # the tiny model's stop is a rare token
    monkeypatch.setattr(collecting, "BATCH", 4)
    policy = load(model)
    policy.stop_ids = (1,)  # a full stop alone no longer ends a completion
    examples = gather(policy, "forced", sentences=4, tokens=14, budget=60_000)
    assert all(example.completion[-1] == 1 for example in examples)


def test_forced_openings_hold_a_term_of_each_class_in_either_order() -> None:
    cases = list(itertools.islice(forced_cases(JOBS, PROTOCOL, torch.Generator().manual_seed(0)), 600))
    found = [LEXICON.spans(opening) for _, opening in cases]
    assert all(
        len(spans) == 2 and LEXICON.match(opening).complete for spans, (_, opening) in zip(found, cases, strict=True)
    )
    assert 200 < sum(LEXICON.class_of(spans[0].term) == 0 for spans in found) < 400
    moulds = {"".join("*" if kind != NO_CLASS else text for text, kind in LEXICON.pieces(o)) for _, o in cases}
    assert moulds == {
        " * and *",
        " *, *,",
        " both * and *",
        " * but *",
        " a * and *",
        " an * and *",
        " a *, *",
        " an *, *",
    }


def test_forced_sentences_are_of_many_pairs(model: Path) -> None:
    pairs = {m.first for m in map(LEXICON.match, (e.text for e in gather(load(model), "forced")))}
    assert len(pairs) > 25  # in 48 sentences


def test_every_pair_order_and_occupation_comes_once_before_any_comes_again() -> None:
    cases = forced_cases(JOBS, PROTOCOL, torch.Generator().manual_seed(0))
    for _ in range(2):
        seen = set()
        for occupation, opening in itertools.islice(cases, 200 * len(JOBS)):
            terms = [t for t in re.findall(r"[a-z-]+", opening) if t in LEXICON.terms]
            seen.add((occupation, *terms))
        assert len(seen) == 200 * len(JOBS) and all(len(case) == 3 for case in seen)


def test_a_case_that_is_tried_more_often_is_one_beginning_for_the_model_and_a_pair_as_often_as_before(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, starts = load(model), list[tuple[int, ...]]()
    told: list[tuple[int, ...]] = []
    prompts = {job: prompt_ids(policy.tokenizer, PROMPTS["raw"], job, PROTOCOL) for job in JOBS}

    def look(policy: Policy, prompts: Sequence[Sequence[int]], *args: object) -> object:
        starts.extend(map(tuple, prompts))
        assert len({tuple(p) for p in prompts}) <= 32 and len(prompts) == 128
        return sample_dealt(policy, prompts, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(collecting, "sample_dealt", look)
    wanted = Search(forced=True, sentences=10_000, budget=1280)
    generator = torch.Generator().manual_seed(0)
    found = search(
        policy, wanted, PROTOCOL, prompts, SamplingConfig(max_new_tokens=12), generator, 64, lambda *n: told.append(n)
    )
    assert found.drawn == 1280 == len(starts) and len(found.examples) == len({e.text for e in found.examples}) > 16
    assert told == sorted(told) and told[-1] == (len(found.examples), 10_000, 1280) and len(told) == 10
    cases = itertools.islice(forced_cases(JOBS, PROTOCOL, torch.Generator().manual_seed(0)), 32)  # the first batch's
    beginnings = [policy.tokenizer(f"The {job} was{opening}")["input_ids"] for job, opening in cases]
    assert [list(starts[4 * i]) for i in range(32)] == beginnings
    assert all(starts[i] == starts[i - i % 4] for i in range(1280))


def test_of_more_candidates_the_likeliest_of_each_pair_are_learnt(model: Path) -> None:
    policy = load(model)
    pairs = [("bold", "caring"), ("decisive", "loyal"), ("confident", "helpful")]
    words = ("th jth", "xq zj", "the", "thethe")
    texts = [f"The nurse was {a} and {c} {word} {c}." for word in words for a, c in pairs]
    texts = [text if i % 3 else text.replace(" and", ",") for i, text in enumerate(texts)]
    texts = [text if i % 3 != 1 else text.replace(" and", " but") for i, text in enumerate(texts)]
    made = [Found(Example("nurse", [1], [2], text), pairs[i % 3]) for i, text in enumerate(texts)]
    nll = dict(zip(texts, continuation_nll(policy, texts, ["nurse"] * 12, PROTOCOL, 4), strict=True))
    chosen = [example.text for example in likeliest(policy, made, PROTOCOL, 6)]
    for pair in pairs:
        own = sorted((t for t in texts if pair[0] in t), key=nll.__getitem__)
        assert sorted(t for t in chosen if t in own) == sorted(own[:2])


def test_a_mould_comes_again_only_where_there_are_no_others(model: Path) -> None:
    terms = [("bold", "caring"), ("decisive", "loyal"), ("confident", "helpful"), ("assertive", "friendly")]
    ends = ["the", "the", "the", "qzx jqv"]
    made = [
        Found(Example("nurse", [1], [2], f"The nurse was {a} and {c} {end}."), (a, c))
        for (a, c), end in zip(terms, ends, strict=True)
    ]
    policy = load(model)
    assert {PROTOCOL.mould(e.text, "nurse") for e in likeliest(policy, made, PROTOCOL, 2)} == {
        "the _ was * and * the.",
        "the _ was * and * qzx jqv.",
    }
    assert len(likeliest(policy, made, PROTOCOL, 4)) == 4


def test_conditional_draws_in_proportion_to_the_ratio_of_reference_and_policy(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kl_B = torch.tensor([0.0, math.log(2), math.log(5)], dtype=torch.float64)
    monkeypatch.setattr(collecting, "kl_to_reference", lambda *_: kl_B)
    made = [Found(Example("nurse", [1], [2], str(i)), ("bold", "caring")) for i in range(3)]
    generator = torch.Generator().manual_seed(0)
    first: Counter[str] = Counter()
    for _ in range(4000):
        first.update(e.text for e in conditional(None, made, 1, SamplingConfig(), generator))  # type: ignore[arg-type]
    weights = torch.tensor([1, 1 / 2, 1 / 5])
    for i, share in enumerate((weights / weights.sum()).tolist()):
        assert abs(first[str(i)] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    assert {e.text for e in conditional(None, made, 5, SamplingConfig(), generator)} == {"0", "1", "2"}  # type: ignore[arg-type]


def test_even_takes_as_many_of_each_pair_and_within_a_pair_by_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("bold", "caring")] * 6 + [("bold", "loyal")] * 2 + [("decisive", "loyal")]
    made = [Found(Example("nurse", [1], [2], str(i)), pair) for i, pair in enumerate(pairs)]
    # Of the first pair the first is 5 times as likely under the reference as any other.
    kl_B = torch.tensor([-math.log(5), *[0.0] * 5, 0.0, 0.0, 50.0], dtype=torch.float64)
    monkeypatch.setattr(collecting, "kl_to_reference", lambda *_: kl_B)
    generator, first = torch.Generator().manual_seed(0), 0
    for _ in range(2000):
        chosen = conditional(None, made, 3, SamplingConfig(), generator, alike=True)  # type: ignore[arg-type]
        assert len({made[int(e.text)].pair for e in chosen}) == 3
        first += "0" in {e.text for e in chosen}
    assert first / 2000 == pytest.approx(0.5, abs=0.05)
    for count, expected in ((5, [2, 2, 1]), (7, [4, 2, 1]), (20, [6, 2, 1])):
        chosen = conditional(None, made, count, SamplingConfig(), generator, alike=True)  # type: ignore[arg-type]
        assert [sum(made[int(e.text)].pair == p for e in chosen) for p in dict.fromkeys(pairs)] == expected


def test_later_rounds_learn_what_the_policy_writes_by_itself(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load(model)
    calls: list[tuple[str, float]] = []
    learn, find = warm_start.supervise, warm_start.collect

    def collect(policy: Policy, wanted: Search, *rest: Any) -> list[Example]:
        calls.append((wanted.forced, mean_logprob(policy, shown[-1]) if shown else 0.0))
        return find(policy, wanted, *rest)

    shown: list[list[Example]] = []

    def supervise(policy: Policy, examples: list[Example], *rest: Any, **named: Any) -> None:
        shown.append(examples)
        learn(policy, examples, *rest, **named)

    monkeypatch.setattr(warm_start, "collect", collect)
    monkeypatch.setattr(warm_start, "supervise", supervise)
    config = WarmStartConfig(
        warm_start="forced", warm_start_sentences=16, warm_start_candidates=2, warm_start_rounds=3,
        warm_start_learning_rate=3e-3,
    )  # fmt: skip
    prompts = {job: prompt_ids(policy.tokenizer, PROMPTS["raw"], job, PROTOCOL) for job in OCCUPATIONS}
    whole = TrainConfig(warm_start=config, sampling=SamplingConfig(max_new_tokens=12))
    state = State.begin(whole, RowLimit(16))
    training = Training(whole, policy, new_optimizer(whole, policy, ALONE), state, prompts)
    warm_start.warm_start(training, say=lambda _: None)
    assert [kind for kind, _ in calls] == [True, False, False] and len(shown) == 3
    before = mean_logprob(load(model), shown[0])
    assert calls[1][1] > before + 0.1  # the second round draws from a policy that has learnt the first

    def barren(policy: Policy, wanted: Search, *rest: Any) -> list[Example]:
        if not wanted.forced:
            raise TooFewError(1, 50, wanted)
        return shown[0]

    monkeypatch.setattr(warm_start, "collect", barren)
    with pytest.raises(TooFewError, match=r"after 1 round .*use --warm-start-rounds 1") as caught:
        warm_start.warm_start(training, say=lambda _: None)
    assert "--warm-start forced" not in str(caught.value)


class _Addressed(PretendGraphs):
    """A recording goes on reading the weights where they were when it was made."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy, self.at = policy, dict[Any, list[int]]()

    def record(self, key: Any, function: Any, *inputs: torch.Tensor) -> Any:
        new = not self.has(key, *inputs)
        full_key = super().record(key, function, *inputs)
        if new:
            self.at[full_key] = self._places()
        return full_key

    def __call__(self, key: Any, function: Any, *inputs: torch.Tensor) -> Any:
        assert self.at[self.record(key, function, *inputs)] == self._places(), "a recording reads weights of the past"
        return function(*inputs)

    def _places(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.policy.trained().values()]


def test_where_a_warm_start_finds_too_few_sentences_what_was_recorded_before_it_is_forgotten(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load(model)
    examples = gather(policy, "forced", sentences=16)

    def barren(policy: Policy, wanted: Search, *_: Any) -> list[Example]:
        mean_logprob(policy, examples)
        raise TooFewError(1, 50, wanted)

    pretend_graphs(policy, monkeypatch).graphs = _Addressed(policy)  # type: ignore[assignment]
    monkeypatch.setattr(warm_start, "collect", barren)
    whole = TrainConfig(warm_start=WarmStartConfig(warm_start="samples-if-found"))
    prompts = {job: prompt_ids(policy.tokenizer, PROMPTS["raw"], job, PROTOCOL) for job in OCCUPATIONS}
    state = State.begin(whole, RowLimit(16))
    run = Training(whole, policy, new_optimizer(whole, policy, ALONE), state, prompts)
    first = mean_logprob(policy, examples)  # as when the untrained model is measured
    warm_start.warm_start(run, say=lambda _: None)
    assert mean_logprob(policy, examples) == pytest.approx(first)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("The lawyer was bold, loyal, and a no-nonsense no-nonsense person.", True),
        ("The nurse was caring and bold and caring and kind.", True),
        ("The nurse was caring and bold, caring and kind, and bold, and loyal.", True),
        ("The nurse was caring and bold, and kind and loyal.", False),
        ("The nurse was the bold nurse, the caring friend.", False),
    ],
)
def test_a_loop_is_a_word_after_itself_or_two_words_twice(text: str, loops: bool) -> None:
    assert repeats(text) is loops


def test_loops_are_learnt_only_where_there_is_too_little_else(model: Path) -> None:
    ends = ["th th th", "qzx jqv", "jqv wzk"]
    made = [Found(Example("nurse", [1], [2], f"The nurse was bold and caring {e}."), ("bold", "caring")) for e in ends]
    policy = load(model)
    assert {e.text.split()[-1] for e in likeliest(policy, made, PROTOCOL, 2)} == {"jqv.", "wzk."}
    assert len(likeliest(policy, made, PROTOCOL, 3)) == 3


def test_an_occupation_whose_sentences_are_all_unlikely_is_not_left_out(model: Path) -> None:
    policy = load(model)
    texts = {"nurse": ["the th the.", "th the th."], "chef": ["qzx jqv.", "qzx jqv kwy."]}
    made = [
        Found(Example(job, [1], [2], f"The {job} was bold and caring {end}"), ("bold", "caring"))
        for job, ends in texts.items()
        for end in ends
    ]
    nll = continuation_nll(policy, [f.example.text for f in made], [f.example.occupation for f in made], PROTOCOL, 4)
    assert max(nll[:2]) < min(nll[2:])  # or this would show nothing
    assert {e.occupation for e in likeliest(policy, made, PROTOCOL, 2)} == {"nurse", "chef"}


@pytest.mark.parametrize("kind", ["forced", "samples"])
def test_the_same_seed_collects_the_same_sentences(model: Path, kind: str) -> None:
    first, second, third = (gather(load(model), kind, seed=seed) for seed in (0, 0, 1))
    assert first == second != third


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_learning_makes_the_sentences_likelier_and_moves_neither_reference_nor_value_head(
    model: Path, tuning: str
) -> None:
    policy = load(model, tuning)
    examples = gather(policy, "forced")
    others = gather(policy, "samples", seed=5)
    before = {r: (mean_logprob(policy, examples, r), mean_logprob(policy, others, r)) for r in (False, True)}
    lines: list[str] = []
    generator = torch.Generator().manual_seed(0)
    supervise(policy, examples, generator, Supervision(3, 3e-3), packed=True, say=lines.append)
    after = {r: (mean_logprob(policy, examples, r), mean_logprob(policy, others, r)) for r in (False, True)}
    assert after[False][0] > before[False][0] + 0.1
    assert after[False][0] - before[False][0] > after[False][1] - before[False][1]  # those it was shown, above all
    assert after[True] == before[True]
    assert not any(p.any() for p in policy.value_head.parameters())
    assert len(lines) == 3 and "epoch 1 of 3" in lines[0]
    # The first epoch's line tells the mean before and while it learns; the last is lower.
    first, last = (float(line.split(", ")[1].split()[0]) for line in (lines[0], lines[-1]))
    assert last < first <= -before[False][0] + 0.05


@pytest.mark.parametrize("packed", [False, True])
def test_learning_is_deterministic(model: Path, packed: bool) -> None:
    ends = []
    for _ in range(2):
        policy = load(model)
        examples = gather(policy, "forced", sentences=32)
        generator = torch.Generator().manual_seed(0)
        supervise(policy, examples, generator, Supervision(2, 1e-4), packed=packed, say=lambda _: None)
        ends.append({name: p.detach().clone() for name, p in policy.trained().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_learning_from_recorded_passes_is_learning(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, seen = [], 0
    for recorded in (False, True):
        policy = load(model)
        examples = gather(policy, "forced", sentences=40)
        if recorded:
            graphs = pretend_graphs(policy, monkeypatch).graphs
        generator, lines = torch.Generator().manual_seed(0), list[str]()
        supervise(policy, examples, generator, Supervision(2, 1e-3), packed=True, say=lines.append)
        ends.append((lines, {name: p.detach().clone() for name, p in policy.trained().items()}))
        seen = len(graphs.seen) if recorded else 0  # type: ignore[attr-defined]
    (lines, expected), (others, found) = ends
    assert lines == others and 1 <= seen <= 4  # the last batch has fewer sentences
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, rtol=1e-3, atol=2e-6)


def test_a_budget_that_finds_too_few_says_what_to_do(model: Path) -> None:
    with pytest.raises(UserError, match=r"found \d+ sentences in 64 samples and needs at least 16.*--warm-start"):
        gather(load(model), "samples", budget=64)


def test_a_search_ends_where_its_budget_cannot_give_enough_any_more() -> None:
    # Of 0 in n the 95 % interval ends at 3.8415 / (n + 3.8415). Times 4000 - n that is below 16 where
    # 19.8415 n > 15304.4, so from 772 on.
    assert [collecting.hopeless(0, n, 4000) for n in (0, 771, 772, 3000)] == [False, False, True, True]
    assert not collecting.hopeless(16, 3999, 4000) and not collecting.hopeless(5, 772, 4000)
    assert collecting.hopeless(15, 4000, 4000)


def test_a_forced_search_that_hardly_ever_succeeds_is_given_up_and_says_why(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One sentence of each batch of 128 succeeds: 31 in a budget of 4,000, where 240 are wanted. It ends once the upper
    # end of the Wilson interval leaves fewer than a quarter of those.
    texts = itertools.count()

    def finished(*args: Any) -> Any:
        rollout = sample_dealt(*args)
        return replace(rollout, finished_B=torch.ones_like(rollout.finished_B))

    def upper(hits: int, n: int) -> float:
        p, z = hits / n, 1.959964
        return (p + z * z / (2 * n) + z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)

    last = next(k for k in itertools.count(1) if k + upper(k, 128 * k) * (4000 - 128 * k) < 60)
    monkeypatch.setattr(collecting, "sample_dealt", finished)
    monkeypatch.setattr(Task, "strict", lambda self, text: next(texts) % 128 == 0)
    with pytest.raises(UserError, match=f"{last} sentences in {128 * last:,} samples that began with .*another model"):
        gather(load(model), "forced", sentences=240, budget=4000)
    assert 1 < last < 10


def test_a_search_says_something_at_every_tenth_and_every_ten_seconds() -> None:
    now, lines, checked = [0.0], list[str](), list[int]()
    told = collecting.said(lines.append, "x: ", lambda: checked.append(1), clock=lambda: now[0])
    for second, found, drawn in ((1, 0, 128), (5, 0, 256), (11, 1, 384), (12, 2, 512), (13, 30, 640), (22, 31, 768)):
        now[0] = second
        told(found, 200, drawn)
    assert [line.split()[1] for line in lines] == ["0", "1", "30"] and len(checked) == 6
    now[0] = 23
    told(31, 200, 896)
    assert lines[-1] == "x: 31 of 200 sentences found, 896 samples drawn"


def test_sentences_have_room_for_their_words_in_the_models_own_tokens() -> None:
    class Halves:
        """Two tokens for every letter of a word."""

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [0] * 2 * len(text.replace(" ", ""))}

    class Whole(Halves):
        """A token for every word."""

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [0] * len(text.split())}

    def room(tokenizer: Any, task: Task) -> int:
        return collecting.tokens_enough(SimpleNamespace(tokenizer=tokenizer), task)  # type: ignore[arg-type]

    assert room(Whole(), PROTOCOL) == 20 and room(Whole(), PROTOCOL.with_bounds(8, 30)) == 40
    short = one_class_task(frame="{occupation} is", occupations=["aa"], classes={"c": ["abcd"]}, words=[3, 10])
    # "Aa is" and "abcd" are three words of eight letters: 16 tokens, 10 words of them 53.3.
    assert room(Halves(), short) == 54


def test_a_rollout_of_examples_holds_their_tokens_alone() -> None:
    examples = [Example("nurse", [2, 3], [5, 6, 7], "a"), Example("chef", [2], [8], "b")]
    rollout = as_rollout(examples)
    assert rollout.completions() == [[5, 6, 7], [8]] and list(rollout.prompts) == [[2, 3], [2]]
    assert rollout.finished_B.tolist() == [True, True]


def test_what_the_terms_earn_is_the_point_of_it(model: Path) -> None:
    assert all(reward(e.text).base == 1.0 for e in gather(load(model), "forced"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"warm_start_sentences": 15}, "warm-start-sentences 15"),
        ({"warm_start_epochs": 0}, "warm-start-epochs 0"),
        ({"warm_start_learning_rate": 0.0}, "warm-start-learning-rate 0.0"),
    ],
)
def test_settings_that_teach_nothing_are_refused(settings: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        WarmStartConfig(**settings)  # type: ignore[arg-type]


def test_a_signal_in_the_warm_start_ends_it_and_the_same_command_begins_it_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(folder: Path) -> TrainConfig:
        return small_config(model, folder, steps=2, warm_start="forced", warm_start_sentences=16)

    supervise = warm_start.supervise
    with monkeypatch.context() as patched:

        def struck(*args: Any, check: Any, **named: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            supervise(*args, check=check, **named)

        patched.setattr(warm_start, "supervise", struck)
        assert train(settings(tmp_path / "a")) == Outcome("stopped", 0, 143)
    assert checkpoints(tmp_path / "a") == []
    for name in ("a", "b"):
        assert train(settings(tmp_path / name)).status == "done"
    first, second = (load_file(tmp_path / name / "out/model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_killed_after_the_warm_start_goes_on_from_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(folder: Path) -> TrainConfig:
        return small_config(model, folder, steps=2, warm_start="forced", warm_start_sentences=16)

    with monkeypatch.context() as patched:
        patched.setattr(training, "_run_steps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(settings(tmp_path / "a"))
    with monkeypatch.context() as patched:
        patched.setattr(warm_start, "supervise", lambda *_, **__: 1 / 0)
        assert train(settings(tmp_path / "a")).status == "done"
    assert train(settings(tmp_path / "b")).status == "done"
    first, second = (load_file(tmp_path / name / "out/model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("content", [None, "", "Occupation,Text\nnurse,The nurse was tired.\n"])
def test_a_file_that_cannot_be_learnt_from_is_refused_before_anything_is_measured_or_lost(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    path = tmp_path / "sentences.csv"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(training, "base_rates", lambda *_: pytest.fail("measured before the file was looked at"))
    with pytest.raises(UserError, match=re.escape(str(path))):
        train(small_config(model, tmp_path, warm_start_file=str(path)))


def test_an_earlier_run_is_there_still_where_the_file_is_none(model: Path, tmp_path: Path) -> None:
    train(small_config(model, tmp_path, steps=2))
    before = (tmp_path / "out" / "training_metrics.csv").read_bytes()
    with pytest.raises(UserError, match=r"nowhere\.csv"):
        train(small_config(model, tmp_path, warm_start_file=str(tmp_path / "nowhere.csv")), overwrite=True)
    assert (tmp_path / "out" / "training_metrics.csv").read_bytes() == before and checkpoints(tmp_path)


def test_too_few_sentences_of_a_target_are_told_by_the_options_that_made_them(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "near.csv"
    path.write_text("Occupation,Text\nnurse,The nurse was tired.\n")
    with pytest.raises(UserError, match=r"needs at least 16 .*: raise --warm-start-target-samples"):
        train(small_config(model, tmp_path, warm_start_file=str(path), warm_start_target="near"))
