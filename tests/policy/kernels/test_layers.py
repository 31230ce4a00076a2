"""The fused layer of every architecture against transformers' own passes of single rows, in Triton's interpreter."""

import pytest
import torch

from equipoise.policy.eightbit import ROTATED
from tests import layers

QUICK = {("gemma3", "full"), ("gpt2", "lora"), ("gemma2", "decoding")}
"""Between them: both kinds of norm, all four places of one, norms of heads, windows, caps, biases, no rotation."""


def cases(*works: str) -> list[object]:
    return [
        pytest.param(name, work, marks=() if (name, work) in QUICK else pytest.mark.slow, id=f"{name}-{work}")
        for name in layers.LAYERS
        for work in works
    ]


def agree(name: str, tuning: str, **options: object) -> None:
    found, gradients = layers.scores_and_gradients(name, tuning=tuning, fused=True, **options)
    expected, own = layers.scores_and_gradients(name, tuning=tuning, fused=False, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert gradients.keys() == own.keys()
    for key, gradient in own.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=2e-4, atol=5e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("name", "tuning"), cases("lora", "full"))
def test_packed_scores_and_gradients_are_those_of_single_rows(name: str, tuning: str) -> None:
    agree(name, tuning)


@pytest.mark.parametrize(("name", "work"), cases("decoding"))
def test_decoding_over_the_static_cache_gives_the_logits_of_whole_rows(name: str, work: str) -> None:
    found, expected = layers.decoded(name)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen2", {"sliding_window": 64}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 32}),
        ("gemma3", {"sliding_window": 64}),
        ("gemma3", {"rope_parameters": {k: layers.GEMMA3_ROPE["full_attention"] for k in layers.GEMMA3_ROPE}}),
        ("mistral", {"sliding_window": 64}),
        ("phi3", {"sliding_window": None}),
        ("phi3-partial", {"partial_rotary_factor": 1.0}),
        ("olmo3", {"sliding_window": 64}),
        ("smollm3", {"no_rope_layers": [1, 1]}),
        ("gpt2", {"activation_function": "relu"}),
    ],
)
def test_what_the_architectures_differ_in_shows_in_the_numbers(
    name: str, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else the tests above would prove nothing."""
    rows = layers.rollout()
    with torch.no_grad():
        before = layers.by_transformers(layers.policy(name, tuning="lora", fused=False), rows)
        kind, settings = layers.LAYERS[name]
        monkeypatch.setitem(layers.LAYERS, name, (kind, {**settings, **change}))
        after = layers.by_transformers(layers.policy(name, tuning="lora", fused=False), rows)
    assert (before - after).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("into", [torch.int8, ROTATED])
@pytest.mark.parametrize("name", layers.LAYERS)
def test_weights_in_8_bits_give_the_scores_and_gradients_of_single_rows(name: str, into: torch.dtype) -> None:
    found, gradients = layers.scores_and_gradients(name, tuning="lora", fused=True, eight_bits=into)
    expected, own = layers.scores_and_gradients(name, tuning="lora", fused=False, eight_bits=into)
    if into == torch.int8:
        assert (found - expected).norm() < 1e-3 * expected.norm()
        for key, gradient in own.items():
            assert (gradients[key] - gradient).norm() < 1e-3 * gradient.norm() + 1e-6, key
        return
    # A value between two of the format's falls to either side by the last bit. What that does to all gradients together
    # is less than what the format itself does to them, which the model in float32 shows.
    exact, unrounded = layers.scores_and_gradients(name, tuning="lora", fused=False)
    assert (found - expected).norm() < (expected - exact).norm() + 1e-5 * expected.norm()
    fused, plain, whole = (torch.cat([each[key].flatten() for key in own]) for each in (gradients, own, unrounded))
    assert (fused - plain).norm() < (plain - whole).norm() + 1e-5 * plain.norm()
