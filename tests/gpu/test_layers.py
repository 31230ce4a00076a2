"""The fused layer of every architecture against transformers' own passes of single rows, compiled and on a GPU."""

from pathlib import Path

import pytest
import torch

from equipoise.policy.config import SamplingConfig
from equipoise.policy.sample import sample
from equipoise.policy.score import score
from equipoise.policy.verify import one_by_one, settle
from equipoise.policy.ways import Ways
from tests import layers
from tests.families import family_folder
from tests.policy.test_families import NEW, loaded, prompts

pytestmark = pytest.mark.gpu
NAMES = list(layers.LAYERS)


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_scores_and_gradients_are_those_of_single_rows(name: str, tuning: str) -> None:
    found, gradients = layers.scores_and_gradients(name, tuning=tuning, fused=True, padded=True, device="cuda")
    expected, own = layers.scores_and_gradients(name, tuning=tuning, fused=False, device="cuda")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    for key, gradient in own.items():
        difference = float((gradients[key] - gradient).norm())
        assert difference <= 2e-3 * float(gradient.norm()) + 1e-5, f"{key}: {difference / float(gradient.norm()):.5f}"


@pytest.mark.parametrize("name", NAMES)
def test_decoding_over_the_static_cache_gives_the_logits_of_whole_rows(name: str) -> None:
    found, expected = layers.decoded(name, device="cuda")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_it_is_as_far_from_float32_as_transformers_own(name: str) -> None:
    exact, _ = layers.scores_and_gradients(name, tuning="lora", fused=False, device="cuda")
    options = {"tuning": "lora", "device": "cuda", "dtype": torch.bfloat16}
    found, _ = layers.scores_and_gradients(name, fused=True, **options)
    plain, _ = layers.scores_and_gradients(name, fused=False, **options)
    assert (found - exact).abs().mean() <= 2 * (plain - exact).abs().mean() + 0.01


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "olmo2"])
def test_from_graphs_it_is_found_to_have_the_numbers_of_one_row_by_itself(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, settings = layers.LAYERS[name]
    if "sliding_window" in settings:  # one that holds every text
        monkeypatch.setitem(layers.LAYERS, name, (kind, {**settings, "sliding_window": 64}))
    policy = layers.policy(name, tuning="lora", fused=True, device="cuda")
    policy.graphs.enabled = True
    settle(policy, layers.PROMPTS, 3, lambda line: pytest.fail(line))
    assert policy.ways == Ways() or policy.ways.fast


@pytest.mark.parametrize(
    ("name", "reason", "recorded"),
    [
        ("cohere", "layers of the kind CohereDecoderLayer", True),
        ("qwen3-moe", "a mixture of experts", None),
        ("bloom", "layers of the kind BloomBlock", False),
        ("bamba", "a state beside or in place of attention", False),
    ],
)
def test_what_is_not_covered_is_said_in_one_line_and_has_the_models_own_numbers(
    name: str, reason: str, recorded: bool | None, tmp_path: Path
) -> None:
    policy, said = loaded(family_folder(name, tmp_path), device="cuda"), []
    settle(policy, prompts(), NEW, said.append)
    kind = policy.model.config.model_type
    assert said.count(f"{kind} models take the slow path on a GPU: the fast layer does not cover {reason}") == 1
    assert recorded is None or policy.graphs.enabled is recorded
    assert policy.graphs.enabled or recorded is not None or any("cannot be recorded" in line for line in said)
    print(name, "recorded" if policy.graphs.enabled else "not recorded", said)
    with torch.no_grad():
        for seed in (1, 2):
            drawn = sample(policy, prompts(), SamplingConfig(max_new_tokens=NEW), torch.Generator().manual_seed(seed))
            found = score(policy, drawn, 1.0, packed=True).logprobs
            assert (found - one_by_one(policy, drawn)).abs().max() < 2e-3


@pytest.mark.parametrize("name", NAMES)
def test_with_weights_in_int8_it_has_the_numbers_of_single_rows(name: str) -> None:
    options = {"device": "cuda", "eight_bits": torch.int8}
    found, gradients = layers.scores_and_gradients(name, tuning="lora", fused=True, padded=True, **options)
    expected, own = layers.scores_and_gradients(name, tuning="lora", fused=False, **options)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    for key, gradient in own.items():
        difference = float((gradients[key] - gradient).norm())
        assert difference <= 2e-3 * float(gradient.norm()) + 1e-5, f"{key}: {difference / float(gradient.norm()):.5f}"
    found, expected = layers.decoded(name, **options)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-4)
