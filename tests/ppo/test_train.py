"""The loop: what a step is made of, and what its numbers are."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.errors import UserError
from equipoise.evaluation.runs import read_run
from equipoise.evaluation.training_text import training_text
from equipoise.policy.load import Policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.rollout import Rollout
from equipoise.policy.score import score
from equipoise.ppo import step as stepping
from equipoise.ppo import warm_start
from equipoise.ppo.advantages import Estimated
from equipoise.ppo.config import DiversityConfig, TrainConfig
from equipoise.ppo.diversity import TermWindow
from equipoise.ppo.experience import Rewarded, Scored
from equipoise.ppo.log import defined_keys, undefined_keys
from equipoise.ppo.metrics import step_metrics
from equipoise.ppo.state import State
from equipoise.ppo.step import occupation_at
from equipoise.ppo.train import Outcome, train
from equipoise.ppo.update import UpdateStats
from equipoise.protocol.task import PROTOCOL
from tests.default import HOLDOUT, OCCUPATIONS
from tests.tiny import tiny_folder

from .small import rows, small_config

METRICS = (Path(__file__).parents[2] / "docs" / "METRICS.md").read_text(encoding="utf-8")


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, list[torch.Tensor], bool]]:
    """What each update is given, and whether the old log-probs are exactly those of the policy in the very groups that
    the first epoch's optimizer steps see."""
    seen: list[tuple[Any, list[torch.Tensor], bool]] = []
    made = stepping.Update

    def look(policy: Policy, adam: Any, experience: Any, batches: Any, config: Any, t: float, *rest: Any) -> Any:
        packed, *_ = rest
        exact = []
        first_epoch = batches[: config.batch_size // config.mini_batch_size]
        for group in (micro for step in first_epoch for micro in step.split(config.micro_batch_size)):
            part = experience.rollout.select(group)
            new = score(policy, part, t, packed=packed).logprobs  # with gradients, as there
            old = experience.old_logp_BT[group][experience.rollout.mask_BT[group]]
            exact.append(torch.equal(new.detach(), old))
        seen.append((experience, batches, all(exact)))
        return made(policy, adam, experience, batches, config, t, *rest)

    monkeypatch.setattr(stepping, "Update", look)
    return seen


def test_every_round_visits_every_occupation_once_in_an_order_of_its_own() -> None:
    stream = [occupation_at(i, OCCUPATIONS, seed=3) for i in range(100)]
    orders = [tuple(stream[i : i + 20]) for i in range(0, 100, 20)]
    assert all(sorted(order) == sorted(OCCUPATIONS) for order in orders)
    assert len(set(orders)) == 5
    assert tuple(occupation_at(i, OCCUPATIONS, seed=4) for i in range(20)) != orders[0]


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"scoring": "padded"}, {"micro_batch_size": 3}, {"gradient_checkpointing": True}, {"temperature": 0.7}],
    ids=str,
)
def test_in_a_first_epoch_old_and_new_log_probs_are_the_same_to_the_last_bit(
    model: Path, tmp_path: Path, updates: list[Any], tuning: str, changes: dict[str, Any]
) -> None:
    """So the ratio is 1 and the update's KL 0, and the first step is at distance 0 from the reference."""
    settings = {"steps": 3, "ppo_epochs": 1, "mini_batch_size": 8, "tuning": tuning} | changes
    train(small_config(model, tmp_path, **settings))
    assert len(updates) == 3 and all(exact for _, _, exact in updates)
    table = rows(tmp_path)
    assert [row["ppo/ratio_max"] for row in table] == [1.0] * 3
    assert [row["ppo/update_kl"] for row in table] == [0.0] * 3
    assert table[0]["kl/ref"] == table[0]["kl/ref_k3"] == table[0]["value/mean"] == 0.0
    assert table[2]["kl/ref_k3"] > 0


def test_every_mini_batch_of_the_first_epoch_starts_from_its_own_old_log_probs(
    model: Path, tmp_path: Path, updates: list[Any]
) -> None:
    train(small_config(model, tmp_path, micro_batch_size=3))
    assert len(updates) == 6 and all(exact for _, _, exact in updates)


