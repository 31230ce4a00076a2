"""Adam on float32 masters, against torch's own Adam in float32 and numbers worked by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from equipoise.ppo.optimizer import MasterAdam

SHAPES = {"a": (3, 4), "b": (5,), "value_head.weight": (1, 4)}


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    out = {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}
    out["value_head.weight"] = nn.Parameter(out["value_head.weight"].detach().float())
    return out


def make(dtype: torch.dtype, lr: float = 0.01) -> MasterAdam:
    optimizer = MasterAdam(parameters(dtype), betas=(0.9, 0.999), eps=1e-5)
    optimizer.set_learning_rates(lr, lr)
    return optimizer


def gradients(step: int, scale: float = 0.01) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def backward(optimizer: MasterAdam, grads: dict[str, Tensor]) -> None:
    for name, parameter in optimizer.parameters.items():
        grad = grads[name].to(parameter.dtype)
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    optimizer.accumulate()


def everything(optimizer: MasterAdam) -> dict[str, Tensor]:
    weights, moments = optimizer.state()
    used = {f"used.{name}": p.detach() for name, p in optimizer.parameters.items()}
    return {name: x.clone() for name, x in (weights | moments | used).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_masters_follow_float32_adam_and_the_parameters_are_their_roundings(dtype: torch.dtype) -> None:
    ours = make(dtype)
    peer = {name: nn.Parameter(p.detach().float()) for name, p in parameters(dtype).items()}
    adam = torch.optim.Adam(peer.values(), lr=0.01, betas=(0.9, 0.999), eps=1e-5, foreach=False)
    for step in range(6):
        backward(ours, gradients(step))
        assert ours.step(max_norm=1e9) < 1
        for name, p in peer.items():
            p.grad = gradients(step)[name].to(ours.parameters[name].dtype).float()
        adam.step()
    weights, _ = ours.state()
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
        weight.grad = torch.ones_like(weight)
        optimizer.accumulate()
        optimizer.step(max_norm=100.0)
    assert optimizer.state()[0]["w"].tolist() == pytest.approx([0.99] * 4, abs=1e-5)
    assert weight.tolist() == [0.98828125] * 4  # the bfloat16 nearest to 0.99


def test_micro_batches_add_up_in_float32() -> None:
    """In bfloat16 1 + 2⁻⁹ is 1."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdam({"w": weight}, betas=(0.9, 0.999), eps=1e-8)
    for grad in (1.0, *[2.0**-9] * 512):
        weight.grad = torch.tensor([grad], dtype=torch.bfloat16)
        optimizer.accumulate()
    assert optimizer.step(max_norm=1e9) == 2.0


def test_the_first_step_is_the_learning_rate_in_the_gradients_direction_policy_and_value_head_each_its_own() -> None:
    optimizer = make(torch.float32)
    before = everything(optimizer)
    optimizer.set_learning_rates(policy=1e-3, value=0.1)
    backward(optimizer, {name: torch.full(shape, 7.0) for name, shape in SHAPES.items()})
    optimizer.step(max_norm=1e9)
    after = everything(optimizer)
    for name, rate in (("a", 1e-3), ("b", 1e-3), ("value_head.weight", 0.1)):
        torch.testing.assert_close(before[name] - after[name], torch.full(SHAPES[name], rate), atol=1e-5, rtol=0)


def test_policy_and_value_head_are_clipped_each_by_its_own_norm() -> None:
    """After one step Adam's first moment is a tenth of the clipped gradient."""
    optimizer = make(torch.float32)
    grads = {"a": torch.zeros(3, 4), "b": torch.tensor([0.3, 0.4, 0, 0, 0]), "value_head.weight": torch.zeros(1, 4)}
    grads["value_head.weight"][0, 0] = 1000.0
    backward(optimizer, grads)
    assert optimizer.step(max_norm=1.0) == pytest.approx(0.5)  # the policy's norm alone, before clipping
    moments = optimizer.state()[1]
    assert moments["b.exp_avg"].tolist() == pytest.approx([0.03, 0.04, 0, 0, 0], rel=1e-5)
    assert moments["value_head.weight.exp_avg"].tolist()[0] == pytest.approx([0.1, 0, 0, 0], rel=1e-3)

    optimizer = make(torch.float32)
    backward(optimizer, grads | {"a": torch.full((3, 4), math.sqrt(12.0))})  # norm 12 and 0.5
    assert optimizer.step(max_norm=1.0) == pytest.approx(math.hypot(12, 0.5))
    moments = optimizer.state()[1]
    norm = math.sqrt(sum(float((moments[f"{n}.exp_avg"] ** 2).sum()) for n in ("a", "b")))
    assert norm == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["a", "value_head.weight"])
