"""The closing summary says what was measured, over how many steps, and by which rule a step was exported."""

from typing import Any

import pytest

from equipoise.measures.shares import wilson
from equipoise.policy.card import ModelCard, render
from equipoise.policy.config import PolicyConfig
from equipoise.ppo.choice import Choice, because
from equipoise.ppo.config import DiversityConfig, PPOConfig, TrainConfig
from equipoise.ppo.facts import facts
from equipoise.ppo.presets import PRESETS
from equipoise.ppo.summary import describe, training_summary
from equipoise.ppo.warm_start_config import WarmStartConfig
from equipoise.protocol.reward import RewardWeights
from equipoise.protocol.task import PROTOCOL, Task
from tests.ppo.test_choice import found
from tests.tasks import foreign_task, one_class_task

MEASURED = {"n": 100.0, "both": 0.5, "strict": 0.4, "pairs": 1.0, "effective_pairs": 1.0, "unique": 0.9, "kl": 6.25}


def run_of(steps: int, **changes: Any) -> dict[str, Any]:
    rows = [{"step": i, "reward/mean": i / 10, "compliance/both": 0.5, "kl/ref": 1.0 * i} for i in range(1, steps + 1)]
    return {
        "steps": steps, "exported_step": steps, "exported_because": "the last step", "alerts": {},
        **training_summary(rows, steps), **changes,
    }  # fmt: skip


def said(summary: dict[str, Any], task: Task = PROTOCOL) -> str:
    return "\n".join(f"{label}: {text}" for label, text in describe(summary, task)) + "\n"


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (1, "reward: 0.10 at first, 0.10 over the last step;"),
        (8, "reward: 0.10 at first, 0.45 over the last 8 steps;"),
        # Steps 6 to 25: the mean of 0.6 to 2.5.
        (25, "reward: 0.10 at first, 1.55 over the last 20 steps;"),
    ],
)
def test_the_last_steps_are_as_many_as_there_were(steps: int, words: str) -> None:
    assert said(run_of(steps)).startswith(words)


def test_no_mean_of_ten_steps_is_missed_where_there_were_fewer_and_nothing_is_minus_zero() -> None:
    final = {"final": MEASURED | {"nll": 2.5, "kl": -0.001}, "generation": "temperature 1"}
    for steps in (1, 9):
        assert "0.9 as a mean of 10 steps needs more steps\n" in said(run_of(steps, **final))
    short = [{"step": i, "reward/mean": -0.004, "compliance/both": 0.5, "kl/ref": -1e-9} for i in range(1, 13)]
    text = said(run_of(12) | training_summary(short, 12) | final)
    assert "not reached" in text and "-0.00" not in text and text.count("0.00") == 3


def test_what_is_not_known_is_not_a_question_mark() -> None:
    final = {"final": MEASURED | {"nll": 2.5}, "generation": "temperature 1, top-p 0.95"}
    assert "?" not in said(run_of(3, **final)) and "its own sentences" not in said(run_of(3, **final))
    assert "(its own sentences: 3.50)" in said(run_of(3, base={"nll": 3.5}, **final))
    final["final"] = MEASURED | {"nll": None}
    assert "fluency: not known" in said(run_of(3, **final)) and "?" not in said(run_of(3, **final))


def test_the_distance_to_the_reference_says_of_what_it_is() -> None:
    final = {"final": MEASURED | {"nll": 2.5}, "generation": "temperature 1, top-p 0.95"}
    assert "distance: 3.00 nats per sentence from the reference model, in the batch of step 3" in said(run_of(3))
    assert "6.25 nats per sentence from the reference model, in these sentences (temperature 1, top-p 0.95)" in said(
        run_of(3, **final)
    )
    known = said(run_of(3, kl_bound=1.5, kl_excess=1.5, **final))
    assert "distance: 3.00 nats" in known and "6.25" not in known
    assert "in the last batches up to step 3 (bound 1.50 for their share of both classes)" in known


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (PROTOCOL, "both classes in 50.0 % of 100, strict success in 40.0 %; 1 pair (1.0 effective)"),
        (foreign_task(), "all 3 classes in 50.0 % of 100, strict success in 40.0 %; 1 combination (1.0 effective)"),
        (one_class_task(), "the class in 50.0 % of 100, strict success in 40.0 %; 1 term (1.0 effective)"),
    ],
)
def test_the_sentences_are_told_in_the_words_of_the_task(task: Task, words: str) -> None:
    assert words in said(run_of(2, evaluation=MEASURED), task)


