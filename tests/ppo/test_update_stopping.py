"""When an update ends before its last step: at `target_kl`, at numbers that are not finite, where memory runs out."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from equipoise.errors import UserError
from equipoise.policy.load import Policy
from equipoise.policy.memory import RowLimit
from equipoise.ppo.experience import Experience
from equipoise.ppo.update import mini_batches
from tests.tiny import next_logprobs

from .updates import (
    ALL,
    CONFIG,
    PROMPTS,
    assert_close,
    experience_of,
    gradient_of,
    optimizer_of,
    policy_of,
    update,
    weights,
)


def k3_by_hand(policy: Policy, experience: Experience, rows: list[int]) -> float:
    """Mean over the rows' tokens of r − 1 − log r with r = π_θ/π_old: KL(π_old‖π_θ)."""
    terms = []
    for row in rows:
        completion = experience.rollout.completions()[row]
        for t, token in enumerate(completion):
            new = next_logprobs(policy.model, [*PROMPTS[row], *completion[:t]])[token]
            log_ratio = new - float(experience.old_logp_BT[row, t])
            terms.append(math.exp(log_ratio) - 1 - log_ratio)
    return sum(terms) / len(terms)


def test_target_kl_is_tested_before_the_optimizer_steps() -> None:
    """A policy that has moved already: just above its KL the step is taken, just below nothing changes."""
    policy = policy_of()
    experience = experience_of(policy, drift=0.05)
    rows = torch.tensor([1, 6, 2])
    kl = k3_by_hand(policy, experience, rows.tolist())
    assert kl > 0.005 and abs(kl - k3_by_hand(policy, experience, list(range(8)))) > 0.02 * kl
    before = weights(policy)
    optimizer = optimizer_of(policy)

    stopped = update(policy, optimizer, experience, [rows] * 3, replace(CONFIG, target_kl=kl * 0.999), 1.0, packed=True)
    assert (stopped.updates, stopped.early_stop, stopped.nonfinite) == (0, True, None)
    assert stopped.update_kl == pytest.approx(kl, rel=1e-4)
    assert all(torch.equal(before[n], p) for n, p in policy.trained().items())
    assert optimizer.state()[1] == {}  # Adam's moments have not seen the gradient either

    taken = update(policy, optimizer, experience, [rows], replace(CONFIG, target_kl=kl * 1.001), 1.0, packed=True)
    assert (taken.updates, taken.early_stop) == (1, False)
    assert taken.update_kl == pytest.approx(kl, rel=1e-4)


def test_micro_batches_are_tested_together() -> None:
    policy = policy_of()
    experience = experience_of(policy, drift=0.05)
    kl = k3_by_hand(policy, experience, list(range(8)))
    config = replace(CONFIG, micro_batch_size=3, target_kl=kl * 0.999)
    assert update(policy, optimizer_of(policy), experience, ALL, config, 1.0, packed=True).updates == 0
    config = replace(config, target_kl=kl * 1.001)
    assert update(policy, optimizer_of(policy), experience, ALL, config, 1.0, packed=True).updates == 1


def test_an_update_that_stops_early_leaves_the_weights_of_the_steps_it_took() -> None:
    batches = mini_batches(replace(CONFIG, ppo_epochs=4), torch.Generator().manual_seed(0))
    config = replace(CONFIG, target_kl=0.02)
    policy = policy_of()
    experience = experience_of(policy)
    stats = update(policy, optimizer_of(policy, 0.01), experience, batches, config, 1.0, packed=True)
    assert 0 < stats.updates < len(batches) and stats.early_stop and stats.update_kl > 0.02
    assert k3_by_hand(policy, experience, batches[stats.updates].tolist()) > 0.02

    shorter = policy_of()
    free = replace(config, target_kl=1e9)
    update(shorter, optimizer_of(shorter, 0.01), experience, batches[: stats.updates], free, 1.0, packed=True)
    assert all(torch.equal(p, weights(policy)[n]) for n, p in weights(shorter).items())


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("old_logp_BT", math.nan),
        ("old_values_BT", math.nan),
        ("returns_BT", math.nan),
        ("returns_BT", math.inf),
        ("advantages_BT", math.nan),
        ("advantages_BT", math.inf),
    ],
)
def test_one_number_that_is_not_finite_stops_the_update_before_that_step(field: str, bad: float) -> None:
    policy, other = policy_of(), policy_of()
    experience = experience_of(policy)
    batches = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7]), torch.tensor([0, 1, 2, 3])]
    poisoned = getattr(experience, field).clone()
    poisoned[5, 0] = bad
    stats = update(
        policy, optimizer_of(policy), experience._replace(**{field: poisoned}), batches, CONFIG, 1.0, packed=True
    )
    assert stats.updates == 1 and stats.nonfinite is not None and not stats.early_stop
    assert all(math.isfinite(x) for x in stats if isinstance(x, float))
    update(other, optimizer_of(other), experience, batches[:1], CONFIG, 1.0, packed=True)
    assert all(torch.equal(p, weights(other)[n]) for n, p in weights(policy).items())


