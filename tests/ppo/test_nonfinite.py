"""Where a non-finite value comes from: planted faults are found by name, and nothing is left changed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.learning.optimizer import MasterAdam
from equipoise.policy.config import SamplingConfig
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import sample
from equipoise.ppo import maths
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.nonfinite import locate
from equipoise.ppo.train import train
from tests.tiny import bare_policy

from .small import small_config

CONFIG = TrainConfig()


def test_masking_a_loss_by_multiplication_hides_a_gradient_that_is_not_finite_and_ours_has_none() -> None:
    """A padding token, scored by a pass that did not mask it: its log-ratio is beyond the range of exp."""
    old, mask, advantages = torch.tensor([-100.0, -1.0]), torch.tensor([0.0, 1.0]), torch.ones(2)
    naive = torch.tensor([0.0, -1.0], requires_grad=True)
    ratio = (naive - old).exp()
    loss = (-torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * mask).sum()
    loss.backward()
    assert loss.isfinite() and naive.grad is not None and naive.grad[0].isnan()

    ours = torch.tensor([0.0, -1.0], requires_grad=True)
    (maths.policy_loss(ours, old, advantages, 0.2).loss * mask).sum().backward()
    assert ours.grad is not None and ours.grad.tolist() == [0.0, -1.0]


def test_a_padding_mask_that_is_added_twice_leaves_a_row_without_any_finite_score() -> None:
    scores, lowest = torch.full((1, 4), -3.0, dtype=torch.bfloat16), torch.finfo(torch.bfloat16).min
    assert (scores + lowest).softmax(-1).isfinite().all()
    assert (scores + lowest + lowest).softmax(-1).isnan().all()


def test_the_entropy_of_logits_that_a_nucleus_has_set_to_minus_infinity_is_not_a_number() -> None:
    logprobs = torch.tensor([1.0, 2.0, -torch.inf]).log_softmax(-1)
    assert (-(logprobs.exp() * logprobs).sum()).isnan()


def batch(policy: Policy) -> tuple[Rollout, dict[str, torch.Tensor]]:
    rollout = sample(policy, [[1, 2], [3, 4, 2]] * 10, SamplingConfig(1.0, 1.0, 4), torch.Generator().manual_seed(0))
    shape = rollout.tokens_BT.shape
    return rollout, {"advantages": torch.ones(shape), "logprobs": torch.full(shape, -1.0)}


@pytest.mark.parametrize("lora", [False, True])
def test_a_module_whose_output_overflows_is_named_first_of_all_that_follow(lora: bool) -> None:
    policy = bare_policy(lora=lora)
    rollout, evidence = batch(policy)
    name, module = next((n, m) for n, m in policy.model.named_modules() if n.endswith("layers.1.mlp.down_proj"))
    with torch.no_grad():
        next(module.parameters()).fill_(3e38)
    found = locate(policy, rollout, evidence, CONFIG)
    assert f"output of {name}" in found["where"] and "rows 0–15" in found["where"]
    assert list(found["dtypes"]) == ["float32"]


def test_an_overflow_of_half_precision_that_float32_does_not_have_is_told_apart() -> None:
    policy = bare_policy(dtype=torch.float16)
    rollout, evidence = batch(policy)
    with torch.no_grad():
        policy.model.model.layers[0].mlp.up_proj.weight.fill_(6e4)  # beyond float16 once multiplied
        policy.model.model.layers[0].mlp.gate_proj.weight.fill_(6e4)
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    places = {n: p.data_ptr() for n, p in policy.model.named_parameters()}
    found = locate(policy, rollout, evidence, CONFIG)
    assert "layers.0.mlp" in found["where"] and "finite in float32" in found["where"]
    assert found["dtypes"]["float32"] is None
    after = dict(policy.model.named_parameters())
    assert policy.dtype == torch.float16
    assert all(torch.equal(before[n], p) and p.data_ptr() == places[n] for n, p in after.items())


def test_a_broken_parameter_is_named_without_running_anything() -> None:
    policy = bare_policy()
    with torch.no_grad():
        policy.model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    found = locate(policy, None, {}, CONFIG)
    assert "model.layers.1.self_attn.q_proj.weight is not finite itself" in found["where"]


def test_a_gradient_that_is_not_finite_behind_a_finite_forward_pass_is_named() -> None:
    policy = bare_policy()
    rollout, evidence = batch(policy)
    adam = MasterAdam(policy.trained(), betas=(0.9, 0.999), eps=1e-5)
    adam.groups["policy"].grads.fill_(2.0)
    layer = policy.model.model.layers[0].mlp.down_proj
    layer.weight.register_hook(lambda grad: grad * float("inf"))
    found = locate(policy, rollout, evidence, CONFIG)
    assert "the gradient of model.layers.0.mlp.down_proj.weight" in found["where"]
    assert layer.weight.grad is not None and layer.weight.grad.data_ptr() >= adam.groups["policy"].grads.data_ptr()
    assert bool((adam.groups["policy"].grads == 2).all())  # what had been accumulated is as it was


def test_what_a_plain_pass_does_not_show_is_said_to_be_so() -> None:
    policy = bare_policy()
    rollout, evidence = batch(policy)
    assert "not reproduced" in locate(policy, rollout, evidence, CONFIG)["where"]
    assert "the reward function" in locate(policy, rollout, {"rewards": torch.ones(1)}, CONFIG)["where"]


def test_a_run_writes_it_into_event_and_dump(model: Path, tmp_path: Path) -> None:
    calls: list[Any] = []

    def reward(texts: Any, _: Any) -> list[float]:
        calls.append(texts)
        return [float("nan") if len(calls) == 2 else 1.0] * len(texts)

    train(small_config(model, tmp_path, steps=3), reward)
    (event,) = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert event["kind"] == "nonfinite" and event["where"] == "the reward function"
    assert json.loads((tmp_path / "checkpoints/nonfinite/step-2.json").read_text())["origin"]["where"] == event["where"]
