"""The warm start: learning from what was collected makes exactly that likelier, in runs too."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from equipoise.errors import UserError
from equipoise.learning.collect import (
    TooFewError,
)
from equipoise.learning.search import Search
from equipoise.learning.supervised import Example, Supervision, supervise
from equipoise.policy.config import SamplingConfig
from equipoise.policy.load import Policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import prompt_ids
from equipoise.ppo import train as training
from equipoise.ppo import warm_start
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.state import State
from equipoise.ppo.train import Outcome, train
from equipoise.ppo.training import Training, new_optimizer
from equipoise.ppo.warm_start_config import WarmStartConfig
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.ranks import ALONE
from tests.default import OCCUPATIONS, PROMPTS
from tests.tiny import PretendGraphs, pretend_graphs

from .collected import gather, load, mean_logprob
from .small import checkpoints, small_config


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
    path = tmp_path / "near-00.csv"
    path.write_text("Occupation,Text\nnurse,The nurse was tired.\n")
    with pytest.raises(UserError, match=r"needs at least 16 .*: raise --warm-start-target-samples"):
        train(small_config(model, tmp_path, warm_start_file=str(path), warm_start_target="near"))
