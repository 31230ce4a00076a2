"""Options of the recipe: value warm-up, decay of the learning rate, averaged weights, the bonus for strict success."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from equipoise.errors import UserError
from equipoise.learning.optimizer import MasterAdam
from equipoise.ppo.config import PPOConfig
from equipoise.ppo.train import train
from equipoise.protocol.reward import strict_success

from .small import rows, small_config, tensors


def test_the_learning_rate_waits_for_the_value_head_then_warms_up_and_falls_to_nothing() -> None:
    config = PPOConfig(learning_rate=0.1, warmup_steps=2, value_warmup_steps=2, decay_steps=10)
    rates = [config.policy_learning_rate(done) for done in range(11)]
    assert rates == pytest.approx([0, 0, 0.05 * 0.8, 0.1 * 0.7, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01, 0])
    assert PPOConfig(learning_rate=0.1, warmup_steps=0).policy_learning_rate(10**6) == 0.1


def test_while_the_value_head_warms_up_nothing_else_moves(model: Path, tmp_path: Path) -> None:
    train(small_config(model, tmp_path, steps=3, value_warmup_steps=2, save_every=1, warmup_steps=0))
    one, two, three = (tensors(tmp_path, step) for step in (1, 2, 3))
    policy = [n for n in one if n.startswith("weights/") and "value_head" not in n]
    assert policy and all(torch.equal(one[n], two[n]) for n in policy)
    assert any(not torch.equal(two[n], three[n]) for n in policy)
    assert float(one["weights/value_head.bias"].abs()) > 0
    assert not torch.equal(one["weights/value_head.bias"], two["weights/value_head.bias"])
    table = rows(tmp_path)
    assert [row["ppo/update_kl"] for row in table[:2]] == [0, 0] and table[1]["kl/ref_k3"] == 0
    assert table[0]["ppo/updates"] == 4


def test_a_decay_that_ends_before_the_run_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="decay-steps 5 is below steps 6"):
        small_config(model, tmp_path, decay_steps=5)
    with pytest.raises(UserError, match=r"average-weights 1\.0 must be below 1"):
        PPOConfig(average_weights=1.0)


def test_the_average_by_hand_and_its_use_and_return() -> None:
    """Decay 0.5 is capped by (1 + n) / (10 + n): 2/11 after the first step, 3/12 after the second."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    adam = MasterAdam({"w": weight}, betas=(0.9, 0.999), eps=1e-8, average=0.5)
    expected = torch.tensor([1.0, 2.0])
    for n in (1, 2):
        adam.groups["policy"].master.data.add_(1.0)
        adam.copy_masters_to_model()
        adam.update_average(n)
        decay = (1 + n) / (10 + n)
        expected = decay * expected + (1 - decay) * torch.tensor([1.0 + n, 2.0 + n])
    with adam.averaged():
        assert weight.tolist() == pytest.approx(expected.tolist())
    assert weight.tolist() == [3.0, 4.0]
    adam.update_average(1000)
    assert adam.average is not None
    assert adam.average.tolist() == pytest.approx((0.5 * expected + 0.5 * torch.tensor([3.0, 4.0])).tolist())
    weights, moments = adam.state()
    other = MasterAdam({"w": nn.Parameter(torch.zeros(2))}, betas=(0.9, 0.999), eps=1e-8, average=0.5)
    other.load_state(weights, moments)
    assert other.average is not None and torch.equal(other.average, adam.average)


def test_without_an_average_nothing_is_swapped_or_saved() -> None:
    adam = MasterAdam({"w": nn.Parameter(torch.ones(2))}, betas=(0.9, 0.999), eps=1e-8)
    adam.update_average(1)
    with adam.averaged():
        assert adam.groups["policy"].master.tolist() == [1, 1]
    assert adam.state()[1] == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_exported_is_the_average_and_training_goes_on_from_the_weights(
    model: Path, tmp_path: Path, dtype: str
) -> None:
    changes = {"tuning": "full", "dtype": dtype, "learning_rate": 0.01, "target_kl": 1.0, "kl_coef": 0.0}
    averaged, plain = tmp_path / "averaged", tmp_path / "plain"
    train(small_config(model, averaged, average_weights=0.9, **changes))
    train(small_config(model, plain, **changes))
    assert rows(averaged) == rows(plain)  # averaging touches nothing
    exported, last = (load_file(where / "out/model.safetensors") for where in (averaged, plain))
    saved = tensors(averaged, 6)
    assert any(not torch.equal(exported[n], last[n]) for n in last)
    for name, value in exported.items():
        average = saved[f"optimizer/{name}.average"]
        assert torch.equal(value, average.to(torch.bfloat16).float() if dtype == "bfloat16" else average), name


def test_the_strict_bonus_is_paid_for_strict_success_and_reported(model: Path, tmp_path: Path) -> None:
    train(small_config(model, tmp_path, strict_bonus=0.5, sample_every=1, max_new_tokens=12))
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    for row in rows(tmp_path):
        share = sum(strict_success(s["text"]) for s in samples if s["step"] == row["step"]) / 8
        assert row["reward/strict_bonus"] == pytest.approx(0.5 * share)
        assert row["reward/training"] == pytest.approx(row["reward/mean"] + 0.5 * share, abs=1e-6)
    assert any(row["reward/strict_bonus"] for row in rows(tmp_path))
