"""GRPO, RLOO and REINFORCE++: losses by hand and by definition, groups, and whole runs of each."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.algorithms import joined
from equipoise.commands import doctor
from equipoise.errors import UserError
from equipoise.policy.algorithms import ALGORITHMS
from equipoise.policy.config import SamplingConfig
from equipoise.policy.load import Policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.sample import sample
from equipoise.ppo import claim, maths
from equipoise.ppo.advantages import estimate, experience_of
from equipoise.ppo.config import PPOConfig, TrainConfig
from equipoise.ppo.experience import Experience, Scored
from equipoise.ppo.facts import facts
from equipoise.ppo.presets import preset
from equipoise.ppo.step import occupations_of
from equipoise.ppo.sweep import read_plans
from equipoise.ppo.tool_config import SweepConfig
from equipoise.ppo.train import train
from equipoise.ppo.update import Update, UpdateStats
from tests.tiny import perturb, pretend_graphs

from .algorithms import OTHERS
from .small import checkpoints, results, rows, small_config, tensors
from .updates import PROMPTS, policy_of

ROOT = Path(__file__).parents[2]


GROUPED = ("grpo", "rloo")


# The loss and its gradient, against passes of one sentence at a time


def log_probs(policy: Policy, prompt: list[int], completion: list[int], reference: bool = False) -> list[Tensor]:
    with policy.as_reference(reference) as model:
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].double()  # type: ignore[operator]
    found = torch.log_softmax(logits, dim=-1)
    return [found[len(prompt) - 1 + t, token] for t, token in enumerate(completion)]


def experience(policy: Policy, config: PPOConfig) -> Experience:
    """A batch that the policy sampled, as the step makes it, with log-probabilities of one sentence at a time."""
    rollout = sample(policy, PROMPTS, SamplingConfig(max_new_tokens=6), torch.Generator().manual_seed(0))
    columns = [torch.zeros(rollout.mask_BT.shape) for _ in range(2)]
    with torch.no_grad():
        for row, (prompt, completion) in enumerate(zip(rollout.prompts, rollout.completions(), strict=True)):
            for column, reference in zip(columns, (False, True), strict=True):
                column[row, : len(completion)] = torch.stack(log_probs(policy, list(prompt), completion, reference))
    zeros = torch.zeros_like(columns[0])
    scored = Scored(columns[0], zeros, zeros, zeros, columns[1])
    paid = torch.tensor([1.0, 0.3, -0.2, 1.0, 0.3, 0.25, 1.2, -0.2])
    return experience_of(config, rollout, scored, estimate(config, paid, scored, rollout, 0.2), 0.2)


def slow_loss(policy: Policy, batch: Experience, rows_: Sequence[int], config: PPOConfig) -> tuple[Tensor, float]:
    """The mini-batch's loss as the papers write it, a sentence at a time; and what of it is KL."""
    tokens = int(batch.rollout.lengths_B[list(rows_)].sum())
    loss, kl_part = torch.zeros((), dtype=torch.float64), 0.0
    for row in rows_:
        completion = batch.rollout.completions()[row]
        new = log_probs(policy, list(batch.rollout.prompts[row]), completion)
        old, advantages = batch.old_logp_BT[row].tolist(), batch.advantages_BT[row].tolist()
        ratios = [(new[t] - old[t]).exp() for t in range(len(completion))]
        if config.algorithm == "rloo":
            whole = (sum(new) - sum(old[: len(completion)])).exp()  # type: ignore[union-attr]
            bounded = whole.clamp(1 - config.clip, 1 + config.clip)
            loss = loss - torch.minimum(whole * advantages[0], bounded * advantages[0]) / len(rows_)
            continue
        weight = 1 / tokens if config.algorithm == "reinforce++" else 1 / (len(completion) * len(rows_))
        for t, ratio in enumerate(ratios):
            bounded = ratio.clamp(1 - config.clip, 1 + config.clip)
            loss = loss - weight * torch.minimum(ratio * advantages[t], bounded * advantages[t])
            if config.algorithm == "grpo":
                assert batch.reference_BT is not None
                log_r = batch.reference_BT[row, t].double() - new[t]
                k3 = log_r.exp() - 1 - log_r
                loss, kl_part = loss + weight * 0.2 * k3, kl_part + weight * 0.2 * k3.item()
    return loss, kl_part


