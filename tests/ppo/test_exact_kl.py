"""The exact KL in loss and reward, against the gradient of the objective itself, all sequences enumerated."""

import itertools
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from equipoise.errors import UserError
from equipoise.learning.optimizer import MasterAdam
from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.load import Policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.rollout import rollout_of
from equipoise.policy.score import exact_kl, score
from equipoise.ppo import maths
from equipoise.ppo.config import PPOConfig
from equipoise.ppo.experience import Experience, Scored
from equipoise.ppo.train import train
from equipoise.ppo.update import Update
from tests.ppo.small import rows, small_config
from tests.tiny import bare_policy, next_logprobs, perturb, pretend_graphs

BETA = 0.3
LONGEST = 3
PROMPT = [1, 2]
TEXTS = [
    [*start, *end]
    for n in range(1, LONGEST + 1)
    for start in itertools.product((1, 2), repeat=n - 1)
    for end in ([0], [1], [2])
    if end == [0] or n == LONGEST
]
"""Every completion of three tokens, 0 ending it."""
REWARDS = torch.linspace(-1.0, 1.0, len(TEXTS)).sin()


def policy_of(lora: bool) -> Policy:
    return perturb(bare_policy(3, attention=TRIE_ATTENTION, lora=lora), 0.1)


def enumerated(policy: Policy, reference: bool = False) -> Tensor:
    """(texts,) log-probability of each, every token from a forward pass of its own."""
    with policy.as_reference(reference) as model:
        return torch.stack(
            [
                sum(
                    torch.log_softmax(model(torch.tensor([[*PROMPT, *text[:t]]]), use_cache=False).logits[0, -1], -1)[k]
                    for t, k in enumerate(text)
                )
                for text in TEXTS
            ]
        )


def true_gradient(policy: Policy) -> dict[str, Tensor]:
    """Of −Σ_x π(x)·(R(x) − β·(log π(x) − log π_ref(x)))."""
    with torch.no_grad():
        reference = enumerated(policy, True)
    logp = enumerated(policy)
    assert float(logp.detach().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    (-(logp.exp() * (REWARDS - BETA * (logp - reference))).sum()).backward()
    return {name: p.grad.clone() for name, p in policy.trained().items() if p.grad is not None}


def row_gradients(
    policy: Policy, kl_in: Literal["reward", "both", "loss"], packed: bool
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """(probability of each text, the gradient that each alone would give, its tokens' sum)."""
    rollout = rollout_of([PROMPT] * len(TEXTS), TEXTS)
    mask = rollout.mask_BT
    with torch.no_grad():
        scores = score(policy, rollout, 1.0, packed=packed, kl=True)
        reference = score(policy, rollout, 1.0, packed=packed, reference=True).logprobs
    columns = [torch.zeros(mask.shape).masked_scatter(mask, x) for x in (*scores, reference)]
    scored = Scored(*columns)
    paid_BT = maths.token_rewards(REWARDS, scored.charged_BT(rollout, kl_in), mask, BETA)
    advantages = maths.gae(paid_BT, torch.zeros(mask.shape), mask, 1.0, 1.0)
    price = None if kl_in == "reward" else BETA
    experience = Experience(
        rollout, scored.logprobs, scored.values, scored.values, advantages.advantages, exact_price=price
    )
    config = PPOConfig(batch_size=1, mini_batch_size=1, target_kl=1e9, max_grad_norm=1e9, kl_in=kl_in)
    found = []
    for row in range(len(TEXTS)):
        optimizer = MasterAdam(policy.trained(), betas=(0.9, 0.999), eps=1e-5)
        optimizer.set_learning_rates(0.0, 0.0)
        update = Update(policy, optimizer, experience, [torch.tensor([row])], config, 1.0, packed, RowLimit(1))
        assert update.finish().updates == 1
        moments = optimizer.state()[1]
        gradient = {n.removesuffix(".exp_avg"): 10 * x for n, x in moments.items() if n.endswith(".exp_avg")}
        found.append({name: len(TEXTS[row]) * x.clone() for name, x in gradient.items()})
    return scored.logprobs.sum(1).exp(), found


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_with_the_exact_kl_the_gradients_mean_is_the_objectives(
    lora: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = true_gradient(policy_of(lora))
    ways: tuple[Literal["reward", "both"], ...] = ("reward", "both")
    for kl_in in ways:
        policy = policy_of(lora) if lora else pretend_graphs(policy_of(lora), monkeypatch)
        share, gradients = row_gradients(policy, kl_in, packed)
        for name, tensor in expected.items():
            mean = sum(p * g[name] for p, g in zip(share, gradients, strict=True))
            torch.testing.assert_close(mean, tensor, rtol=1e-3, atol=2e-5)
    assert len(expected) > 10


def test_charging_the_sampled_token_and_the_later_places_is_the_same_kl_on_average() -> None:
    policy = policy_of(False)
    rollout = rollout_of([PROMPT] * len(TEXTS), TEXTS)
    with torch.no_grad():
        scores = score(policy, rollout, 1.0, packed=True, kl=True)
        truth = enumerated(policy) - enumerated(policy, True)
        share = enumerated(policy).exp()
    exact = torch.stack([part.sum() for part in scores.kl.split(rollout.lengths_B.tolist())])
    assert float((share * exact).sum()) == pytest.approx(float((share * truth).sum()), abs=1e-5)
    spread = [float((share * (x - (share * x).sum()) ** 2).sum()) for x in (exact, truth)]
    assert spread[0] < spread[1]  # Rao and Blackwell


def test_the_exact_kl_by_hand_with_a_temperature_and_a_masked_token() -> None:
    own, base = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[2.0, 0.0, -torch.inf]])
    p, q = torch.softmax(own[:, :2] / 2.0, -1), torch.softmax(base[:, :2] / 2.0, -1)
    own.requires_grad_()
    found = exact_kl(own, base, 2.0)
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1))
    found.sum().backward()
    assert own.grad is not None and bool(own.grad[:, :2].isfinite().all())


