"""Scores against the plainest computation there is: one forward pass for every single token, in one row by itself."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.policy.score import entropies, score, token_logprobs
from tests.tiny import bare_policy, next_logprobs, perturb, pretend_graphs

# Prompts of different lengths, repeated, and one the beginning of another; completions repeated, one the beginning of
# another, one whose tokens continue a shorter prompt into a longer one. 0 stops and pads, and is part of a prompt, as
# the end of a turn does in a chat.
PROMPTS = [[1, 0, 3], [4], [1, 0, 3], [1, 0], [4], [1, 0], [1, 0, 3, 1, 1]]
COMPLETIONS = [[4, 4, 0], [1, 2, 3, 4], [4, 4, 0], [3, 4, 0], [0], [3, 4, 2, 2, 1], [4, 4]]
WAYS = [
    ("eager", False),
    ("sdpa", False),
    ("eager", True),
    ("sdpa", True),
    (TRIE_ATTENTION, True),
    (TRIE_ATTENTION, False),
]


def rollout_of(prompts: list[list[int]], completions: list[list[int]], pad: int = 0, extra: int = 0) -> Rollout:
    width = max(map(len, completions)) + extra
    return Rollout(
        prompts,
        torch.tensor([c + [pad] * (width - len(c)) for c in completions]),
        torch.tensor([len(c) for c in completions]),
        torch.tensor([c[-1] == 0 for c in completions]),
    )


ROLLOUT = rollout_of(PROMPTS, COMPLETIONS)


def brute_force(model: torch.nn.Module, temperature: float = 1.0) -> torch.Tensor:
    """log p of each completion token given exactly the tokens before it, row by row."""
    return torch.tensor(
        [
            next_logprobs(model, p + c[:t], temperature)[c[t]]
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
            for t in range(len(c))
        ]
    )


@pytest.mark.parametrize(("attention", "packed"), WAYS)
@pytest.mark.parametrize("lora", [False, True])
def test_log_prob_of_a_token_comes_from_the_position_before_it(attention: str, packed: bool, lora: bool) -> None:
    policy = perturb(bare_policy(attention=attention, lora=lora))
    plain = perturb(bare_policy(attention="eager", lora=lora)).model
    got = score(policy, ROLLOUT, 0.7, packed=packed).logprobs
    torch.testing.assert_close(got, brute_force(plain, 0.7), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("attention", "packed"), WAYS)
def test_entropy_is_that_of_the_distribution_the_token_was_drawn_from(attention: str, packed: bool) -> None:
    policy = bare_policy(attention=attention)
    got = score(policy, ROLLOUT, 1.3, packed=packed).entropies.tolist()
    before = [p + c[:t] for p, c in zip(PROMPTS, COMPLETIONS, strict=True) for t in range(len(c))]
    expected = [-sum(math.exp(x) * x for x in next_logprobs(policy.model, tokens, 1.3)) for tokens in before]
    assert got == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_values_place_is_the_one_that_predicts_the_token(packed: bool) -> None:
    """It sees all tokens before the one it belongs to, and not that one."""
    policy = perturb(bare_policy(attention=TRIE_ATTENTION))
    values = score(policy, ROLLOUT, 1.0, packed=packed).values
    alone = [
        score(policy, rollout_of([p], [c[: t + 1]]), 1.0, packed=False).values[-1]
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
        for t in range(len(c))
    ]
    torch.testing.assert_close(values, torch.stack(alone), atol=2e-5, rtol=0)
    other_last = [[*c[:-1], (c[-1] + 1) % 5] for c in COMPLETIONS]
    changed = score(policy, rollout_of(PROMPTS, other_last), 1.0, packed=packed).values
    torch.testing.assert_close(values, changed, atol=2e-5, rtol=0)
    assert values.std() > 0.01


def gradients(policy: Policy, rollouts: list[Rollout], packed: bool) -> dict[str, torch.Tensor]:
    for parameter in policy.trained().values():
        parameter.grad = None
    for rollout in rollouts:
        scores = score(policy, rollout, 0.8, packed=packed)
        (scores.logprobs.square().sum() + scores.entropies.sum() + scores.values.square().sum()).backward()
    found = {name: p.grad for name, p in policy.trained().items()}
    assert all(g is not None and g.abs().max() > 0 for g in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(("attention", "packed"), WAYS)
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_equal_those_of_single_rows(attention: str, packed: bool, lora: bool) -> None:
    single = [rollout_of([p], [c]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = gradients(perturb(bare_policy(attention="eager", lora=lora)), single, packed=False)
    got = gradients(perturb(bare_policy(attention=attention, lora=lora)), [ROLLOUT], packed)
    for name, gradient in expected.items():
        assert float((got[name] - gradient).norm()) < 1e-4 * float(gradient.norm()), name


@pytest.mark.parametrize("packed", [False, True])
def test_what_stands_beyond_a_rows_length_is_never_looked_at(packed: bool) -> None:
    """Masks come from lengths: the pad id 0 is also the stop id, which counts where it ends a row."""
    policy = perturb(bare_policy(attention=TRIE_ATTENTION))
    plain = score(policy, ROLLOUT, 1.0, packed=packed)
    for other in (rollout_of(PROMPTS, COMPLETIONS, pad=3), rollout_of(PROMPTS, COMPLETIONS, extra=4)):
        torch.testing.assert_close(score(policy, other, 1.0, packed=packed), plain, atol=0, rtol=0)


def test_the_mask_counts_the_stop_token_and_no_padding() -> None:
    assert ROLLOUT.mask_BT.sum(1).tolist() == [3, 4, 3, 3, 1, 5, 2]
    assert ROLLOUT.tokens_N.tolist() == [token for c in COMPLETIONS for token in c]
    assert ROLLOUT.completions() == COMPLETIONS
    chosen = ROLLOUT.select(torch.tensor([4, 1]))
    assert (chosen.prompts, chosen.completions()) == ([[4], [4]], [[0], [1, 2, 3, 4]])
    assert chosen.finished_B.tolist() == [True, False] and len(chosen) == 2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", [[6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 2, 5, 1, 4], [5, 1]])
def test_a_rows_scores_do_not_depend_on_its_company(packed: bool, order: list[int]) -> None:
    policy = perturb(bare_policy(attention=TRIE_ATTENTION))
    ends = torch.tensor([len(c) for c in COMPLETIONS]).cumsum(0).tolist()
    whole = score(policy, ROLLOUT, 1.0, packed=packed)
    part = score(policy, ROLLOUT.select(torch.tensor(order)), 1.0, packed=packed)
    for kind, all_rows in whole._asdict().items():
        expected = torch.cat([all_rows[ends[i] - len(COMPLETIONS[i]) : ends[i]] for i in order])
        torch.testing.assert_close(getattr(part, kind), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_the_stop_token_is_an_action_with_a_gradient(packed: bool) -> None:
    policy = bare_policy()
    stopped = rollout_of([[1, 2]], [[0]])
    before = next_logprobs(policy.model, [1, 2])[0]
    score(policy, stopped, 1.0, packed=packed).logprobs.sum().backward()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * parameter.grad)
    assert next_logprobs(policy.model, [1, 2])[0] > before + 0.01


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_policy_equals_reference_exactly_until_it_is_trained_and_the_reference_never_moves(
    packed: bool, lora: bool
) -> None:
    policy = bare_policy(attention=TRIE_ATTENTION, lora=lora)
    policy_before = score(policy, ROLLOUT, 0.7, packed=packed).logprobs
    reference_before = score(policy, ROLLOUT, 0.7, packed=packed, reference=True).logprobs
    assert torch.equal(policy_before, reference_before)
    perturb(policy)
    assert torch.equal(score(policy, ROLLOUT, 0.7, packed=packed, reference=True).logprobs, reference_before)
    assert not torch.allclose(score(policy, ROLLOUT, 0.7, packed=packed).logprobs, policy_before, atol=0.1)


@pytest.mark.parametrize("reference", [False, True])
def test_temperature_divides_the_logits_of_policy_and_reference_alike(reference: bool) -> None:
    """Odds between two tokens at temperature T are the T-th root of those at 1."""
    policy = perturb(bare_policy())
    first = [rollout_of([[1, 2]], [[token]]) for token in range(5)]

    def at(temperature: float) -> torch.Tensor:
        scores = [score(policy, r, temperature, packed=True, reference=reference).logprobs for r in first]
        return torch.cat(scores)

    for temperature in (0.5, 2.0, 7.0):
        tempered, plain = at(temperature), at(1.0)
        torch.testing.assert_close(tempered - tempered[0], (plain - plain[0]) / temperature, atol=2e-5, rtol=0)
        assert float(tempered.detach().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_values_start_at_zero_and_their_loss_reaches_the_value_head_alone() -> None:
    policy = bare_policy()
    values = score(policy, ROLLOUT, 1.0, packed=True).values
    assert torch.equal(values, torch.zeros(len(values)))
    perturb(policy)
    score(policy, ROLLOUT, 1.0, packed=True).values.sum().backward()
    moved = {name for name, p in policy.trained().items() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"value_head.weight", "value_head.bias"}


def test_scores_are_float32_and_sum_to_one_where_the_model_computes_in_bfloat16() -> None:
    policy = bare_policy(vocabulary=50, dtype=torch.bfloat16)
    rows = rollout_of([[1, 2]] * 50, [[token] for token in range(50)])
    scores = score(policy, rows, 1.0, packed=True)
    assert {x.dtype for x in scores} == {torch.float32}
    assert float(scores.logprobs.detach().double().exp().sum()) == pytest.approx(1, abs=1e-6)


def test_bfloat16_logits_lose_nothing_further_in_the_softmax() -> None:
    logits = torch.tensor([[8.0, 7.9375, -3.0, 0.0]], dtype=torch.bfloat16)
    exact = [x - math.log(sum(math.exp(y) for y in logits[0].tolist())) for x in logits[0].tolist()]
    assert token_logprobs(logits.expand(4, -1), torch.arange(4), 1.0).tolist() == pytest.approx(exact, abs=2e-6)


def test_the_entropy_of_n_equal_tokens_is_log_n_and_a_masked_token_counts_nothing() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 5.0, -torch.inf, -torch.inf]], requires_grad=True)
    found = entropies(logits, 1.0)
    assert found.tolist() == pytest.approx([math.log(4), math.log(2)], abs=1e-6)
    found.sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("lora", [False, True])
def test_dropout_is_off_in_training_mode_too(lora: bool) -> None:
    """The adapters were configured with a dropout of 0.3; this attention had one of 0.5."""
    config = LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        attention_dropout=0.5, initializer_range=0.4, attn_implementation="eager",
    )  # fmt: skip
    policies = [Policy(LlamaForCausalLM(config), None, reference=LlamaForCausalLM(config), stop_ids=(0,))]
    if lora:
        policies = [perturb(bare_policy(lora=True))]
    for policy in policies:
        policy.model.eval()
        expected = score(policy, ROLLOUT, 1.0, packed=False).logprobs
        policy.model.train()
        for _ in range(3):
            assert torch.equal(score(policy, ROLLOUT, 1.0, packed=False).logprobs, expected)


@pytest.mark.parametrize("attention", ["sdpa", TRIE_ATTENTION])
@pytest.mark.parametrize("reference", [False, True])
def test_padding_a_pack_to_the_shapes_of_graphs_changes_no_score(
    attention: str, reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = perturb(bare_policy(attention=attention, lora=True))
    fast = pretend_graphs(perturb(bare_policy(attention=attention, lora=True)), monkeypatch)
    for rollout in (ROLLOUT, rollout_of(PROMPTS[:3], COMPLETIONS[:3]), ROLLOUT):
        with torch.no_grad():
            expected = score(plain, rollout, 0.7, packed=True, reference=reference)
            found = score(fast, rollout, 0.7, packed=True, reference=reference)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        with_gradients = score(fast, rollout, 0.7, packed=True, reference=reference)
        torch.testing.assert_close(with_gradients, expected, atol=2e-5, rtol=0)