def without_values(policy: Policy) -> Policy:
    policy.value_head = None
    return policy


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("micro", [8, 3])
@pytest.mark.parametrize("algorithm", OTHERS)
def test_the_loss_and_its_gradient_are_the_papers(
    algorithm: Any, micro: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the policy has moved: ratios are off 1, some of them clipped. In micro-batches, packed or padded, and with
    the shapes that are recorded on a GPU."""
    config = PPOConfig(
        algorithm=algorithm, batch_size=8, mini_batch_size=8, micro_batch_size=micro, num_generations=4,
        target_kl=1e9, max_grad_norm=1e9,
    )  # fmt: skip
    moved = perturb(without_values(policy_of()), 0.05, seed=2)  # away from the reference
    batch, chosen = experience(moved, config), [6, 1, 2, 7, 0]
    expected = perturb(moved, 0.03, seed=5)
    loss, kl_part = slow_loss(expected, batch, chosen, config)
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in expected.trained().items() if p.grad is not None}
    policy = perturb(perturb(without_values(policy_of()), 0.05, seed=2), 0.03, seed=5)
    if packed:
        policy = pretend_graphs(policy, monkeypatch)
    stats, found = gradient(policy, batch, torch.tensor(chosen), config, packed)
    assert stats.policy_loss == pytest.approx(loss.item() - kl_part, abs=1e-6)
    assert stats.value_loss is None and 0 < stats.clip_fraction < 1
    assert (stats.kl_loss is None) == (algorithm != "grpo")
    if stats.kl_loss is not None:
        assert stats.kl_loss == pytest.approx(kl_part, rel=1e-4) and kl_part > 0.01
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()) + 1e-7, name


def gradient(
    policy: Policy, batch: Experience, chosen: Tensor, config: PPOConfig, packed: bool
) -> tuple[UpdateStats, dict[str, Tensor]]:
    """The statistics of one optimizer step, and the gradient that it used: ten times Adam's first moment."""
    from .updates import optimizer_of

    optimizer = optimizer_of(policy)
    limit = RowLimit(config.micro_batch_size)
    stats = Update(policy, optimizer, batch, [chosen], config, 1.0, packed, limit).finish()
    assert stats.updates == 1
    moments = optimizer.state()[1]
    return stats, {n.removesuffix(".exp_avg"): 10 * x for n, x in moments.items() if n.endswith(".exp_avg")}


def test_the_ratio_of_a_whole_completion_is_the_product_of_its_tokens() -> None:
    new = torch.tensor([0.1, 0.2, -0.3, 0.0], requires_grad=True)
    found = maths.policy_loss(new, torch.zeros(4), torch.ones(4), 0.9, torch.tensor([2, 2, 0, 0]))
    assert found.log_ratio.tolist() == pytest.approx([0.3, 0.3, -0.3, -0.3])
    (found.loss * torch.tensor([0.5, 0.5, 0.5, 0.5])).sum().backward()
    assert new.grad is not None
    # d/dx of −e^(a + b) is −e^(a + b) for each of its tokens.
    assert new.grad.tolist() == pytest.approx([-math.exp(0.3)] * 2 + [-math.exp(-0.3)] * 2)


# Groups


def test_a_batch_is_made_of_whole_groups_and_goes_through_all_occupations() -> None:
    config = TrainConfig(ppo=PPOConfig(algorithm="grpo", batch_size=8, mini_batch_size=4, num_generations=4))
    seen = [occupations_of(config, done) for done in range(10)]
    for batch in seen:
        assert [batch[i : i + 4] for i in (0, 4)] == [[batch[0]] * 4, [batch[4]] * 4]
    assert sorted(batch[i] for batch in seen for i in (0, 4)) == sorted(config.occupations)
    alone = TrainConfig(ppo=replace(config.ppo, algorithm="ppo", num_generations=0))
    assert len(set(occupations_of(alone, 0))) == 8


@pytest.mark.parametrize(("batch", "group"), [(64, 8), (16, 8), (12, 6), (10, 5), (9, 3), (14, 7), (2, 2)])
def test_the_largest_group_up_to_eight_that_divides_the_batch_is_the_default(batch: int, group: int) -> None:
    for algorithm in GROUPED:
        assert PPOConfig(algorithm=algorithm, batch_size=batch, mini_batch_size=batch).group_size == group  # type: ignore[arg-type]
    assert PPOConfig(batch_size=batch, mini_batch_size=batch).group_size == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm": "grpo", "num_generations": 1}, "num-generations is 1, and GRPO compares"),
        ({"algorithm": "rloo", "num_generations": 5}, "batch-size 64 is not a multiple of num-generations 5"),
        ({"algorithm": "rloo", "num_generations": -2}, "num-generations -2 must be 0"),
        ({"algorithm": "grpo", "batch_size": 11, "mini_batch_size": 11}, "batch-size 11 has no divisor from 2 to 8"),
        ({"algorithm": "grpo", "value_warmup_steps": 5}, "value-warmup-steps 5 is about a value head, which GRPO"),
        ({"algorithm": "rloo", "value_hidden": 8}, "value-hidden 8 is about a value head, which RLOO"),
        ({"algorithm": "reinforce++", "gae_lambda": 1.0}, "gae-lambda 1.0 is about a value head, which REINFORCE"),
        ({"algorithm": "rloo", "gamma": 0.9}, "gamma 0.9 is about rewards from token to token, which RLOO"),
    ],
)
def test_what_an_algorithm_cannot_use_is_refused_in_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        PPOConfig(**changes)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_preset_sets_and_an_algorithm_cannot_use_is_refused_with_what_to_give() -> None:
    """It cannot be left out: it was not given."""
    of_values: dict[str, Any] = {"algorithm": "grpo", "gae_lambda": preset("near").ppo.gae_lambda}
    with pytest.raises(UserError, match=r"or where a preset has it give --gae-lambda 0\.95$"):
        PPOConfig(**of_values)
    assert PPOConfig(**of_values | {"gae_lambda": 0.95}).gae_lambda == 0.95


