"""What a sentence loses for being unnatural, against the likelihood of its text."""

from pathlib import Path

import pytest
import torch

from equipoise.policy.likelihood import continuation_nll, text_nll
from equipoise.policy.load import load_policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import render_prompts, sentences_of
from equipoise.policy.rollout import rollout_of
from equipoise.policy.sample import sample
from equipoise.ppo.state import State
from equipoise.ppo.step import reward_sentences
from equipoise.ppo.training import Training, new_optimizer
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.ranks import ALONE
from tests.ppo.small import small_config
from tests.tiny import words_folder


def test_each_nat_per_token_of_the_untrained_model_is_charged_for(tmp_path: Path) -> None:
    config = small_config(words_folder(tmp_path / "model", prompt=None), tmp_path, strict_bonus=0.5)
    policy = load_policy(config.policy, PROTOCOL.prompt("raw"))
    prompts = render_prompts(policy.tokenizer, PROTOCOL.prompt("raw"), PROTOCOL, "").ids
    occupations = ["nurse", "pilot", "nurse", "chef"]
    starts = [prompts[o] for o in occupations]
    rollout = sample(policy, starts, config.sampling, torch.Generator().manual_seed(0))
    empty = rollout_of(starts[:1], [[policy.stop_ids[0]]])  # nothing follows the frame

    def paid(weight: float, written: object) -> torch.Tensor:
        charged = small_config(Path(config.policy.model), tmp_path, strict_bonus=0.5, fluency_weight=weight)
        state = State.begin(charged, RowLimit(2))
        training = Training(charged, policy, new_optimizer(charged, policy, ALONE), state, prompts)
        return reward_sentences(training, written, occupations[: len(written)]).paid_B  # type: ignore[arg-type]

    texts = sentences_of(policy.tokenizer, rollout, occupations, PROTOCOL)
    nll = continuation_nll(policy, texts, occupations, PROTOCOL, 4)
    assert len(nll) == 4 and max(nll) - min(nll) > 0.1
    assert (paid(0.0, rollout) - paid(0.3, rollout)).tolist() == pytest.approx([0.3 * x for x in nll], abs=1e-5)
    with_empty = rollout_of(starts[:3] + starts[:1], [*rollout.completions()[:3], *empty.completions()])
    whole = sentences_of(policy.tokenizer, with_empty, ["nurse", "pilot", "nurse", "nurse"], PROTOCOL)
    found = text_nll(policy, whole, ["nurse", "pilot", "nurse", "nurse"], PROTOCOL, 4)
    assert found[3] is None
    lost = (paid(0.0, with_empty) - paid(0.3, with_empty))[3]
    assert float(lost) == pytest.approx(0.3 * max(x for x in found if x is not None), abs=1e-5)