def test_advantages_are_whitened_over_the_whole_batch_and_the_score_sits_on_the_last_token(
    model: Path, tmp_path: Path, updates: list[Any]
) -> None:
    """At γ = λ = 1 and values of 0 every token's return is what is still to come: with β = 0 the sentence's reward."""
    config = small_config(model, tmp_path, steps=1, kl_coef=0.0, gae_lambda=1.0)
    train(config)
    ((experience, batches, _),) = updates
    mask = experience.rollout.mask_BT
    white = experience.advantages_BT
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(white[mask].std(unbiased=False)) == pytest.approx(1, abs=1e-4)
    assert not white[~mask].any()
    assert max(abs(float(white[b][mask[b]].mean())) for b in batches) > 0.05

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [
        tokenizer.decode([*p, *c], skip_special_tokens=True)
        for p, c in zip(experience.rollout.prompts, experience.rollout.completions(), strict=True)
    ]
    for text, returns, real in zip(texts, experience.returns_BT, mask, strict=True):
        assert returns[real].tolist() == pytest.approx([PROTOCOL.score(text).reward] * int(real.sum()), abs=1e-6)


def test_every_key_of_a_run_is_defined_and_every_defined_key_is_in_a_run(model: Path, tmp_path: Path) -> None:
    rates = {"pairs": [{"pair": ["bold", "caring"], "value": 1e-4, "variance": 1e-10}], "unseen": 1e-6, "n": 500}
    (tmp_path / "pairs.json").write_text(json.dumps(rates))
    config = small_config(
        model, tmp_path, steps=3, save_every=1, base_samples=8, eval_sentences=20, kl_in="both",
        pair_rates=str(tmp_path / "pairs.json"),
    )  # fmt: skip
    train(config, lambda texts, jobs: [1.0] * len(texts), lambda texts, jobs: float(len(texts)))
    lines = [(tmp_path / "out" / name).read_text().splitlines() for name in ("metrics.jsonl", "eval.jsonl")]
    logged = {key for line in itertools.chain(*lines) for key in json.loads(line)}
    logged -= {"step"}
    assert undefined_keys(logged, METRICS) == []
    several, groups = {"time/wait", "ranks/size"}, {"ppo/kl_loss", "group/reward_std", "group/alike"}
    assert set(defined_keys(METRICS)) - logged == several | groups  # of several processes, and of other algorithms
    train(small_config(model, tmp_path / "grpo", steps=1, algorithm="grpo"))
    line = json.loads((tmp_path / "grpo" / "out" / "metrics.jsonl").read_text())
    assert groups <= set(line) and undefined_keys(set(line) - {"step"}, METRICS) == []
    columns = (tmp_path / "out/training_metrics.csv").read_text().splitlines()[0].split(",")
    assert columns[0] == "step" and not any(c.startswith(("time/", "speed/", "memory/")) for c in columns)


SENTENCES = (
    "The nurse was bold and caring in the emergency room.",  # both; 10 words
    "The chef was bold, confident, and caring; caring, helpful, caring to all.",  # both, 2 extra, caring 3 ×; 12 words
    "The pilot was loyal.",  # one class; 4 words
    "The artist was tall and slim and quick and glad",  # none; 10 words, no end
)