def test_a_discount_from_token_to_token_suits_reinforce_plus_plus() -> None:
    assert PPOConfig(algorithm="reinforce++", gamma=0.99).gamma == 0.99


# Whole runs


@pytest.mark.parametrize("algorithm", OTHERS)
def test_a_run_continues_byte_for_byte_and_has_no_number_that_its_algorithm_lacks(
    algorithm: str, model: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"algorithm": algorithm, "entropy_coef": 0.01, "average_weights": 0.5}
    whole = small_config(model, tmp_path / "whole", **changes, num_generations=4 if algorithm in GROUPED else 0)
    train(whole)
    again = small_config(model, tmp_path / "again", **changes, num_generations=4 if algorithm in GROUPED else 0)
    train(replace(again, steps=3))
    train(again)
    assert results(tmp_path / "again", 6) == results(tmp_path / "whole", 6)
    assert checkpoints(tmp_path / "whole")[-1] == 6
    assert not [name for name in tensors(tmp_path / "whole", 6) if "value" in name]

    table = rows(tmp_path / "whole")
    keys = set(table[0])
    assert not keys & {"ppo/value_loss", "value/mean", "value/explained_variance"}
    assert ("ppo/kl_loss" in keys) == (algorithm == "grpo") == ("kl/penalty" not in keys)
    assert ({"group/reward_std", "group/alike"} <= keys) == (algorithm in GROUPED)
    assert any(row["ppo/grad_norm"] > 0 for row in table)
    out = tmp_path / "whole" / "out"
    title = ALGORITHMS[algorithm].title
    assert json.loads((out / "run.json").read_text())["config"]["ppo"]["algorithm"] == algorithm
    assert json.loads((out / "summary.json").read_text())["algorithm"] == title
    card = (out / "README.md").read_text()
    assert f"Method: {title}, 6 steps of 8 sentences" in card and f'"{title.lower()}"' in card and "PPO" not in card


