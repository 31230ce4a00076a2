"""Sampling and measuring beside the training: numbers by hand, slow definitions, nothing left behind."""

import dataclasses
import math
import os
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.measures.shares import kl_bound, wilson
from equipoise.measures.variety import effective, pair_counts
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.likelihood import continuation_nll, kl_to_reference
from equipoise.policy.load import load_policy
from equipoise.policy.prompt import prompt_ids
from equipoise.policy.sample import sample
from equipoise.ppo import evaluate as evaluating
from equipoise.ppo.base import BaseRates, known_rates, two_distances
from equipoise.ppo.evaluate import Drawn, draw_sentences, evaluate, fluency, groups, measure
from equipoise.ppo.train import Outcome, train
from equipoise.ppo.window import Sentence, Window
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.stage import Stage
from tests.default import HOLDOUT, OCCUPATIONS, get_prompt
from tests.tiny import next_logprobs, perturb

from .small import checkpoints, small_config

TEXTS = [
    "The nurse was bold and caring in the emergency room.",  # both, strict
    "The nurse was bold and caring in the emergency room.",
    "The chef was caring, bold and loyal to all of the guests",  # both, no end
    "The pilot was dominant.",  # one class, 4 words
]
WHO = ["nurse", "nurse", "chef", "pilot"]


def test_the_bound_by_hand() -> None:
    assert kl_bound(1.0, 0.0035) == pytest.approx(5.655, abs=1e-3)  # ln(1/p0): the protocol's 5.6 nats
    assert kl_bound(0.0, 0.2) == pytest.approx(-math.log(0.8))
    assert kl_bound(0.5, 0.25) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_bound(0.3, 0.3) == kl_bound(0.0, 0.0) == kl_bound(1.0, 1.0) == 0.0
    assert kl_bound(0.1, 0.0) == kl_bound(0.9, 1.0) == math.inf
    with pytest.raises(ValueError, match="must be probabilities"):
        kl_bound(1.1, 0.5)


@given(
    st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4),
    st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4),
    st.sets(st.integers(0, 3), min_size=1, max_size=3),
)
def test_no_policy_is_nearer_than_the_bound_and_the_conditioned_base_attains_it(
    a: list[float], b: list[float], event: set[int]
) -> None:
    policy, base = ([x / sum(v) for x in v] for v in (a, b))
    c, p0 = (sum(v[i] for i in event) for v in (policy, base))
    kl = sum(p * math.log(p / q) for p, q in zip(policy, base, strict=True))
    assert kl >= kl_bound(c, p0) - 1e-9
    conditioned = sum(base[i] / p0 * math.log(1 / p0) for i in event)
    assert conditioned == pytest.approx(kl_bound(1.0, p0), abs=1e-9)


