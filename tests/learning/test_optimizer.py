"""Adam on float32 masters, against torch's own Adam in float32 and numbers worked by hand."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from equipoise.learning.optimizer import MasterAdam

SHAPES = {"a": (3, 4), "b": (5,), "value_head.weight": (1, 4)}


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    out = {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}
    out["value_head.weight"] = nn.Parameter(out["value_head.weight"].detach().float())
    return out


class Trained(NamedTuple):
    optimizer: MasterAdam
    parameters: dict[str, nn.Parameter]

    def backward(self, grads: Mapping[str, Tensor]) -> None:
        """As a loss with these gradients would."""
        for name, parameter in self.parameters.items():
            (parameter * grads[name].to(parameter)).sum().backward()
        self.optimizer.accumulate()

    def step(self, grads: Mapping[str, Tensor], max_norm: float = 1.0) -> float:
        self.backward(grads)
        return self.optimizer.step(max_norm)

    def everything(self) -> dict[str, Tensor]:
        weights, moments = self.optimizer.state()
        used = {f"used.{name}": p.detach() for name, p in self.parameters.items()}
        return {name: x.clone() for name, x in (weights | moments | used).items()}


def make(dtype: torch.dtype, lr: float = 0.01, device: str = "cpu") -> Trained:
    on_device = {name: nn.Parameter(p.detach().to(device)) for name, p in parameters(dtype).items()}
    optimizer = MasterAdam(on_device, betas=(0.9, 0.999), eps=1e-5)
    optimizer.set_learning_rates(lr, lr)
    return Trained(optimizer, on_device)


def gradients(step: int, scale: float = 0.01) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_masters_follow_float32_adam_and_the_parameters_are_their_roundings(dtype: torch.dtype) -> None:
    ours = make(dtype)
    peer = {name: nn.Parameter(p.detach().float()) for name, p in parameters(dtype).items()}
    adam = torch.optim.Adam(peer.values(), lr=0.01, betas=(0.9, 0.999), eps=1e-5, foreach=False)
    for step in range(6):
        assert ours.step(gradients(step), max_norm=1e9) < 1
        for name, p in peer.items():
            p.grad = gradients(step)[name].to(ours.parameters[name].dtype).float()
        adam.step()
    weights, _ = ours.optimizer.state()
    for name, p in peer.items():
        torch.testing.assert_close(weights[name], p.detach(), atol=1e-6, rtol=1e-6)
        parameter = ours.parameters[name]
        assert torch.equal(parameter, weights[name].to(parameter.dtype))
        assert not torch.equal(parameter, parameters(dtype)[name])


def test_steps_too_small_for_bfloat16_are_not_lost() -> None:
    """Around 1 a bfloat16 can only move by 0.0078; a thousand steps of 1e-5 make 0.01."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    assert torch.equal(weight.detach() - 1e-5, weight.detach())
    optimizer = MasterAdam({"w": weight}, betas=(0.9, 0.999), eps=1e-8)
    optimizer.set_learning_rates(1e-5, 0.0)
    for _ in range(1000):
        weight.sum().backward()
        optimizer.accumulate()
        optimizer.step(max_norm=100.0)
    assert optimizer.state()[0]["w"].tolist() == pytest.approx([0.99] * 4, abs=1e-4)
    assert weight.tolist() == [0.98828125] * 4  # the bfloat16 nearest to 0.99


def test_micro_batches_add_up_in_float32() -> None:
    """In bfloat16 1 + 2⁻⁹ is 1."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdam({"w": weight}, betas=(0.9, 0.999), eps=1e-8)
    for grad in (1.0, *[2.0**-9] * 512):
        (weight * grad).sum().backward()
        optimizer.accumulate()
    assert optimizer.step(max_norm=1e9) == 2.0


def test_the_first_step_is_the_learning_rate_against_the_gradient_policy_and_value_head_each_its_own() -> None:
    ours = make(torch.float32)
    before = ours.everything()
    ours.optimizer.set_learning_rates(policy=1e-3, value=0.1)
    ours.step({name: torch.full(shape, 7.0) for name, shape in SHAPES.items()}, max_norm=1e9)
    after = ours.everything()
    for name, rate in (("a", 1e-3), ("b", 1e-3), ("value_head.weight", 0.1)):
        torch.testing.assert_close(before[name] - after[name], torch.full(SHAPES[name], rate), atol=1e-5, rtol=0)


def test_policy_and_value_head_are_clipped_each_by_its_own_norm() -> None:
    """After one step Adam's first moment is a tenth of the clipped gradient."""
    ours = make(torch.float32)
    grads = {"a": torch.zeros(3, 4), "b": torch.tensor([0.3, 0.4, 0, 0, 0]), "value_head.weight": torch.zeros(1, 4)}
    grads["value_head.weight"][0, 0] = 1000.0
    assert ours.step(grads, max_norm=1.0) == pytest.approx(0.5)  # the policy's norm alone, before clipping
    moments = ours.optimizer.state()[1]
    assert moments["b.exp_avg"].tolist() == pytest.approx([0.03, 0.04, 0, 0, 0], rel=1e-5)
    assert moments["value_head.weight.exp_avg"].tolist()[0] == pytest.approx([0.1, 0, 0, 0], rel=1e-3)

    ours = make(torch.float32)
    steep = grads | {"a": torch.full((3, 4), math.sqrt(12.0))}  # norms 12 and 0.5
    assert ours.step(steep, max_norm=1.0) == pytest.approx(math.hypot(12, 0.5))
    moments = ours.optimizer.state()[1]
    norm = math.sqrt(sum(float((moments[f"{n}.exp_avg"] ** 2).sum()) for n in ("a", "b")))
    assert norm == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["a", "value_head.weight"])