def test_without_being_asked_there_is_no_kl() -> None:
    policy = policy_of(False)
    rollout = rollout_of([PROMPT], [[1, 0]])
    assert score(policy, rollout, 1.0, packed=True).kl.tolist() == [0.0, 0.0]
    assert policy.reference is not None
    own, base = ([next_logprobs(m, ids) for ids in (PROMPT, [*PROMPT, 1])] for m in (policy.model, policy.reference))
    by_hand = [
        sum(torch.tensor(p).exp().mul(torch.tensor(p) - torch.tensor(q)).tolist())
        for p, q in zip(own, base, strict=True)
    ]
    assert score(policy, rollout, 1.0, packed=True, kl=True).kl.tolist() == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize(("kl_in", "tuning"), [("both", "lora"), ("loss", "full"), ("reward", "lora")])
def test_a_run_logs_the_exact_kl_where_it_is_charged_for(model: Path, tmp_path: Path, kl_in: str, tuning: str) -> None:
    config = small_config(model, tmp_path, kl_in=kl_in, tuning=tuning, kl_coef=0.1, steps=3)
    assert train(config).status == "done"
    logged = [row.get("kl/exact") for row in rows(tmp_path)]
    if kl_in == "reward":
        assert logged == [None] * 3
    else:  # at the first step the policy is the reference
        assert logged[0] == pytest.approx(0.0, abs=1e-5) and all(x is not None and x > 1e-4 for x in logged[1:])


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_where_a_sentence_is_credited_as_a_whole_the_exact_kl_is_refused(algorithm: str) -> None:
    with pytest.raises(UserError, match=r"kl-in both charges for the KL from token to token, which \w+ does not"):
        PPOConfig(algorithm=algorithm, kl_in="both")  # type: ignore[arg-type]
    PPOConfig(algorithm="reinforce++", kl_in="both")


def test_what_is_charged_by_hand() -> None:
    rollout = rollout_of([PROMPT, PROMPT], [[1, 2, 0], [0]])
    zeros = torch.zeros(2, 3)
    exact = torch.tensor([[5.0, 6.0, 7.0], [8.0, 9.0, 9.0]])
    scored = Scored(torch.full((2, 3), -1.0), zeros, zeros, exact, torch.full((2, 3), -3.0))
    assert scored.charged_BT(rollout, "reward").tolist() == [[2.0, 2.0, 2.0], [2.0, 0.0, 0.0]]
    assert scored.charged_BT(rollout, "both").tolist() == [[6.0, 7.0, 0.0], [0.0, 0.0, 0.0]]
    assert scored.charged_BT(rollout, "loss").tolist() == zeros.tolist()