def test_the_numbers_of_a_step_by_hand() -> None:
    rewards = [PROTOCOL.score(s) for s in SENTENCES]
    assert [r.reward for r in rewards] == [1.0, 1.0, 0.2, -0.2]
    rollout = Rollout(
        [[1]] * 4,
        torch.ones(4, 3, dtype=torch.long),
        torch.tensor([3, 1, 2, 2]),
        torch.tensor([True, True, True, False]),
    )
    ones = torch.where(rollout.mask_BT, 1.0, 0.0)
    first = torch.zeros(4, 3)
    first[0, 0] = 4.0
    stats = UpdateStats(0.02, 5, True, 1.5, 0.1, -0.01, 0.04, 0.7, None)
    rewarded = Rewarded(rewards, torch.tensor([1.1, 1.0, 0.2, -0.3]), torch.tensor([0.1, 0.0, 0.0, 0.0]))
    # All of a sentence's KL sits on its first token: 1, 2, 3 and −2 nats; k3 of k nats is e^−k − 1 + k.
    kl_BT = torch.zeros(4, 3)
    kl_BT[:, 0] = torch.tensor([1.0, 2.0, 3.0, -2.0])
    scored = Scored(kl_BT - 5.0, 2 * ones, first, 0 * ones, torch.full((4, 3), -5.0))
    advantages = Estimated(first, first, 2 * first)
    config = TrainConfig(missing_eos_penalty=0.4, strict_bonus=0.2)
    state = State.begin(config, RowLimit(16))
    state.skipped = 2
    found = step_metrics(config, state, 1e-5, rollout, rewarded, scored, advantages, stats)
    k3 = sum(math.exp(-k) - 1 + k for k in (1, 2, 3, -2)) / 4
    expected = {
        "reward/mean": 0.5, "reward/std": math.sqrt((0.25 + 0.25 + 0.09 + 0.49) / 4), "reward/base": 2.1 / 4,
        "reward/bonus": 0.025, "reward/length_penalty": -0.025, "reward/repetition_penalty": -0.025,
        "reward/training": 0.5, "reward/diversity_bonus": 0.025, "reward/missing_eos": -0.1,
        "reward/strict_bonus": 0.1,
        "compliance/both": 0.5, "compliance/one": 0.25, "compliance/none": 0.25, "compliance/in_length": 0.75,
        "compliance/strict": 0.5, "text/words": 9.0, "text/unique": 1.0, "text/pairs": 1, "text/tokens": 2.0,
        "text/finished": 0.75, "kl/ref": 1.0, "kl/ref_k3": k3, "kl/coef": 0.05, "kl/penalty": 0.05,
        "ppo/update_kl": 0.02, "ppo/updates": 5, "ppo/early_stop": 1, "ppo/ratio_max": 1.5, "ppo/clip_fraction": 0.1,
        "ppo/policy_loss": -0.01, "ppo/value_loss": 0.04, "ppo/entropy": 2.0, "ppo/grad_norm": 0.7,
        "ppo/learning_rate": 1e-5, "value/mean": 0.5, "value/explained_variance": 0.75,
        "advantage/std": math.sqrt(2 - 0.25), "guard/skipped": 2,
    }  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_learning_rate_warms_up_in_equal_steps_and_the_kl_coefficient_follows_its_target(
    model: Path, tmp_path: Path
) -> None:
    train(small_config(model, tmp_path, warmup_steps=4, learning_rate=4e-3, ref_kl_target=1e-9, kl_horizon=100))
    table = rows(tmp_path)
    assert [row["ppo/learning_rate"] for row in table] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 4e-3, 4e-3])
    # The first step is at distance 0, far below any target; every later one here is above this one.
    factors = [after["kl/coef"] / before["kl/coef"] for before, after in itertools.pairwise(table)]
    assert factors[0] == pytest.approx(1 - 0.2 * 8 / 100)
    assert factors[1:] == pytest.approx([1 + math.copysign(0.016, row["kl/ref"]) for row in table[1:-1]])


def test_a_reward_function_of_ones_own_is_what_is_maximised_and_the_protocols_is_still_reported(
    model: Path, tmp_path: Path
) -> None:
    seen = []

    def reward(texts: Any, occupations: Any) -> list[float]:
        seen.append((list(texts), list(occupations)))
        return [2.0] * len(texts)

    train(small_config(model, tmp_path, steps=2, missing_eos_penalty=0.5), reward)
    assert [len(texts) for texts, _ in seen] == [8, 8]
    assert all(t.startswith(f"The {o} was") for texts, jobs in seen for t, o in zip(texts, jobs, strict=True))
    for row, (texts, _) in zip(rows(tmp_path), seen, strict=True):
        assert row["reward/training"] == pytest.approx(2 - 0.5 * (1 - row["text/finished"]), abs=1e-6)
        assert row["reward/mean"] == pytest.approx(sum(PROTOCOL.score(t).reward for t in texts) / 8)
    assert any(row["text/finished"] < 1 for row in rows(tmp_path))
    run = read_run(tmp_path / "out")
    assert str(run.record["reward_fn"]).endswith("still_reported.<locals>.reward") and "rank_fn" not in run.record
    assert "still_reported.<locals>.reward, in place of the protocol’s." in training_text(run, PROTOCOL)


def test_terms_of_each_step_enter_the_window_that_the_next_steps_bonus_is_taken_from(
    model: Path, tmp_path: Path
) -> None:
    train(small_config(model, tmp_path, diversity_weight=0.5, sample_every=1))
    table = rows(tmp_path)
    assert table[0]["reward/diversity_bonus"] == 0
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    window = TermWindow(DiversityConfig(0.5), PROTOCOL)
    for row in table:
        batch = [PROTOCOL.score(s["text"]) for s in samples if s["step"] == row["step"]]
        jobs = [s["text"].split()[1] for s in samples if s["step"] == row["step"]]
        bonuses = window.bonuses(batch, jobs)
        window.add(batch, jobs)
        assert row["reward/diversity_bonus"] == pytest.approx(sum(bonuses) / 8, abs=1e-6)
        assert row["reward/training"] == pytest.approx(row["reward/mean"] + sum(bonuses) / 8, abs=1e-6)
    assert any(row["reward/diversity_bonus"] for row in table)


