"""The fast paths against their plain twins, on a GPU with the bundled model."""

import pytest
import torch

from equipoise.learning.optimizer import MasterAdam
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.draw import draw
from equipoise.policy.fused import product
from equipoise.policy.graphs import on_its_way, sent
from equipoise.policy.load import Policy, load_policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import prompt_ids
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import sample
from equipoise.policy.score import score
from equipoise.ppo import maths
from equipoise.ppo import update as updating
from equipoise.ppo.config import PPOConfig
from equipoise.ppo.experience import Experience
from equipoise.ppo.update import Update, mini_batches
from equipoise.protocol.task import PROTOCOL
from tests.default import OCCUPATIONS, PROMPTS

pytestmark = pytest.mark.gpu
PROMPT = PROMPTS["describe"]


def make(dtype: str, *, tuning: str = "lora", fast: bool = True) -> Policy:
    torch.manual_seed(0)
    policy = load_policy(PolicyConfig(tuning=tuning, dtype=dtype, cuda_graphs=fast, fused=fast), PROMPT)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # zeros would hide the adapters
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


def prompts(policy: Policy, rows: int) -> list[list[int]]:
    return [prompt_ids(policy.tokenizer, PROMPT, OCCUPATIONS[i % 20], PROTOCOL) for i in range(rows)]


@pytest.fixture(scope="module")
def fast32() -> Policy:
    return make("float32")


@pytest.fixture(scope="module")
def plain32() -> Policy:
    return make("float32", fast=False)


@pytest.fixture(scope="module")
def rollout(plain32: Policy) -> Rollout:
    return sample(plain32, prompts(plain32, 64), SamplingConfig(), torch.Generator().manual_seed(2)).cpu()


@pytest.mark.parametrize("rows", [1, 7, 64, 200])
def test_greedy_tokens_are_the_same(fast32: Policy, plain32: Policy, rows: int) -> None:
    config = SamplingConfig(temperature=0.0)
    uniform = torch.zeros(rows, config.max_new_tokens, dtype=torch.float64)
    fast = sample(fast32, prompts(fast32, rows), config, uniform_BT=uniform)
    plain = sample(plain32, prompts(plain32, rows), config, uniform_BT=uniform)
    same = (fast.tokens_BT == plain.tokens_BT).all(1).float().mean().item()
    assert same >= 0.98, f"{same:.3f} of the rows are the same"  # a tie to the last bit may fall either way