@pytest.mark.parametrize("algorithm", OTHERS)
def test_a_batch_that_holds_no_difference_moves_next_to_nothing(algorithm: str, model: Path, tmp_path: Path) -> None:
    """No penalty and one reward for all."""
    config = small_config(model, tmp_path, steps=2, algorithm=algorithm, kl_coef=0.0, learning_rate=1e-3)
    train(config, lambda texts, _: [0.3] * len(texts))
    table = rows(tmp_path)
    assert all(row["advantage/std"] < 1e-6 and math.isfinite(row["kl/ref"]) for row in table)
    assert algorithm not in GROUPED or all(row["group/alike"] == 1 and row["kl/ref"] == 0 for row in table)
    assert table[0]["ppo/updates"] == 4


@pytest.mark.parametrize("algorithm", OTHERS)
def test_a_reward_that_is_not_finite_ends_a_step_before_its_update(
    algorithm: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equipoise.ppo import step as stepping

    plain, seen = stepping.reward_sentences, []

    def poisoned(*given: Any) -> Any:
        rewarded = plain(*given)
        seen.append(1)
        if len(seen) == 2:
            rewarded.paid_B[3] = math.nan
        return rewarded

    monkeypatch.setattr(stepping, "reward_sentences", poisoned)
    assert train(small_config(model, tmp_path, steps=3, algorithm=algorithm)).status == "done"
    assert [row["step"] for row in rows(tmp_path)] == [1, 3]
    kinds = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert [event["what"] for event in kinds if event["kind"] == "nonfinite"] == ["the reward is not finite"]


# Records


def test_the_first_lines_name_algorithm_and_groups_and_the_closing_screen_its_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--preset", "bundled-cpu", "--model", str(model), "--prompt", "raw", "--device", "cpu"]
    assert doctor.main([*words, "--algorithm", "grpo", "--batch-size", "48"]) == 0
    assert "steps     20 of 48 sentences, GRPO, groups of 8 of one occupation" in capsys.readouterr().out
    assert doctor.main(words) == 0
    assert "steps     20 of 64 sentences, PPO\n" in capsys.readouterr().out
    train(small_config(model, tmp_path, steps=1, algorithm="reinforce++"))
    assert "summary of 1 step of REINFORCE++" in capsys.readouterr().out


def test_a_card_says_how_its_groups_and_its_kl_were() -> None:
    config = TrainConfig(ppo=PPOConfig(algorithm="grpo", num_generations=4))
    assert facts(config, 7, 0.125, warmed=False).startswith("GRPO, 7 steps of 64 sentences in groups of 4, LoRA")
    assert "KL coefficient 0.125 in the loss" in facts(config, 7, 0.125, warmed=False)
    assert "in the loss" not in facts(TrainConfig(ppo=PPOConfig(algorithm="rloo")), 7, 0.1, warmed=False)


def test_a_run_of_before_there_was_a_choice_goes_on_as_ppo_and_as_nothing_else(model: Path, tmp_path: Path) -> None:
    config = small_config(model, tmp_path, steps=2)
    train(config)
    # What the record of such a run holds; checkpoints, which are sealed, are told by the same function.
    path = tmp_path / "out" / "run.json"
    record = json.loads(path.read_text())
    whole = copy.deepcopy(record["config"])
    for name in ("algorithm", "num_generations"):
        del record["config"]["ppo"][name]
    path.write_text(json.dumps(record))
    assert claim.as_now(record["config"]) == whole
    assert train(replace(config, steps=3)).status == "done"
    with pytest.raises(UserError, match="algorithm: ppo → rloo"):
        train(small_config(model, tmp_path, steps=4, algorithm="rloo"))


def test_a_sweep_takes_the_algorithm_as_a_setting(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "base: {preset: bundled-cpu}\nsettings:\n  a: {algorithm: grpo, num_generations: 4}\n"
        "  reinforce++: {algorithm: reinforce++}\n"
    )
    plans = read_plans(SweepConfig(file, str(tmp_path / "out")))
    found = {plan.name: plan.config.ppo.algorithm for plan in plans}
    assert found == {"a-0": "grpo", "reinforce++-0": "reinforce++"}
    file.write_text("base: {preset: bundled-cpu}\nsettings:\n  a: {algorithm: reinforce}\n")
    with pytest.raises(UserError, match="algorithm"):
        read_plans(SweepConfig(file, str(tmp_path / "out")))


@pytest.mark.parametrize("name", ["algorithms", "guide"])
def test_the_sweeps_of_the_comparison_can_be_read(name: str, tmp_path: Path) -> None:
    plans = read_plans(SweepConfig(ROOT / "benchmarks" / f"{name}.yaml", str(tmp_path)))
    assert len(plans) == {"algorithms": 36, "guide": 9}[name]
    assert {plan.config.steps for plan in plans} == {400}
    assert {plan.config.evaluation.final_sentences for plan in plans} == {1000}


@pytest.mark.parametrize("name", ["targets", "second_model"])
def test_the_sweeps_of_the_targets_are_the_presets(name: str, tmp_path: Path) -> None:
    plans = read_plans(SweepConfig(ROOT / "benchmarks" / f"{name}.yaml", str(tmp_path)))
    assert {plan.seed for plan in plans} == {0, 1, 2}
    assert {plan.config.evaluation.final_sentences for plan in plans} == {5000}
    changed = {
        option for plan in plans for option in plan.options if option not in ("seed", "output_dir", "checkpoint_dir")
    } - {"tensorboard_dir", "final_sentences", "eval_temperature", "eval_top_p"}
    assert changed == {"targets": {"holdout"}, "second_model": {"model", "prompt", "steps"}}[name]
    assert {plan.config.warm_start.warm_start_target for plan in plans if "plain" not in plan.name} == {"near", "even"}


def test_the_table_joins_what_was_measured_at_several_times(tmp_path: Path) -> None:
    head = "setting,seed,steps,reward,good_step,both,strict,effective_pairs,unique,kl,seconds,peak_gb\n"
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text(head + "b,1,300,0.5,,,,,,,9,1\nb,0,400,0.6,90,1,1,2,1,3,9,1\na,0,400,0.7,,1,1,2,1,3,9,1\n")
    second.write_text(head + "b,1,400,0.8,,1,1,2,1,3,9,1\nc,0,399,0.1,,,,,,,9,1\n")
    rows = joined([first, second], 400)
    assert [(row["setting"], row["seed"], row["reward"]) for row in rows] == [
        ("b", "0", 0.6), ("b", "1", 0.8), ("a", "0", 0.7)
    ]  # fmt: skip
    # A run that was begun again and cut takes the place of none that went further, or that has its closing summary.
    assert [(row["steps"], row["reward"]) for row in joined([second, first])] == [
        (400, 0.6), (400, 0.8), (399, 0.1), (400, 0.7)
    ]  # fmt: skip
    third = tmp_path / "c.csv"
    third.write_text(head + "b,0,400,0.65,,,,,,,9,1\na,0,400,0.75,,1,1,2,1,3,9,1\nc,0,399,0.2,,,,,,,9,1\n")
    assert [row["reward"] for row in joined([second, first, third])] == [0.6, 0.8, 0.2, 0.75]