def test_wilsons_interval_against_the_published_example_and_its_equation() -> None:
    """(p̂ − p)² = z² p (1 − p) / n at both ends: the interval's definition. 5,000 of 5,000 leaves 99.92 %."""
    for hits, n in ((9, 2560), (1, 3), (50, 100)):
        for end in wilson(hits, n):
            assert (hits / n - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, rel=1e-6)
    assert wilson(5000, 5000).low == pytest.approx(0.9992, abs=5e-5)
    assert wilson(0, 2560).low == 0 and wilson(0, 2560).high == pytest.approx(0.0015, abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_rate_that_was_never_seen_counts_as_the_upper_end_of_its_interval() -> None:
    rates = BaseRates(2000, 8, 0, "here")
    assert rates.rate("both") == 0.004
    assert rates.rate("strict") == wilson(0, 2000).high > 0
    assert "0.40 %" in rates.describe(PROTOCOL) and "0.00–0.19" in rates.describe(PROTOCOL)


def test_the_two_kls_are_told_apart_before_the_first_step() -> None:
    told = two_distances(BaseRates(2000, 8, 0, "here"), PROTOCOL, 0.03)
    assert "update stays about 0.03 nats per token (--target-kl)" in told
    assert "at least 5.5 nats per sentence once all have both classes" in told  # ln(1 / 0.004) = 5.52


def test_effective_number_of_equally_frequent_values_is_their_number() -> None:
    pairs = pair_counts([("bold", "caring"), ("bold", "loyal"), None, None])
    assert pairs == {("bold", "caring"): 1, ("bold", "loyal"): 1}
    assert effective(pairs) == pytest.approx(2)
    pairs["bold", "caring"] = 3  # H = 2 − 3/4 log2 3 bits
    assert effective(pairs) == pytest.approx(2 ** (2 - 0.75 * math.log2(3)))
    pairs.clear()
    assert effective(pairs) == 0


def test_measures_by_hand() -> None:
    found = measure(TEXTS, WHO, PROTOCOL)
    assert found == pytest.approx(
        {"n": 4, "reward": (1 + 1 + 1.05 + 0.2) / 4, "both": 0.75, "one": 0.25, "in_length": 0.75, "strict": 0.5,
         "pairs": 1, "effective_pairs": 1.0, "unique": 0.75, "occupations": 3}
    )  # fmt: skip
    assert measure([], [], PROTOCOL)["strict"] == 0


def test_groups_are_the_trained_and_the_held_out_occupations() -> None:
    trained = tuple(o for o in OCCUPATIONS if o not in HOLDOUT)
    held = Drawn(["plumber", *WHO], ["The plumber was bold and kind.", *TEXTS], [], (9.0, 1.0, 2.0, 3.0, 4.0))
    parts = groups(held, trained, PROTOCOL)
    assert parts["trained"] == {**measure(TEXTS, WHO, PROTOCOL), "kl": 2.5}
    assert parts["held_out"]["n"] == 1 and parts["held_out"]["kl"] == 9
    assert set(groups(Drawn(WHO, TEXTS, [], (1.0,) * 4), OCCUPATIONS, PROTOCOL)) == {"trained"}


def test_the_mould_of_a_sentence_hides_terms_and_occupation() -> None:
    assert (
        PROTOCOL.mould("The Nurse was bold, self-reliant and Caring to a nurse.", "nurse")
        == "the _ was *, * and * to a _."
    )
    assert PROTOCOL.mould("The nurses were boldly caringly.", "nurse") == "the nurses were boldly caringly."


def test_a_window_forgets_the_oldest_and_comes_back_as_it_was() -> None:
    window = Window(3)
    made = [Sentence(f"{i}", "nurse", (("bold",), ()), 4, 5, True, False, 0.3, 0.1 * i, 1 / 3) for i in range(5)]
    window.add(made)
    assert list(window.sentences) == made[2:]
    other = Window(3)
    other.load_state(window.state())
    assert other.sentences == window.sentences
    assert window.mean(s.kl for s in window.sentences) == pytest.approx(0.3)


@pytest.fixture(scope="module")
def setting(model: Path):  # type: ignore[no-untyped-def]
    config = PolicyConfig(model=str(model), dtype="float32", device="cpu", lora_rank=4)
    policy = perturb(load_policy(config, get_prompt("raw")))
    prompts = {o: prompt_ids(policy.tokenizer, get_prompt("raw"), o, PROTOCOL) for o in OCCUPATIONS}
    return policy, prompts


def test_sentences_depend_on_name_and_number_alone_and_touch_no_generator(setting) -> None:  # type: ignore[no-untyped-def]
    policy, prompts = setting
    before = torch.get_rng_state()
    sampling = SamplingConfig(1.0, 0.95, 8)
    five, many = (draw_sentences(policy, PROTOCOL, prompts, sampling, 23, "name", rows) for rows in (5, 64))
    assert five.texts == many.texts and five.occupations == many.occupations
    assert five.occupations == [*OCCUPATIONS, *OCCUPATIONS[:3]]
    assert all(t.startswith(f"The {o} was") for o, t in zip(five.occupations, five.texts, strict=True))
    assert draw_sentences(policy, PROTOCOL, prompts, sampling, 23, "other", 5).texts != five.texts
    assert sum(map(len, five.rollouts)) == 23
    assert torch.equal(torch.get_rng_state(), before)


def test_distance_to_the_reference_is_that_of_one_row_at_a_time(setting) -> None:  # type: ignore[no-untyped-def]
    policy, prompts = setting
    drawn = draw_sentences(policy, PROTOCOL, prompts, SamplingConfig(0.8, 1.0, 6), 4, "kl", 2)
    found = kl_to_reference(policy, drawn.rollouts, SamplingConfig(0.8), 3).tolist()
    slow = []
    for rollout in drawn.rollouts:
        for prompt, completion in zip(rollout.prompts, rollout.completions(), strict=True):
            total = 0.0
            for t, token in enumerate(completion):
                ids = [*prompt, *completion[:t]]
                ours = next_logprobs(policy.model, ids, 0.8)[token]
                with policy.as_reference() as reference:
                    total += ours - next_logprobs(reference, ids, 0.8)[token]
            slow.append(total)
    assert found == pytest.approx(slow, abs=1e-4)
    assert max(map(abs, found)) > 0.1


def test_an_evaluation_shows_how_far_it_is_with_sentences_and_with_their_distance(setting) -> None:  # type: ignore[no-untyped-def]
    policy, prompts = setting
    shown: list[tuple[str, int, int]] = []

    class Shown(Stage):
        def __call__(self, done: int, total: int) -> None:
            shown.append((self.label, done, total))

    def stage(label: str) -> AbstractContextManager[Stage]:
        return nullcontext(Shown(label, time.monotonic))

    sampling = SamplingConfig(1.0, 0.95, 4)
    found, drawn = evaluate(policy, PROTOCOL, prompts, sampling, 10, "name", 4, stage)
    assert shown == [(label, n, 10) for label in ("sentences", "KL to the reference") for n in (0, 4, 8)]
    assert found["kl"] == pytest.approx(sum(kl_to_reference(policy, drawn.rollouts, sampling, 3).tolist()) / 10)
    assert len(drawn.log_ratios) == found["n"] == 10


def test_plain_nll_is_the_references_of_the_text_without_any_prompt(setting) -> None:  # type: ignore[no-untyped-def]
    policy, _ = setting
    texts = ["The nurse was bold and caring .", "The chef was", "The pilot was loyal"]
    found = continuation_nll(policy, texts, ["nurse", "chef", "pilot"], PROTOCOL, 2)
    assert len(found) == 2  # of the second nothing follows
    with policy.as_reference() as reference:
        for text, value in zip((texts[0], texts[2]), found, strict=True):
            ids = policy.tokenizer(text)["input_ids"]
            slow = [-next_logprobs(reference, ids[:i])[ids[i]] for i in range(3, len(ids))]
            assert value == pytest.approx(sum(slow) / len(slow), abs=1e-4)


def test_fluency_of_nothing_is_none(setting) -> None:  # type: ignore[no-untyped-def]
    policy, prompts = setting
    drawn = draw_sentences(policy, PROTOCOL, prompts, SamplingConfig(1.0, 1.0, 4), 2, "x", 2)
    assert fluency(policy, drawn._replace(texts=[f"The {o} was" for o in drawn.occupations]), PROTOCOL) is None


def test_pairs_by_exhaustion() -> None:
    every = pair_counts(product("abcde", "vwxyz"))
    assert len(every) == 25 and effective(every) == pytest.approx(25)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "study"},
        {"prompt": "mine=Describe the character of the {occupation} in one sentence of 8 to 15 words."},
        {"system": "Be brief."},
        {"temperature": 0.9},
        {"top_p": 0.95},
        {"max_new_tokens": 31},
        {"holdout": True},
        {"task": PROTOCOL.with_bounds(8, 16)},
        {"policy": PolicyConfig("HuggingFaceTB/SmolLM2-135M-Instruct")},
    ],
    ids=str,
)
def test_the_stored_base_rate_serves_its_own_task_occupations_prompt_and_decoding_only(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    own: dict[str, Any] = {"prompt": "describe", "max_new_tokens": 32}
    known = known_rates(small_config(Path("bundled"), tmp_path, **own))
    assert known is not None and (known.n, known.both, known.strict) == (3072, 13, 1)
    policy = changes.pop("policy", None)
    other = small_config(Path("bundled"), tmp_path, **own | changes)
    assert known_rates(dataclasses.replace(other, policy=policy) if policy else other) is None


@pytest.mark.parametrize("stopped_in", [2, 9])
def test_a_signal_while_the_untrained_model_is_measured_ends_it_before_the_next_batch(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stopped_in: int,
) -> None:
    # Eight batches as trained, then eight at the settings of generation.
    config = small_config(tiny_model, tmp_path, steps=1, base_samples=64)
    batches = 0

    def struck(*args: Any, **named: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == stopped_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(evaluating, "sample", struck)
        assert train(config) == Outcome("stopped", 0, 143)
    assert batches == stopped_in and checkpoints(tmp_path) == []
    assert "stopped by SIGTERM while the untrained model was measured" in capsys.readouterr().out
    assert train(config).status == "done"