@pytest.mark.parametrize("vocabulary", [40, 49152, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nucleus_that_one_token_fills_is_the_likeliest_token(dtype: torch.dtype, vocabulary: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    spread_B1 = torch.tensor([1e-3, 1.0, 4.0, 30.0], device="cuda").repeat(16)[:, None]
    logits = (spread_B1 * torch.randn(64, vocabulary, device="cuda", generator=generator)).to(dtype)
    uniform = torch.rand(64, dtype=torch.float64, device="cuda", generator=generator)
    token = draw(logits, uniform, SamplingConfig(top_p=1e-6))
    # In bfloat16 several may be likeliest. All of them are then in the nucleus.
    assert torch.equal(logits.gather(1, token[:, None]).squeeze(1), logits.max(1).values)


def test_sampling_from_such_a_nucleus_is_greedy(fast32: Policy) -> None:
    uniform = torch.rand(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    narrow, greedy = (
        sample(fast32, prompts(fast32, 64), config, uniform_BT=uniform)
        for config in (SamplingConfig(top_p=1e-6), SamplingConfig(temperature=0.0))
    )
    assert torch.equal(narrow.tokens_BT, greedy.tokens_BT) and torch.equal(narrow.lengths_B, greedy.lengths_B)


def test_packed_scores_from_graphs_equal_padded_scores(fast32: Policy, plain32: Policy, rollout: Rollout) -> None:
    with torch.no_grad():
        for reference in (False, True):
            fast = score(fast32, rollout, 1.0, packed=True, reference=reference)
            plain = score(plain32, rollout, 1.0, packed=False, reference=reference)
            for name, a, b in zip(fast._fields, fast, plain, strict=True):
                assert (a - b).abs().max() < 5e-4, f"{name}: {(a - b).abs().max()}"


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_gradients_agree(tuning: str, rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    experience, weights = None, []
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(updating, "in_one_pass", lambda *_: False)
            monkeypatch.setattr(Update, "unread", False)
        policy = make("float32", tuning=tuning, fast=fast)
        optimizer = MasterAdam(policy.trained(), betas=(0.0, 0.0), eps=1e9)  # a step proportional to the gradient
        optimizer.set_learning_rates(1e9, 1e9)
        config = PPOConfig(
            target_kl=1e9, max_grad_norm=1e9, ppo_epochs=1, batch_size=64, mini_batch_size=64, micro_batch_size=16
        )
        if experience is None:
            with torch.no_grad():
                old = torch.zeros(rollout.mask_BT.shape)
                old[rollout.mask_BT] = score(policy, rollout, 1.0, packed=False).logprobs.cpu()
            advantages = torch.where(
                rollout.mask_BT, torch.randn(old.shape, generator=torch.Generator().manual_seed(3)), 0
            )
            experience = Experience(rollout, old, torch.zeros_like(old), advantages, advantages)
        before = {n: w.clone() for n, w in optimizer.state()[0].items()}
        rows = mini_batches(config, torch.Generator().manual_seed(4))
        limit = RowLimit(config.micro_batch_size)
        stats = Update(policy, optimizer, experience, rows, config, 1.0, fast, limit).finish()
        assert stats.nonfinite is None and stats.updates == 1
        weights.append({n: w - before[n] for n, w in optimizer.state()[0].items()})
    for name, a in weights[0].items():
        b = weights[1][name]
        assert (a - b).norm() <= 0.01 * b.norm() + 1e-7, f"{name}: {(a - b).norm() / b.norm():.4f}"


@pytest.mark.parametrize(("target", "most"), [(1e9, 8), (1e-6, 7)])
def test_the_same_steps_are_taken_before_the_host_has_read_and_after(
    target: float, most: int, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, old = [], torch.zeros(rollout.mask_BT.shape)
    advantages = torch.where(rollout.mask_BT, torch.randn(old.shape, generator=torch.Generator().manual_seed(3)), 0)
    for unread in (True, False):
        monkeypatch.setattr(Update, "unread", unread)
        policy = make("float32", tuning="full")
        optimizer = MasterAdam(policy.trained(), betas=(0.9, 0.999), eps=1e-5)
        optimizer.set_learning_rates(1e-5, 1e-3)
        before = optimizer.state(copied=True)[0]
        with torch.no_grad():
            old[rollout.mask_BT] = score(policy, rollout, 1.0, packed=True).logprobs.cpu()
        experience = Experience(rollout, old, torch.zeros_like(old), advantages, advantages)
        config = PPOConfig(target_kl=target, ppo_epochs=2)
        rows = mini_batches(config, torch.Generator().manual_seed(4))
        update = Update(policy, optimizer, experience, rows, config, 1.0, True, RowLimit(16))
        update.begin()
        stats = update.finish()
        assert not any(p.grad.any() for p in policy.trained().values() if p.grad is not None)
        weights, moments = optimizer.state(copied=True)
        moved = torch.cat([(weights[name] - before[name]).flatten() for name in sorted(weights)])
        found.append((stats, moved, moments["policy.step"]))
    (ahead, own, counted), (after, expected, steps) = found
    assert ahead.updates == after.updates == int(counted) == int(steps) and 1 <= after.updates <= most
    assert ahead.early_stop is after.early_stop is (after.updates < 8)
    assert (own - expected).norm() < 0.03 * expected.norm()


def test_what_is_sent_together_arrives_as_it_was() -> None:
    given = [torch.arange(n) for n in (0, 5, 33)] + [torch.rand(4, 7), torch.rand(3) > 0.5, torch.rand(2, 2, 2)]
    for found, expected in zip(sent(given, torch.device("cuda")), given, strict=True):
        assert found.is_cuda and torch.equal(found.cpu(), expected)
        assert found.data_ptr() % 16 == 0
    assert on_its_way(sent(given, torch.device("cuda"))[1])() == [0, 1, 2, 3, 4]


def test_sampled_log_probabilities_match_the_scorer_on_average_in_bfloat16() -> None:
    """The sampler draws token t with the probability the scorer gives it: E[1/p · 1[token]] aside, the mean of
    log p_plain − log p_fast over tokens that the fast sampler drew is 0 within four standard errors."""
    fast, plain = make("bfloat16"), make("bfloat16", fast=False)
    batches = [
        sample(fast, prompts(fast, 200), SamplingConfig(), torch.Generator().manual_seed(s)).cpu() for s in (5, 6)
    ]
    with torch.no_grad():
        difference = torch.cat(
            [score(fast, b, 1.0, packed=True).logprobs - score(plain, b, 1.0, packed=False).logprobs for b in batches]
        )
    assert len(difference) >= 10_000
    error = difference.std() / len(difference) ** 0.5
    assert difference.mean().abs() < 4 * error + 2e-3, f"{difference.mean():.5f} ± {error:.5f}"
    assert difference.abs().max() < 3, f"{difference.abs().max():.3f}"


def test_kl_to_the_reference_is_not_negative_for_what_the_fast_sampler_draws() -> None:
    policy = make("bfloat16")
    drawn = sample(policy, prompts(policy, 400), SamplingConfig(), torch.Generator().manual_seed(7)).cpu()
    with torch.no_grad():
        own = score(policy, drawn, 1.0, packed=True).logprobs
        reference = score(policy, drawn, 1.0, packed=True, reference=True).logprobs
    k1 = torch.zeros(drawn.mask_BT.shape)
    k1[drawn.mask_BT] = maths.kl_k1(own, reference).cpu()
    per_sentence = k1.sum(1)
    error = per_sentence.std() / len(per_sentence) ** 0.5
    assert per_sentence.mean() > -3 * error, f"{per_sentence.mean():.4f} ± {error:.4f}"


def test_a_step_that_does_not_fit_is_repeated_in_smaller_parts(fast32: Policy, rollout: Rollout) -> None:
    limit, tried = RowLimit(16, lambda line: None), []

    def attempt(rows: int) -> int:
        tried.append(rows)
        if rows > 4:
            torch.empty(1 << 60, dtype=torch.uint8, device="cuda")
        return rows

    assert limit.run(fast32, attempt) == 4 and tried == [16, 8, 4]


@pytest.mark.parametrize("rows", [1, 64, 128])
def test_a_product_in_parts_is_as_near_to_the_exact_one_as_a_whole_one(rows: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, 1536, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(512, 1536, device="cuda", generator=generator).bfloat16()
    exact = x.double() @ weight.double().T
    apart = [(found.double() - exact).norm() / exact.norm() for found in (product(x, weight), x @ weight.T)]
    assert apart[0] <= 1.1 * apart[1] + 1e-4 and apart[1] < 5e-3