def test_a_gradient_that_is_not_finite_changes_nothing_at_all(dtype: torch.dtype, bad: float, where: str) -> None:
    ours, clean = make(dtype), make(dtype)
    for each in (ours, clean):
        each.step(gradients(0))
    before = ours.everything()
    poisoned = gradients(1)
    poisoned[where].view(-1)[1] = bad
    assert math.isnan(ours.step(poisoned))
    assert_same(ours.everything(), before)
    for each in (ours, clean):  # nothing of it is left for the next step either
        each.step(gradients(2))
    assert_same(ours.everything(), clean.everything())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("allowed", "bad"), [(True, math.nan), (True, math.inf), (False, 1.0)])
def test_a_step_that_the_device_does_not_take_leaves_nothing_for_the_next(
    dtype: torch.dtype, allowed: bool, bad: float
) -> None:
    ours, clean = make(dtype), make(dtype)
    for each in (ours, clean):
        each.step(gradients(0))
    poisoned = gradients(1)
    poisoned["a"].view(-1)[1] = bad
    ours.backward(poisoned)
    ours.optimizer.step_where(torch.tensor(allowed), ours.optimizer.norms(), 1.0)
    ours.optimizer.take_back()
    assert_same(ours.everything(), clean.everything())
    for each in (ours, clean):
        each.step(gradients(2))
    assert_same(ours.everything(), clean.everything())


def test_gradients_that_were_dropped_do_not_reach_the_next_step() -> None:
    ours, clean = make(torch.bfloat16), make(torch.bfloat16)
    ours.backward(gradients(7, scale=3.0))
    ours.optimizer.zero_grad()
    for each in (ours, clean):
        each.step(gradients(0))
    assert_same(ours.everything(), clean.everything())


def check_resuming(dtype: torch.dtype, device: str) -> None:
    straight, restored = make(dtype, device=device), make(dtype, device=device)
    for step in range(3):
        straight.step(gradients(step))
    saved = [{name: x.cpu() for name, x in part.items()} for part in straight.optimizer.state()]
    assert {x.dtype for part in saved for x in part.values()} == {torch.float32}
    restored.step(gradients(9))  # it has moved before, as in a roll-back
    restored.optimizer.load_state(*saved)
    assert_same(restored.everything(), straight.everything())
    for step in range(3, 6):
        for each in (straight, restored):
            each.step(gradients(step))
    assert_same(restored.everything(), straight.everything())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_in_the_middle_it_goes_on_as_if_never_stopped(dtype: torch.dtype) -> None:
    check_resuming(dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_it_does_on_a_gpu_where_the_kernel_reads_the_step_count_on_the_device(dtype: torch.dtype) -> None:
    check_resuming(dtype, "cuda")
    torch.cuda.synchronize()


def test_restoring_copies_what_it_is_given() -> None:
    straight, restored = make(torch.float32), make(torch.float32)
    straight.step(gradients(0))
    restored.optimizer.load_state(*straight.optimizer.state())
    before = restored.everything()
    straight.step(gradients(1))
    assert_same(restored.everything(), before)


def test_an_unstarted_optimizer_restores_as_one() -> None:
    straight, restored = make(torch.bfloat16), make(torch.bfloat16)
    restored.step(gradients(3))
    restored.optimizer.load_state(*straight.optimizer.state())
    assert_same(restored.everything(), straight.everything())
    assert straight.optimizer.state()[1] == {}
    for each in (straight, restored):
        each.step(gradients(0))
    assert_same(restored.everything(), straight.everything())


def test_a_parameter_that_the_saved_state_lacks_is_an_error() -> None:
    optimizer = make(torch.float32).optimizer
    weights, moments = optimizer.state()
    del weights["b"]
    with pytest.raises(KeyError, match="b"):
        optimizer.load_state(weights, moments)
