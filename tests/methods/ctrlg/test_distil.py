"""What is kept while the model writes freely, and which tokens the HMM tells apart."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from equipoise.methods.ctrlg import distil
from equipoise.methods.ctrlg.distil import OTHERS, Recorder, sample_freely, symbols
from equipoise.policy.config import SamplingConfig
from equipoise.policy.sample import sample
from tests.tiny import bare_policy, next_logprobs

SAMPLING = SamplingConfig(0.8, 1.0, 4)
PROMPTS = [[1, 2], [2, 1, 1]]
VOCABULARY = 6


def test_it_draws_what_the_sampler_draws_and_notes_what_the_model_expected() -> None:
    policy = bare_policy(vocabulary=VOCABULARY, stops=(0,), seed=1)
    uniform = torch.rand(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prompts = PROMPTS * 5
    recorder = Recorder(VOCABULARY, SAMPLING, policy.stop_ids, policy.device)
    plain = sample(policy, prompts, SAMPLING, uniform_BT=uniform)
    noted = sample(policy, prompts, SAMPLING, uniform_BT=uniform, guide=recorder)
    assert torch.equal(plain.tokens_BT, noted.tokens_BT)
    total = torch.zeros(VOCABULARY, dtype=torch.float64)
    for i, completion in enumerate(noted.completions()):
        for t, token in enumerate(completion):
            probs = torch.tensor(next_logprobs(policy.model, [*prompts[i], *completion[:t]], 0.8)).exp()
            total += probs
            assert float(noted.report["logprobs"][i, t].exp()) == pytest.approx(float(probs[token]), rel=1e-4)
            drawn = torch.bincount(noted.report["others"][i, t].long(), minlength=VOCABULARY)
            # Equidistant points fall into an interval of length p as often as p · OTHERS, give or take one.
            assert ((drawn - OTHERS * probs).abs() < 1).all()
            assert drawn[token] >= 1
            features = probs.float().sqrt() @ recorder.projection_VD
            torch.testing.assert_close(noted.report["features"][i, t].float(), features, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(recorder.mean_V, total, rtol=1e-4, atol=1e-4)


class Operations(TorchDispatchMode):
    """The names of what is computed within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().partition("::")[2].partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_with_many_ends_of_a_sentence_drawing_can_still_be_recorded() -> None:
    """In a CUDA graph nothing may wait for the host, as operations do whose result's size depends on values; `isin`
    among hundreds of ids sorts them so."""
    stops = range(1, 1000)
    recording = Recorder(2000, SAMPLING, [-1, *stops], torch.device("cpu")).open(3)
    recording.start([])
    logits = torch.full((3, 2000), -30.0)
    logits[0, 5] = logits[1, 1500] = logits[2, 999] = 30.0
    with Operations() as seen:
        drawn = recording.draw(logits, torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64))
    assert drawn.tolist() == [5, 1500, 999] and recording.live_B.tolist() == [0, 1, 0]
    assert not seen.names & {"isin", "_unique2", "unique_dim", "nonzero", "_local_scalar_dense", "masked_select"}


def test_every_prompt_gets_the_same_number_of_sentences() -> None:
    policy = bare_policy(vocabulary=VOCABULARY, stops=(0,), seed=1)
    free = sample_freely(policy, PROMPTS, SAMPLING, 25, 0, 8, lambda _: None)
    assert torch.bincount(free.prompts_B).tolist() == [13, 13]
    assert len(free.tokens_BT) == len(free.features_BTD) == len(free.others_BTM) == 26
    assert float(free.mean_V.sum()) == pytest.approx(1)
    again = sample_freely(policy, PROMPTS, SAMPLING, 25, 0, 8, lambda _: None)
    assert torch.equal(free.tokens_BT, again.tokens_BT)


def test_tokens_that_are_hardly_expected_are_one_symbol_with_others_of_their_class_and_no_other() -> None:
    policy = bare_policy(vocabulary=VOCABULARY, stops=(0,), seed=1)
    free = sample_freely(policy, PROMPTS, SAMPLING, 10, 0, 10, lambda _: None)
    places = float(free.lengths_B.sum())
    mean = torch.tensor([0.4, 0.6 - 2.3 / places, 0.9 / places, 0.8 / places, 0.3 / places, 0.3 / places])
    free = dataclasses.replace(free, mean_V=mean.double())
    symbol_V = symbols(free, np.array([1, 2, 2, 2, 3, 0], dtype=np.int32)).tolist()
    assert symbol_V[2] == symbol_V[3]
    assert len(set(symbol_V)) == 5


def test_more_passes_come_closer_to_held_out_sentences() -> None:
    policy = bare_policy(vocabulary=VOCABULARY, stops=(0,), seed=2)
    free = sample_freely(policy, PROMPTS, SAMPLING, 2000, 0, 500, lambda _: None)
    none, some = (distil.fit(free, torch.arange(VOCABULARY), 2, 8, passes, 0, lambda _: None) for passes in (0, 6))
    assert none.held_out < some.held_out < some.held_out_model + 0.02
    assert some.held_out > some.held_out_model - 0.15  # so small a language is nearly an HMM of 8 states
