"""The sampler draws exactly the policy that is scored: single draws over a grid, whole sentences counted."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.policy import draw as drawing
from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.config import SamplingConfig
from equipoise.policy.draw import draw
from equipoise.policy.load import Policy
from equipoise.policy.sample import NonFiniteLogits, sample
from equipoise.policy.score import score
from tests.tiny import bare_policy, next_logprobs, perturb, pretend_graphs


def exact(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Softmax of logits / T, cut to the smallest set of likeliest tokens that holds top_p, renormalised."""
    weights = [math.exp(x / temperature) for x in logits]
    probs = [w / sum(weights) for w in weights]
    kept: list[int] = []
    for token in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if sum(probs[i] for i in kept) >= top_p:
            break
        kept.append(token)
    mass = sum(probs[i] for i in kept)
    return [p / mass if i in kept else 0.0 for i, p in enumerate(probs)]


LOGITS = [1.2, -0.3, 2.0, 0.1, -1.5, 0.9, -4.0]


@pytest.mark.parametrize("candidates", [512, 3])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.6, 0.3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_over_a_fine_grid_each_token_is_drawn_exactly_as_often_as_it_is_probable(
    temperature: float, top_p: float, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "CANDIDATES", candidates)
    n = 20_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = draw(torch.tensor(LOGITS).expand(n, -1), uniform, SamplingConfig(temperature, top_p))
    counts = torch.bincount(tokens, minlength=len(LOGITS)).tolist()
    # An interval of length p holds p·n grid points, give or take one; float32 probabilities add 1e-7 · n.
    assert counts == pytest.approx([n * p for p in exact(LOGITS, temperature, top_p)], abs=1.01)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=9),
    st.sampled_from([0.3, 1.0, 3.0]),
    st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    st.sampled_from([0.0, 1e-18, 0.25, 0.5, 0.999, math.nextafter(1, 0)]),
)
def test_no_token_outside_the_nucleus_is_ever_drawn(
    logits: list[float], temperature: float, top_p: float, uniform: float
) -> None:
    config = SamplingConfig(temperature, top_p)
    token = int(draw(torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64), config))
    # In the nucleus: the likelier tokens alone do not reach top_p. Ties, and float32's last digit, may go either way.
    probs = exact(logits, temperature, 1.0)
    assert sum(p for p in probs if p > probs[token] * (1 + 1e-5)) < top_p + 1e-5
    # What is rarer than the rounding of the others' sum comes up at the smallest numbers alone.
    assert probs[token] > 0 or (uniform < 2**-53 and max(logits) - logits[token] > 36 * temperature)


def test_impossible_tokens_are_never_drawn_even_at_the_ends() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for uniform, expected in ((0.0, 1), (math.nextafter(1, 0), 2)):
        assert int(draw(logits, torch.tensor([uniform], dtype=torch.float64), SamplingConfig())) == expected


def test_a_nucleus_wider_than_the_candidates_is_drawn_whole() -> None:
    n = drawing.CANDIDATES * 4
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    nearly_flat = torch.linspace(0, -1e-3, n).expand(n, -1)
    tokens = draw(nearly_flat, uniform, SamplingConfig(top_p=0.75))
    assert abs(len(tokens.unique()) - 0.75 * n) <= 4
    assert int(tokens.max()) < 0.76 * n


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    tokens = draw(logits, torch.tensor([0.999, 0.999], dtype=torch.float64), SamplingConfig(0.0))
    assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_each_row_of_many_is_drawn_as_if_it_were_alone(top_p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 2 * drawing.CPU_ROWS + 3  # the last part is not full
    logits, config = 3 * torch.randn(rows, 50, generator=generator), SamplingConfig(top_p=top_p)
    uniform = torch.rand(rows, 2, generator=generator, dtype=torch.float64)
    alone = torch.cat([draw(logits[i : i + 1], uniform[i : i + 1, 0], config) for i in range(rows)])
    assert torch.equal(draw(logits, uniform[:, 0], config), alone) and len(alone.unique()) > 5
    probs = drawing.weights(logits, config)
    both = torch.cat([drawing.invert_many(probs[i : i + 1], uniform[i : i + 1]) for i in range(rows)])
    assert torch.equal(drawing.invert_many(probs, uniform), both) and torch.equal(both[:, 0], alone)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999999])