def test_a_gradient_that_is_not_finite_changes_nothing_at_all(dtype: torch.dtype, bad: float, where: str) -> None:
    optimizer = make(dtype)
    backward(optimizer, gradients(0))
    optimizer.step(1.0)
    before = everything(optimizer)
    poisoned = gradients(1)
    poisoned[where].view(-1)[1] = bad
    backward(optimizer, poisoned)
    assert math.isnan(optimizer.step(1.0))
    assert_same(everything(optimizer), before)
    # Nothing of it is left for the next step either.
    clean = make(dtype)
    for step in (0, 2):
        for each in (optimizer, clean) if step else (clean,):
            backward(each, gradients(step))
            each.step(1.0)
    assert_same(everything(optimizer), everything(clean))


def test_gradients_that_were_dropped_do_not_reach_the_next_step() -> None:
    optimizer, clean = make(torch.bfloat16), make(torch.bfloat16)
    backward(optimizer, gradients(7, scale=3.0))
    optimizer.zero_grad()
    for each in (optimizer, clean):
        backward(each, gradients(0))
        each.step(1.0)
    assert_same(everything(optimizer), everything(clean))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_in_the_middle_it_goes_on_as_if_never_stopped(dtype: torch.dtype) -> None:
    straight, restored = make(dtype), make(dtype)
    for step in range(3):
        backward(straight, gradients(step))
        straight.step(1.0)
    weights, moments = straight.state()
    assert {x.dtype for x in (*weights.values(), *moments.values())} == {torch.float32}
    backward(restored, gradients(9))  # a moved optimizer, as in a roll-back
    restored.step(1.0)
    restored.load_state({n: x.clone() for n, x in weights.items()}, {n: x.clone() for n, x in moments.items()})
    assert_same(everything(restored), everything(straight))
    for step in range(3, 6):
        for each in (straight, restored):
            backward(each, gradients(step))
            each.step(1.0)
    assert_same(everything(restored), everything(straight))


def test_restoring_copies_what_it_is_given() -> None:
    straight, restored = make(torch.float32), make(torch.float32)
    backward(straight, gradients(0))
    straight.step(1.0)
    restored.load_state(*straight.state())
    before = everything(restored)
    backward(straight, gradients(1))
    straight.step(1.0)
    assert_same(everything(restored), before)


def test_an_unstarted_optimizer_restores_as_one() -> None:
    straight, restored = make(torch.bfloat16), make(torch.bfloat16)
    backward(restored, gradients(3))
    restored.step(1.0)
    restored.load_state(*straight.state())
    assert_same(everything(restored), everything(straight))
    assert straight.state()[1] == {}


def test_a_parameter_that_the_saved_state_lacks_is_an_error() -> None:
    optimizer = make(torch.float32)
    weights, moments = optimizer.state()
    del weights["b"]
    with pytest.raises(KeyError, match="b"):
        optimizer.load_state(weights, moments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_restored_optimizer_goes_on_as_if_never_stopped(dtype: torch.dtype) -> None:
    """The fused kernel reads Adam's step count on the device; a checkpoint brings it back on the CPU."""

    def on_gpu() -> MasterAdam:
        optimizer = MasterAdam(
            {n: nn.Parameter(p.detach().cuda()) for n, p in parameters(dtype).items()}, betas=(0.9, 0.999), eps=1e-5
        )
        optimizer.set_learning_rates(0.01, 0.01)
        return optimizer

    straight, restored = on_gpu(), on_gpu()
    for step in range(5):
        if step == 3:
            restored.load_state(*({n: x.cpu() for n, x in part.items()} for part in straight.state()))
        for each in (straight, restored):
            backward(each, {n: g.cuda() for n, g in gradients(step if each is straight or step > 2 else 50).items()})
            each.step(1.0)
    torch.cuda.synchronize()
    assert_same(everything(restored), everything(straight))
