"""The update: what it minimises, and everything that must not matter to it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from equipoise.errors import UserError
from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.load import Policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.rollout import Rollout
from equipoise.policy.score import score
from equipoise.policy.ways import Ways
from equipoise.ppo import update as updating
from equipoise.ppo.config import PPOConfig
from equipoise.ppo.update import Update, mini_batches
from equipoise.runs.pieces import PieceSum
from equipoise.runs.ranks import Ranks
from tests.tiny import bare_policy, perturb, pretend_graphs

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


@pytest.mark.parametrize(
    "ways",
    [
        Ways(nodes=9),
        Ways(nodes=1),
        Ways(packed=False),
        Ways(packed=False, padded=False),
        Ways(tokens=7),  # some micro-batches have a longer row
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [True, False])
def test_the_gradient_does_not_depend_on_the_way_that_a_model_needs(ways: Ways, packed: bool) -> None:
    experience = experience_of(policy_of(), drift=0.0)
    assert max(len(p) + int(n) for p, n in zip(PROMPTS, experience.rollout.lengths_B, strict=True)) > 7
    assert_close(gradient_of(experience, ALL[0], packed=packed, ways=ways), gradient_of(experience, ALL[0]))


@pytest.mark.parametrize(
    ("target", "poison", "updates"),
    [(1e9, None, 4), (0.15, None, 3), (1e-9, None, 1), (1e9, "returns", 2), (1e9, "norm", 2)],
    ids=["all", "stopped", "stopped at once", "not finite", "a norm that is not finite"],
)
def test_where_the_device_decides_before_the_host_has_read_the_same_steps_are_taken(
    target: float, poison: str | None, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which is given the next mini-batch before anyone knows whether it is wanted."""
    batches = [torch.arange(4), torch.arange(4), torch.tensor([4, 5, 6]), torch.arange(7)]
    found = []
    for unread in (False, True):
        monkeypatch.setattr(Update, "unread", unread)
        policy = policy_of()
        optimizer, experience = optimizer_of(policy, lr=0.002), experience_of(policy)
        experience = experience._replace(advantages_BT=20 * experience.advantages_BT)
        if poison == "returns":
            experience.returns_BT[5, 0] = torch.inf
        if poison == "norm":
            norms, counted = optimizer.norms, iter(range(9))
            monkeypatch.setattr(optimizer, "norms", lambda n=norms, c=counted: n() / (next(c) != 2))
        config = replace(CONFIG, target_kl=target, max_grad_norm=0.1)
        doing = Update(policy, optimizer, experience, batches, config, 1.0, True, RowLimit(8))
        doing.begin()
        assert len(doing._launched) == 1 + unread
        stats = doing.finish()
        assert all(p.grad is not None and not p.grad.any() for p in policy.trained().values())
        found.append((stats, weights(policy), optimizer.state()[1]))
    (plain, *expected), (ahead, *own) = found
    assert plain.updates == updates and plain.early_stop is (target < 1)
    assert (plain.nonfinite is None) is (poison is None)
    assert repr(ahead) == repr(plain)
    for mine, theirs in zip(own, expected, strict=True):
        assert all(torch.equal(mine[name], x) for name, x in theirs.items())


@pytest.mark.parametrize("packed", [False, True])
def test_at_the_first_mini_batch_the_gradient_is_the_token_mean_of_the_policy_gradient(packed: bool) -> None:
    """−mean over the mini-batch's tokens of A·∇log π, each log π from a forward pass of its own."""
    policy = policy_of()
    experience = experience_of(policy)
    rows = torch.tensor([5, 0, 3])
    completions = experience.rollout.completions()
    assert len({len(completions[i]) for i in rows}) > 1  # or a mean over rows would be the same
    total, tokens = torch.zeros(()), 0
    for row in rows.tolist():
        for t, token in enumerate(completions[row]):
            ids = torch.tensor([[*PROMPTS[row], *completions[row][:t]]])
            logprob = torch.log_softmax(policy.model(input_ids=ids, use_cache=False).logits[0, -1], -1)[token]
            total = total - experience.advantages_BT[row, t] * logprob
            tokens += 1
    (total / tokens).backward()
    expected = {n: p.grad for n, p in policy.trained().items() if p.grad is not None}
    found = gradient_of(experience, rows, packed=packed)
    assert_close({n: found[n] for n in expected}, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"packed": False}, {"order": 1}])