def test_the_nucleus_that_is_found_without_sorting_is_the_sorted_one(top_p: float) -> None:
    spread_B1 = torch.tensor([0.0, 0.1, 2.0, 30.0])[:, None]
    probs = (spread_B1 * torch.randn(4, 600, generator=torch.Generator().manual_seed(0))).softmax(-1)
    by_bits, sorted_ = drawing._threshold_by_bisection(probs, top_p), drawing._threshold_by_sorting(probs, top_p)
    assert torch.equal(probs >= by_bits[:, None], probs >= sorted_[:, None])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_logits_that_are_not_finite_give_some_valid_token(bad: float, top_p: float) -> None:
    tokens = draw(
        torch.full((3, 6), bad), torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64), SamplingConfig(1, top_p)
    )
    assert bool(((tokens >= 0) & (tokens < 6)).all())


def sentences(policy: Policy, prompt: list[int], config: SamplingConfig) -> dict[tuple[int, ...], float]:
    """The probability of every completion there can be, one plain forward pass for each token."""
    out: dict[tuple[int, ...], float] = {}

    def grow(done: tuple[int, ...], p: float) -> None:
        if len(done) == config.max_new_tokens or (done and done[-1] in policy.stop_ids):
            out[done] = p
            return
        logprobs = next_logprobs(policy.model, [*prompt, *done])
        for token, q in enumerate(exact(logprobs, config.temperature, config.top_p)):
            if q:
                grow((*done, token), p * q)

    grow((), 1.0)
    return out


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.5, 1.0), (1.0, 0.98), (3.0, 0.8)], ids=str
)
def test_whole_sentences_come_as_often_as_the_plain_forward_pass_says(temperature: float, top_p: float) -> None:
    policy = bare_policy(vocabulary=4, stops=(0, 3))
    config = SamplingConfig(temperature, top_p, max_new_tokens=3)
    prompts, n = [[1, 2], [2, 1, 1]], 4000
    rollout = sample(policy, prompts * n, config, torch.Generator().manual_seed(0))
    for i, prompt in enumerate(prompts):
        expected = sentences(policy, prompt, config)
        assert sum(expected.values()) == pytest.approx(1)
        counts = dict.fromkeys(expected, 0)
        for completion in rollout.completions()[i :: len(prompts)]:
            counts[tuple(completion)] += 1
        likely = {s: p for s, p in expected.items() if p * n >= 5}
        rare = 1 - sum(likely.values())
        cells = [(counts[s], p * n) for s, p in likely.items()]
        cells += [(n - sum(c for c, _ in cells), rare * n)] if rare * n >= 5 else []
        chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
        # Mean k−1 and variance 2(k−1) under the hypothesis: four standard deviations are far beyond chance.
        freedom = len(cells) - 1
        assert freedom >= 3 and chi_square < freedom + 4 * math.sqrt(2 * freedom), (chi_square, freedom)


# Ragged and repeated, so that prompts are padded, caches copied and finished rows dropped in between.
RAGGED = [[1, 2, 3], [4], [1, 2, 3, 4, 1, 2], [4], [2, 2]] * 4