def test_a_reward_function_that_loses_sentences_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"7 numbers for 8 sentences: return one for each. Step 0 is saved"):
        train(small_config(model, tmp_path), lambda texts, _: [1.0] * (len(texts) - 1))


def test_occupations_held_out_are_never_sampled_not_even_by_the_warm_start(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = []
    supervise = warm_start.supervise

    def look(policy: Policy, examples: Any, *args: Any, **named: Any) -> None:
        collected.extend(examples)
        supervise(policy, examples, *args, **named)

    monkeypatch.setattr(warm_start, "supervise", look)
    train(small_config(model, tmp_path, holdout=True, sample_every=1, warm_start="forced", warm_start_sentences=40))
    texts = [json.loads(line)["text"] for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len(texts) == 48
    assert {t.split()[1] for t in texts} == set(OCCUPATIONS) - set(HOLDOUT)
    assert {e.occupation for e in collected} <= set(OCCUPATIONS) - set(HOLDOUT) and len(collected) == 40


def test_what_was_recorded_before_the_warm_start_moved_the_weights_is_forgotten(
    model: Path, tmp_path: Path, policies: list[Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph holds addresses. On a CPU nothing is recorded, so a mark stands for it."""
    collect = warm_start.collect

    def look(policy: Policy, *args: Any, **named: Any) -> Any:
        policy.decoders["recorded"] = "before"
        return collect(policy, *args, **named)

    monkeypatch.setattr(warm_start, "collect", look)
    train(small_config(model, tmp_path, steps=1, warm_start="forced", warm_start_sentences=16))
    assert policies[0].decoders == {}


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_final_folder_loads_plainly_and_gives_the_trained_models_logits(
    model: Path, tmp_path: Path, policies: list[Policy], tuning: str, tied: bool
) -> None:
    if tied:
        model = tiny_folder(tmp_path / "tied", tie=True)
    config = small_config(model, tmp_path, learning_rate=0.02, target_kl=1.0, kl_coef=0.5, tuning=tuning)
    assert train(config) == Outcome("done", 6, 0)
    ids = torch.randint(0, 52, (4, 9), generator=torch.Generator().manual_seed(0))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        ours, merged = policies[0].model(ids).logits, loaded(ids).logits
        base = AutoModelForCausalLM.from_pretrained(model).eval()(ids).logits
    torch.testing.assert_close(merged, ours, atol=2e-5, rtol=1e-5)
    assert float((merged - base).abs().max()) > 0.1
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("The nurse was").input_ids
        == policies[0].tokenizer("The nurse was").input_ids
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps 0"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"prompt": "studdy"}, "no prompt 'studdy'"),
        ({"prompt": "mine=no place for it"}, "occupation"),
        ({"missing_eos_penalty": math.nan}, "missing-eos-penalty"),
        ({"kl_coef": math.nan}, "kl-coef"),
        ({"learning_rate": math.inf}, "learning-rate"),
        ({"target_kl": math.nan}, "target-kl"),
        ({"diversity_weight": math.nan}, "diversity-weight"),
        ({"save_minutes": math.nan}, "save-minutes"),
        ({"warm_start_learning_rate": math.nan}, "warm-start-learning-rate"),
        ({"keep_checkpoints": -1}, "keep-checkpoints -1"),
        ({"sample_every": 0}, "sample-every 0"),
        ({"warm_start_sentences": 3}, "warm-start-sentences 3"),
    ],
)
def test_settings_that_make_no_run_are_refused(
    model: Path, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        small_config(tmp_path, tmp_path, **settings)


def test_the_default_configuration_is_the_guides_numbers() -> None:
    config = TrainConfig()
    ppo = config.ppo
    assert (ppo.batch_size, ppo.mini_batch_size, ppo.ppo_epochs, ppo.learning_rate) == (64, 16, 4, 1e-5)
    assert (ppo.target_kl, ppo.gamma, ppo.gae_lambda, ppo.clip) == (0.03, 1.0, 0.95, 0.2)
    assert (config.steps, config.run.save_every, config.run.sample_every) == (2000, 100, 50)
    assert (config.run.output_dir, config.run.checkpoint_dir) == ("rlhf_llama3_7b_output", "rlhf_checkpoints")
