"""Measuring beside the training, on a GPU with the bundled model: graphs, decoders and buffers stay in step."""

import pytest
import torch

from equipoise.learning.optimizer import MasterAdam
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.likelihood import kl_to_reference
from equipoise.policy.load import Policy, load_policy
from equipoise.policy.prompt import prompt_ids
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import sample
from equipoise.policy.score import score
from equipoise.ppo.base import measure_base
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.evaluate import draw_sentences, evaluate, fluency
from equipoise.ppo.nonfinite import locate
from equipoise.protocol.task import PROTOCOL
from tests.default import OCCUPATIONS, PROMPTS

pytestmark = pytest.mark.gpu
PROMPT = PROMPTS["describe"]
NUCLEUS = SamplingConfig(top_p=0.95)


@pytest.fixture(scope="module", params=["lora", "full"])
def policy(request: pytest.FixtureRequest) -> Policy:
    torch.manual_seed(0)
    return load_policy(PolicyConfig(tuning=request.param), PROMPT)


def prompts(policy: Policy) -> dict[str, list[int]]:
    return {o: prompt_ids(policy.tokenizer, PROMPT, o, PROTOCOL) for o in OCCUPATIONS}


def test_an_untrained_policy_is_at_distance_nothing_and_its_rate_is_the_known_one(policy: Policy) -> None:
    drawn = draw_sentences(policy, PROTOCOL, prompts(policy), SamplingConfig(), 150, "test", 64)
    kl_B = kl_to_reference(policy, drawn.rollouts, SamplingConfig(), 64)
    assert kl_B.abs().max() < 1e-3
    rates = measure_base(policy, PROTOCOL, prompts(policy), SamplingConfig(), NUCLEUS, (1280, 64))
    assert 0 < rates.both < 20  # 0.4 % are 5 of 1,280
    assert rates.nll is not None and 1.0 < rates.nll < 5.0


def test_distances_packed_on_the_gpu_are_the_padded_ones(policy: Policy) -> None:
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "down_proj" in name):
                parameter.add_(0.002 * torch.randn_like(parameter))
    (rollout,) = draw_sentences(policy, PROTOCOL, prompts(policy), NUCLEUS, 32, "test", 32).rollouts
    found = kl_to_reference(policy, [rollout], SamplingConfig(), 32)
    with torch.no_grad():
        ours, theirs = (score(policy, rollout, 1.0, packed=False, reference=r).logprobs for r in (False, True))
    slow = torch.stack([x.sum() for x in (ours - theirs).cpu().double().split(rollout.lengths_B.tolist())])
    # In bfloat16 a token's log-probability moves by some 0.05, in either direction, and a sentence has about 30.
    assert (found - slow).abs().mean() < 0.5 and (found - slow).mean().abs() < 0.2 and found.abs().max() > 0.5


def test_weights_swapped_for_their_average_are_what_recorded_graphs_compute_with(policy: Policy) -> None:
    def greedy() -> Rollout:
        config = SamplingConfig(temperature=0.0)
        ids = list(prompts(policy).values())
        return sample(policy, ids, config, uniform_BT=torch.zeros(20, config.max_new_tokens, dtype=torch.float64)).cpu()

    adam = MasterAdam(policy.trained(), betas=(0.9, 0.999), eps=1e-5, average=0.9)
    policy.forget_recordings()
    before = greedy()
    assert adam.average is not None
    adam.average.add_(0.02 * torch.randn_like(adam.average))
    with adam.averaged():
        assert not torch.equal(greedy().tokens_BT, before.tokens_BT)
    assert torch.equal(greedy().tokens_BT, before.tokens_BT)


def test_an_evaluation_is_the_same_when_repeated_and_the_search_for_an_origin_leaves_no_trace(policy: Policy) -> None:
    MasterAdam(policy.trained(), betas=(0.9, 0.999), eps=1e-5)
    policy.forget_recordings()
    first, drawn = evaluate(policy, PROTOCOL, prompts(policy), NUCLEUS, 150, "evaluation", 64)
    assert fluency(policy, drawn, PROTOCOL) is not None
    rollout = drawn.rollouts[0]
    shape = rollout.tokens_BT.shape
    evidence = {"advantages": torch.ones(shape), "logprobs": torch.full(shape, -1.0)}
    assert "not reproduced" in locate(policy, rollout, evidence, TrainConfig())["where"]
    second, again = evaluate(policy, PROTOCOL, prompts(policy), NUCLEUS, 150, "evaluation", 64)
    assert again.texts == drawn.texts
    assert second == pytest.approx(first, abs=1e-3)