def test_a_gradient_that_is_not_finite_behind_a_finite_loss_stops_the_update_too() -> None:
    policy = policy_of()
    experience = experience_of(policy)
    next(iter(policy.trained().values())).register_hook(lambda grad: grad * math.nan)
    before = weights(policy)
    stats = update(policy, optimizer_of(policy), experience, ALL * 2, CONFIG, 1.0, packed=True)
    assert stats.updates == 0 and stats.nonfinite is not None and "gradient" in stats.nonfinite
    assert all(torch.equal(before[n], p) for n, p in policy.trained().items())


@pytest.mark.parametrize("why", ["early stop", "not finite"])
def test_nothing_of_an_update_that_was_broken_off_reaches_the_next(why: str) -> None:
    policy, clean = policy_of(), policy_of()
    experience = experience_of(policy)
    broken = experience
    if why == "early stop":
        broken = experience._replace(old_logp_BT=experience.old_logp_BT - 0.5)
    else:
        broken.advantages_BT[0, 0], kept = math.inf, float(broken.advantages_BT[0, 0])
    config = replace(CONFIG, target_kl=0.05)
    optimizer = optimizer_of(policy)
    stopped = update(policy, optimizer, broken, ALL, config, 1.0, packed=True)
    assert stopped.updates == 0 and stopped.early_stop == (why == "early stop")
    if why == "not finite":
        experience.advantages_BT[0, 0] = kept
    update(policy, optimizer, experience, ALL, config, 1.0, packed=True)
    update(clean, optimizer_of(clean), experience, ALL, config, 1.0, packed=True)
    assert all(torch.equal(p, weights(clean)[n]) for n, p in weights(policy).items())


def refuse_more_rows_than(policy: Policy, rows: int, but: int = 0) -> None:
    """As a GPU would whose memory holds no more, the first `but` passes excepted."""
    passes = 0

    def guard(module: torch.nn.Module, args: object, inputs: dict[str, Tensor]) -> None:
        nonlocal passes
        passes += 1
        if len(inputs["input_ids"]) > rows and passes > but:
            raise torch.OutOfMemoryError("made up")

    policy.model.register_forward_pre_hook(guard, with_kwargs=True)


def test_where_memory_runs_out_the_work_is_done_again_in_smaller_parts_with_the_same_result() -> None:
    policy, roomy = policy_of(), policy_of()
    experience = experience_of(roomy)
    batches = mini_batches(CONFIG, torch.Generator().manual_seed(0))
    expected = update(roomy, optimizer_of(roomy), experience, batches, CONFIG, 1.0, packed=False)

    refuse_more_rows_than(policy, 1)
    lines: list[str] = []
    limit = RowLimit(4, lines.append)
    found = update(policy, optimizer_of(policy), experience, batches, CONFIG, 1.0, packed=False, limit=limit)
    assert (limit.rows, len(lines)) == (1, 2)  # halved twice, for good
    assert found.updates == expected.updates == 4
    assert found.policy_loss == pytest.approx(expected.policy_loss, rel=1e-3)
    assert_close(weights(policy), weights(roomy))


def test_the_gradients_of_parts_that_did_fit_before_memory_ran_out_count_once() -> None:
    policy = policy_of()
    experience = experience_of(policy)
    expected = gradient_of(experience, ALL[0], packed=False)
    refuse_more_rows_than(policy, 2, but=1)
    optimizer, limit = optimizer_of(policy), RowLimit(4, lambda _: None)
    assert update(policy, optimizer, experience, ALL, CONFIG, 1.0, packed=False, limit=limit).updates == 1
    moments = optimizer.state()[1]
    assert_close({n: 10 * moments[f"{n}.exp_avg"] for n in expected}, expected)


def test_where_memory_does_not_hold_a_single_row_the_run_ends_with_the_remedies() -> None:
    policy = policy_of()
    experience = experience_of(policy)
    refuse_more_rows_than(policy, 0)
    with pytest.raises(UserError, match="--gradient-checkpointing"):
        limit = RowLimit(4, lambda _: None)
        update(policy, optimizer_of(policy), experience, ALL, CONFIG, 1.0, packed=False, limit=limit)
