"""What is sampled from a nucleus has the nucleus' probabilities, and they are what the distance is measured with."""

import itertools
import math

import pytest
import torch

from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.config import SamplingConfig
from equipoise.policy.likelihood import kl_to_reference
from equipoise.policy.rollout import rollout_of
from equipoise.policy.sample import sample
from equipoise.policy.ways import Ways
from tests.tiny import bare_policy, next_logprobs, perturb

PROMPT = [1, 2]
LONGEST = 3


def by_hand(policy, text: list[int], top_p: float) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """(log-probability under the policy's nucleus, −inf outside of it; under the whole reference)."""
    own, base = 0.0, 0.0
    for t, token in enumerate(text):
        ids = [*PROMPT, *text[:t]]
        p = [math.exp(x) for x in next_logprobs(policy.model, ids)]
        order = sorted(range(len(p)), key=lambda i: -p[i])
        inside, mass = [], 0.0
        for i in order:
            if mass >= top_p:
                break
            inside.append(i)
            mass += p[i]
        own += math.log(p[token] / mass) if token in inside else -math.inf
        base += next_logprobs(policy.reference, ids)[token]
    return own, base


@pytest.mark.parametrize("ways", [Ways(), Ways(nodes=5), Ways(packed=False), Ways(packed=False, padded=False)], ids=str)
def test_the_distance_of_nucleus_samples_is_that_of_what_they_were_sampled_from(ways: Ways) -> None:
    policy = perturb(bare_policy(4, attention=TRIE_ATTENTION), 0.1)
    policy.ways = ways
    texts = [
        [*start, *end]
        for n in range(1, LONGEST + 1)
        for start in itertools.product((1, 2, 3), repeat=n - 1)
        for end in ([0], [1], [2], [3])
        if end == [0] or n == LONGEST
    ]
    known = {tuple(text): by_hand(policy, text, 0.7) for text in texts}
    possible = [text for text in texts if math.isfinite(known[tuple(text)][0])]
    assert 1 < len(possible) < len(texts) and sum(math.exp(own) for own, _ in known.values()) == pytest.approx(1.0)
    found = kl_to_reference(policy, [rollout_of([PROMPT] * len(possible), possible)], SamplingConfig(1.0, 0.7), 4)
    expected = [own - base for own, base in (known[tuple(text)] for text in possible)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    drawn = sample(policy, [PROMPT] * 50, SamplingConfig(1.0, 0.7, LONGEST), torch.Generator().manual_seed(0))
    assert {tuple(text) for text in drawn.completions()} <= set(map(tuple, possible))


def test_without_a_nucleus_and_without_chance_the_whole_policy_is_meant() -> None:
    policy = perturb(bare_policy(4, attention=TRIE_ATTENTION), 0.1)
    rollout = rollout_of([PROMPT], [[1, 2, 0]])
    own, base = by_hand(policy, [1, 2, 0], 1.0)
    for sampling in (SamplingConfig(), SamplingConfig(0.0, 0.7)):
        assert kl_to_reference(policy, [rollout], sampling, 4).tolist() == pytest.approx([own - base], abs=1e-4)