def test_micro_batch_size_packing_and_row_order_do_not_change_the_gradient(lora: bool, changes: dict[str, int]) -> None:
    experience = experience_of(policy_of(lora))
    rows = torch.tensor([6, 1, 4, 7, 2])
    expected = gradient_of(experience, rows, replace(CONFIG, micro_batch_size=8), lora=lora)
    changed = replace(CONFIG, micro_batch_size=changes.get("micro_batch_size", 8))
    if "order" in changes:
        rows = rows.flip(0)
    found = gradient_of(experience, rows, changed, packed=changes.get("packed", True) is True, lora=lora)
    assert_close(found, expected)


@pytest.mark.parametrize("lora", [False, True])
def test_shapes_padded_for_graphs_do_not_change_the_update(lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = policy_of(lora), pretend_graphs(policy_of(lora), monkeypatch)
    experience = experience_of(plain)
    batches = mini_batches(CONFIG, torch.Generator().manual_seed(0))
    config = replace(CONFIG, micro_batch_size=3, entropy_coef=0.01)
    expected = update(plain, optimizer_of(plain), experience, batches, config, 1.0, packed=True)
    found = update(fast, optimizer_of(fast), experience, batches, config, 1.0, packed=True)
    assert_close(weights(fast), weights(plain))
    for name in ("update_kl", "ratio_max", "clip_fraction", "policy_loss", "value_loss", "grad_norm"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-6), name


def test_the_order_of_the_batch_and_padding_do_not_change_the_update() -> None:
    policy = policy_of()
    experience = experience_of(policy)
    batches = mini_batches(CONFIG, torch.Generator().manual_seed(0))
    expected = update(policy, optimizer_of(policy), experience, batches, CONFIG, 1.0, packed=True)

    order = torch.randperm(8, generator=torch.Generator().manual_seed(9))
    place = torch.argsort(order)

    def wider(x: Tensor) -> Tensor:
        return torch.cat([x[order], torch.full((8, 3), 3 if x.dtype == torch.long else 7.0).to(x.dtype)], dim=1)

    rollout = experience.rollout.select(order)
    padded = Rollout(rollout.prompts, wider(experience.rollout.tokens_BT), rollout.lengths_B, rollout.finished_B)
    columns = {name: x for name, x in experience._asdict().items() if isinstance(x, Tensor)}
    moved = experience._replace(rollout=padded, **{name: wider(x) for name, x in columns.items()})
    other = policy_of()
    found = update(other, optimizer_of(other), moved, [place[rows] for rows in batches], CONFIG, 1.0, packed=False)
    assert_close(weights(other), weights(policy))
    assert found.updates == expected.updates == len(batches)
    for name in ("update_kl", "ratio_max", "clip_fraction", "policy_loss", "value_loss", "grad_norm"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-6), name


def test_each_epoch_visits_all_rows_once_in_an_order_of_its_own() -> None:
    config = PPOConfig(batch_size=24, mini_batch_size=8, ppo_epochs=3)
    batches = mini_batches(config, torch.Generator().manual_seed(0))
    assert [len(rows) for rows in batches] == [8] * 9
    epochs = [torch.cat(batches[i : i + 3]).tolist() for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = mini_batches(config, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_temperature_of_the_update_is_that_of_the_old_log_probs() -> None:
    policy = policy_of()
    experience = experience_of(policy)
    with torch.no_grad():
        old = score(policy, experience.rollout, 0.6, packed=True).logprobs
    mask = experience.rollout.mask_BT
    experience = experience._replace(old_logp_BT=torch.zeros(mask.shape).masked_scatter(mask, old))
    stats = update(policy, optimizer_of(policy), experience, ALL, CONFIG, 0.6, packed=True)
    assert (stats.ratio_max, stats.update_kl) == (pytest.approx(1, abs=1e-5), pytest.approx(0, abs=1e-9))
    stats = update(policy_of(), optimizer_of(policy), experience, ALL, CONFIG, 1.0, packed=True)
    assert stats.ratio_max > 1.1


def test_an_update_makes_good_tokens_likelier_and_values_truer() -> None:
    policy = policy_of()
    experience = experience_of(policy)
    mask = experience.rollout.mask_BT
    before = [x.detach() for x in score(policy, experience.rollout, 1.0, packed=True)]
    optimizer = optimizer_of(policy)
    optimizer.set_learning_rates(policy=3e-3, value=0.03)
    stats = update(policy, optimizer, experience, ALL * 6, CONFIG, 1.0, packed=True)
    after = [x.detach() for x in score(policy, experience.rollout, 1.0, packed=True)]
    assert float(((after[0] - before[0]) * experience.advantages_BT[mask]).mean()) > 0.02
    returns = experience.returns_BT[mask]
    assert float((after[2] - returns).square().mean()) < float((before[2] - returns).square().mean())
    assert stats.updates == 6 and 0 < stats.clip_fraction < 1 and stats.ratio_max > 1.05


def test_the_value_head_alone_learns_the_returns_and_its_loss_is_half_the_mean_squared_error() -> None:
    policy = policy_of()
    experience = experience_of(policy)
    mask = experience.rollout.mask_BT
    errors = (experience.old_values_BT - experience.returns_BT)[mask].tolist()
    optimizer = optimizer_of(policy)
    optimizer.set_learning_rates(policy=0.0, value=0.01)
    losses = [update(policy, optimizer, experience, ALL, CONFIG, 1.0, packed=True).value_loss for _ in range(8)]
    assert losses[0] == pytest.approx(0.5 * sum(e * e for e in errors) / len(errors), rel=1e-4)
    assert losses[-1] < 0.95 * losses[0]


def test_the_entropy_coefficient_raises_the_entropy() -> None:
    policy = policy_of()
    experience = experience_of(policy)
    experience = experience._replace(advantages_BT=torch.zeros_like(experience.advantages_BT))
    before = score(policy, experience.rollout, 1.0, packed=True).entropies.detach()
    config = replace(CONFIG, entropy_coef=0.1)
    update(policy, optimizer_of(policy, 1e-3), experience, ALL * 3, config, 1.0, packed=True)
    after = score(policy, experience.rollout, 1.0, packed=True).entropies.detach()
    assert float((after - before).mean()) > 1e-3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 0}, "batch-size 0"),
        ({"mini_batch_size": 0}, "mini-batch-size 0"),
        ({"micro_batch_size": -1}, "micro-batch-size -1"),
        ({"ppo_epochs": 0}, "ppo-epochs 0"),
        ({"mini_batch_size": 24}, "64 is not a multiple of mini-batch-size 24"),
        ({"target_kl": 0.0}, "target-kl 0.0"),
        ({"learning_rate": -1e-5}, "learning-rate -1e-05"),
        ({"kl_horizon": 0}, "kl-horizon 0"),
        ({"ref_kl_target": 0.0}, "ref-kl-target 0.0"),
        ({"clip": 0.0}, "clip 0.0"),
        ({"max_grad_norm": 0.0}, "max-grad-norm 0.0"),
        ({"gae_lambda": 1.5}, "gae-lambda 1.5"),
        ({"gamma": -0.1}, "gamma -0.1"),
        ({"kl_coef": -0.1}, "kl-coef -0.1"),
        ({"warmup_steps": -1}, "warmup-steps -1"),
    ],
)
def test_numbers_with_which_nothing_could_be_learnt_are_refused(changes: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        PPOConfig(**changes)  # type: ignore[arg-type]


def test_pieces_in_bfloat16_are_added_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def adapters() -> Policy:
        return perturb(bare_policy(stops=(0, 3), attention=TRIE_ATTENTION, lora=True, dtype=torch.bfloat16), 0.1)

    added: list[Tensor] = []

    class Recorded(PieceSum):
        def add(self, piece: Tensor) -> None:
            added.append(piece.double())
            super().add(piece)

    monkeypatch.setattr(updating, "PieceSum", Recorded)
    experience = experience_of(adapters())

    def gradient(pieces: int) -> Tensor:
        policy = adapters()
        optimizer = optimizer_of(policy)
        added.clear()
        Update(policy, optimizer, experience, ALL, CONFIG, 1.0, True, RowLimit(8), Ranks(pieces=pieces)).launch()
        return optimizer.take().double()

    one = gradient(1)
    for pieces in (2, 4, 8):
        found, exact = gradient(pieces), torch.stack(added).sum(0)
        assert len(added) == pieces and (found - exact).norm() < 1e-6 * exact.norm()
        assert (
            0 < (found - one).norm() < 4e-2 * exact.norm()
        )  # what rounding each piece to 8 bits makes of so small a model