@pytest.mark.parametrize("attention", ["eager", "sdpa", TRIE_ATTENTION])
@pytest.mark.parametrize("lora", [False, True])
def test_every_token_is_the_one_its_random_number_picks_from_the_plain_forward_pass(attention: str, lora: bool) -> None:
    policy = perturb(bare_policy(stops=(0, 3), attention=attention, lora=lora), 0.2)
    config = SamplingConfig(0.9, max_new_tokens=7)
    uniform = torch.rand(len(RAGGED), 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rollout = sample(policy, RAGGED, config, uniform_BT=uniform)
    lengths = set()
    for row, (prompt, completion) in enumerate(zip(RAGGED, rollout.completions(), strict=True)):
        lengths.add(len(completion))
        for t, token in enumerate(completion):
            probs = [math.exp(x) for x in next_logprobs(policy.model, prompt + completion[:t], 0.9)]
            below = sum(probs[:token])
            assert below - 1e-5 <= float(uniform[row, t]) <= below + probs[token] + 1e-5
    assert len(lengths) >= 4  # rows did end at different times


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "config", [SamplingConfig(0.9, 1.0, 7), SamplingConfig(1.1, 0.9, 5), SamplingConfig(0.0)], ids=str
)
def test_the_static_decoder_draws_what_the_plain_loop_draws(
    lora: bool, config: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fast = (perturb(bare_policy(stops=(0, 3), attention=TRIE_ATTENTION, lora=lora), 0.2) for _ in range(2))
    pretend_graphs(fast, monkeypatch)
    for seed, prompts in enumerate((RAGGED, RAGGED[:3], RAGGED, [[2] * 18], RAGGED * 5)):
        uniform = torch.rand(
            len(prompts), config.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        expected = sample(plain, prompts, config, uniform_BT=uniform)
        found = sample(fast, prompts, config, uniform_BT=uniform)
        assert found.completions() == expected.completions()
        assert found.finished_B.tolist() == expected.finished_B.tolist()
        assert list(found.prompts) == list(expected.prompts)
    assert fast.decoders and not plain.decoders


def test_logits_that_are_not_finite_stop_the_static_decoder_too(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = pretend_graphs(bare_policy(attention=TRIE_ATTENTION), monkeypatch)
    weight = policy.model.model.layers[1].mlp.down_proj.weight
    sound = weight.detach().clone()
    for value, works in ((sound[3, 3].item(), True), (torch.nan, False), (sound[3, 3].item(), True)):
        with torch.no_grad():
            weight[3, 3] = value
        if works:
            sample(policy, RAGGED, SamplingConfig(), torch.Generator())
        else:
            with pytest.raises(NonFiniteLogits):
                sample(policy, RAGGED, SamplingConfig(), torch.Generator())


def test_a_completion_ends_at_the_first_of_any_stop_token_which_counts_or_is_flagged_as_cut_off() -> None:
    policy = bare_policy(stops=(0, 3))
    rollout = sample(policy, RAGGED * 5, SamplingConfig(max_new_tokens=4), torch.Generator().manual_seed(0))
    endings = set()
    for row, completion in enumerate(rollout.completions()):
        assert 1 <= len(completion) <= 4 and not {0, 3} & set(completion[:-1])
        stopped = completion[-1] in (0, 3)
        assert bool(rollout.finished_B[row]) is stopped
        assert stopped or len(completion) == 4
        assert rollout.tokens_BT[row, len(completion) :].tolist() == [0] * (4 - len(completion))
        endings.add((completion[-1] if stopped else "cut off", len(completion) == 4))
    # Both stop tokens, early and at the last place allowed, and some cut off.
    assert endings == {(0, False), (3, False), (0, True), (3, True), ("cut off", True)}


def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_their_order() -> None:
    policy = bare_policy()
    config = SamplingConfig(max_new_tokens=6)
    uniform = torch.rand(len(RAGGED), 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = sample(policy, RAGGED, config, uniform_BT=uniform).completions()
    order = torch.randperm(len(RAGGED), generator=torch.Generator().manual_seed(3))
    mixed = sample(policy, [RAGGED[i] for i in order], config, uniform_BT=uniform[order]).completions()
    assert mixed == [whole[i] for i in order]
    alone = [sample(policy, [p], config, uniform_BT=uniform[i : i + 1]).completions()[0] for i, p in enumerate(RAGGED)]
    assert alone == whole


def test_the_same_seed_gives_the_same_sentences_and_another_seed_others() -> None:
    policy = bare_policy()
    first, second, third = (
        sample(policy, RAGGED, SamplingConfig(), torch.Generator().manual_seed(seed)).completions()
        for seed in (1, 1, 2)
    )
    assert first == second != third


@pytest.mark.parametrize("lora", [False, True])
def test_recomputing_activations_leaves_the_samples_as_they_are(lora: bool) -> None:
    """Where it is on, transformers drops the key-value cache of a model in training mode, with a mere warning."""
    policy = perturb(bare_policy(lora=lora), 0.2)
    rollouts = [sample(policy, RAGGED, SamplingConfig(), torch.Generator().manual_seed(0))]
    policy.model.enable_input_require_grads()
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.recompute = True
    score(policy, rollouts[0], 1.0, packed=True).logprobs.sum().backward()
    rollouts.append(sample(policy, RAGGED, SamplingConfig(), torch.Generator().manual_seed(0)))
    assert rollouts[0].completions() == rollouts[1].completions()


def test_logits_that_are_not_finite_stop_the_sampling() -> None:
    policy = bare_policy()
    with torch.no_grad():
        policy.model.model.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    with pytest.raises(NonFiniteLogits, match="token 1"):
        sample(policy, RAGGED, SamplingConfig(), torch.Generator())


def test_mean_k1_to_the_reference_is_the_exact_kl_of_the_sentences_and_so_not_negative() -> None:
    """At top_p 1, of a policy that has moved: the mean of Σ log π − log π_ref over samples against enumeration."""
    policy = perturb(bare_policy(vocabulary=4, stops=(0,)), 0.08)
    config = SamplingConfig(0.8, max_new_tokens=3)
    n = 4000
    rollout = sample(policy, [[1, 2]] * n, config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, reference = (
            score(policy, rollout, config.temperature, packed=True, reference=r).logprobs for r in (False, True)
        )
    k1 = torch.zeros(rollout.mask_BT.shape).masked_scatter(rollout.mask_BT, ours - reference).sum(1)

    distribution = sentences(policy, [1, 2], config)
    base = sentences(Policy(policy.reference, None, reference=policy.reference, stop_ids=(0,)), [1, 2], config)
    kl = sum(p * math.log(p / base[s]) for s, p in distribution.items())
    error = float(k1.std()) / math.sqrt(n)
    assert kl > 0.02 and error < kl / 4, "a test of nothing"
    assert abs(float(k1.mean()) - kl) < 3.5 * error
    assert float(k1.mean()) > 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.01}, "top-p 1.01"),
        ({"top_p": math.nan}, "top-p nan"),
        ({"max_new_tokens": 0}, "max-new-tokens 0"),
    ],
)
def test_numbers_that_make_no_distribution_are_refused(settings: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        SamplingConfig(**settings)  # type: ignore[arg-type]


def test_the_sampler_takes_one_source_of_random_numbers() -> None:
    policy = bare_policy()
    for both in ({}, {"generator": torch.Generator(), "uniform_BT": torch.zeros(1, 32, dtype=torch.float64)}):
        with pytest.raises(AssertionError, match="one source"):
            sample(policy, [[1]], SamplingConfig(), **both)  # type: ignore[arg-type]


def test_greedy_sampling_follows_the_likeliest_token() -> None:
    policy = bare_policy()
    rollout = sample(policy, [[1, 2], [3]], SamplingConfig(0.0, max_new_tokens=5), torch.Generator())
    for prompt, completion in zip(rollout.prompts, rollout.completions(), strict=True):
        for t, token in itertools.islice(enumerate(completion), 5):
            logprobs = next_logprobs(policy.model, [*prompt, *completion[:t]])
            assert logprobs[token] == max(logprobs)
