"""What a warm start collects: sentences that succeed, of many pairs, and no more than a budget gives."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from equipoise.errors import UserError
from equipoise.learning import collect as collecting
from equipoise.learning.collect import (
    Found,
    conditional,
    forced_cases,
    likeliest,
    repeats,
    search,
)
from equipoise.learning.search import Search
from equipoise.learning.supervised import Example, as_rollout
from equipoise.policy.config import SamplingConfig
from equipoise.policy.likelihood import continuation_nll
from equipoise.policy.load import Policy
from equipoise.policy.prompt import prompt_ids
from equipoise.policy.sample import sample_dealt
from equipoise.protocol.lexicon import NO_CLASS
from equipoise.protocol.task import PROTOCOL, Task
from tests.default import LEXICON, PROMPTS, strict_success
from tests.default import score as reward
from tests.tasks import one_class_task

from .collected import JOBS, gather, load


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