def test_why_an_earlier_step_is_exported_than_the_one_that_measured_highest() -> None:
    """Step 4 is within the sampling error of step 8's success and has more pairs: both numbers of both are told."""
    choice, four, eight = Choice(), found(4, 0.9, pairs=20.0, kl=5.2, n=60), found(8, 0.95, pairs=12.0, kl=6.1, n=60)
    choice.consider(four)
    assert not choice.consider(eight)
    assert choice.step == 4 and choice.top is eight and choice.highest == 0.95
    told = because(four, eight, "pairs")
    least = 100 * wilson(57, 60).low
    assert f"the highest strict success, 95.0 %, was step 8's, but from {least:.1f} % up" in told
    assert "more effective pairs decide (20.0 here, 12.0 there)" in told and "(5.20 here, 6.10 there)" in told
    assert because(eight, eight, "pairs") == "no evaluation had a higher strict success"
    assert "rank" in because(four | {"rank": 1.0}, eight | {"rank": 0.5}, "pairs")


def test_a_choice_of_an_earlier_version_goes_on() -> None:
    choice, last = Choice(), found(9, 0.93)
    choice.load_state({"best": found(4, 0.9), "highest": 0.99})
    assert choice.highest == 0.99 and choice.consider(found(5, 0.95)) is True and choice.highest == 0.99
    again = Choice()
    again.load_state(choice.state())
    assert (again.best, again.top) == (choice.best, choice.top)
    assert because(last, {"strict": 0.99}, "pairs")


FOREIGN = TrainConfig(
    task=foreign_task(),
    missing_eos_penalty=0.25,
    reward=RewardWeights(length_penalty=0.3),
    ppo=PPOConfig(ref_kl_target=6.0),
    diversity=DiversityConfig(opening_weight=0.125),
    warm_start=WarmStartConfig(warm_start="samples"),
    policy=PolicyConfig(use_8bit=True),
)


@pytest.mark.parametrize("config", [*PRESETS.values(), FOREIGN], ids=[*PRESETS, "a foreign task"])
def test_the_card_names_every_option_in_force_and_none_that_was_not(config: TrainConfig) -> None:
    card = ModelCard(facts(config, 7, 0.125, warmed=True), config.prompt, config.task)
    text, ppo, warm = render(card, None), config.ppo, config.warm_start
    assert f"PPO, 7 steps of {ppo.batch_size:,} sentences, " in text and f"learning rate {ppo.learning_rate:g}" in text
    for words, in_force in {
        "all weights": config.policy.tuning == "full",
        f"LoRA of rank {config.policy.lora_rank}": config.policy.tuning == "lora",
        "8 bits": config.policy.use_8bit,
        "KL coefficient 0.125": True,
        "steered": ppo.ref_kl_target is not None,
        "warm start": warm.wanted,
        "forced sentences": warm.warm_start == "forced",
        "its own complying samples": warm.warm_start.startswith("samples"),
        f"entropy bonus {ppo.entropy_coef:g}": ppo.entropy_coef > 0,
        f"bonus for strict success {config.strict_bonus:g}": config.strict_bonus > 0,
        f"diversity bonus {config.diversity.diversity_weight:g}": config.diversity.diversity_weight > 0,
        f"to the power {config.diversity.even_power:g}": config.diversity.even_power > 0,
        "malus for common openings": config.diversity.opening_weight > 0,
        f"malus for a nat per token {config.fluency_weight:g}": config.fluency_weight > 0,
        "cut-off": config.missing_eos_penalty > 0,
        "other weights of the reward": config.reward != RewardWeights(),
        config.task.frame.replace("{occupation}", "<occupation>"): True,
        "None": False,
    }.items():
        assert (words in text) == in_force, words
    assert "warm start" not in facts(config, 7, 0.1, warmed=False)
