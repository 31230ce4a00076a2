"""PPO's losses in one pass against their definitions, differentiated by PyTorch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from equipoise.policy.kernels.surrogate import Limits, surrogate
from equipoise.ppo import maths
from equipoise.ppo import update as updating
from tests.ppo import updates

LIMITS = Limits(clip=0.2, value_clip=0.3, entropy=0.01, log_ratio=maths.MAX_LOG_RATIO)


def numbers(count: int, names: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Log-probabilities that are near the old ones, far off, equal and beyond all limits; values likewise; spare tokens
    at the end."""
    generator = torch.Generator().manual_seed(count)
    noise = torch.randn(12, count, generator=generator)
    apart = noise[0] * torch.tensor([0.1, 1e-4, 3.0, 40.0, 0.0]).repeat(count)[:count]
    old, real = -noise[1].abs(), torch.arange(count) < 0.8 * count
    values = noise[3] + noise[4] * torch.tensor([0.1, 0.0, 3.0]).repeat(count)[:count]
    columns = {
        "old_logp": old, "advantages": noise[2] * (noise[5] > -1), "weight": torch.full((count,), 1 / count),
        "old_values": noise[3], "returns": noise[6], "share": noise[7].abs() / count, "reference": old + noise[8],
        "kl_weight": noise[9].abs() / count,
    }  # fmt: skip
    logprobs, values = torch.where(real, old + apart, 7.0), torch.where(real, values, -5.0)
    spare = {name: torch.where(real, x, 0.0) for name, x in columns.items() if name in ("old_logp", "weight", *names)}
    return logprobs, values, real, spare | {"advantages": torch.where(real, columns["advantages"], 0.0)}


def by_pytorch(logprobs: Tensor, values: Tensor, real: Tensor, columns: dict[str, Tensor]) -> list[Tensor]:
    logprobs, values = logprobs.double().requires_grad_(), values.double().requires_grad_()
    c = {name: x.double() for name, x in columns.items()}
    new, zero = torch.where(real, logprobs, 0.0), torch.zeros((), dtype=torch.float64)
    found = maths.policy_loss(new, c["old_logp"], c["advantages"], LIMITS.clip)
    share = c.get("share", c["weight"])
    parts = [(found.loss * share).sum(), zero, zero]
    if "returns" in c:
        own = torch.where(real, values, 0.0)
        parts[1] = (maths.value_loss(own, c["old_values"], c["returns"], LIMITS.value_clip) * c["weight"]).sum()
    if "reference" in c:
        parts[2] = (maths.kl_k3(new, c["reference"]) * c["kl_weight"]).sum()
    sum(parts[1:], parts[0]).backward()
    kl, clipped = maths.kl_k3(c["old_logp"], new.detach()), (found.clipped * share).sum()
    stats = [*(p.detach() for p in parts), (kl * c["weight"]).sum(), clipped, found.log_ratio.abs().max()]
    gradient = torch.zeros(len(logprobs)) if values.grad is None else values.grad
    assert logprobs.grad is not None
    return [x.float() for x in (logprobs.grad, gradient, -LIMITS.entropy * c["weight"], torch.stack(stats))]


@pytest.mark.parametrize("count", [5, 1500])
@pytest.mark.parametrize(
    "names", [(), ("old_values", "returns"), ("share",), ("old_values", "returns", "share", "reference", "kl_weight")]
)
def test_losses_and_gradients_are_those_of_the_definitions(names: tuple[str, ...], count: int) -> None:
    given = numbers(count, names)
    for found, expected in zip(surrogate(*given, LIMITS), by_pytorch(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(("at", "shows"), [("logprobs", 0), ("values", 1), ("advantages", 0), ("returns", 1)])
def test_what_is_not_finite_shows_in_the_sums(bad: float, at: str, shows: int) -> None:
    logprobs, values, real, columns = numbers(40, ("old_values", "returns"))
    {"logprobs": logprobs, "values": values, **columns}[at][3] = bad
    stats = surrogate(logprobs, values, real, columns, LIMITS).stats
    expected = by_pytorch(logprobs, values, real, columns)[3]
    assert bool(stats[shows].isfinite()) is bool(expected[shows].isfinite())
    assert torch.equal(stats.isfinite(), expected.isfinite())


@pytest.mark.parametrize("packed", [True, False])
def test_the_update_takes_the_same_step_with_them(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    experience, config = updates.experience_of(updates.policy_of()), updates.CONFIG
    rows, config = torch.arange(8), replace(config, entropy_coef=0.1)
    expected = updates.gradient_of(experience, rows, config, packed=packed)
    calls = []
    monkeypatch.setattr(updating, "in_one_pass", lambda *given: calls.append(given) or True)
    found = updates.gradient_of(experience, rows, config, packed=packed)
    assert calls
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
