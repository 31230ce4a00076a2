"""The text for a paper's method section names every training option that was in force, and none that was not."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from equipoise.evaluation.findings import findings
from equipoise.evaluation.paper import methods_text
from equipoise.evaluation.runs import Alert, TrainingRun, read_run
from equipoise.evaluation.training_text import training_text
from equipoise.ppo.config import (
    DiversityConfig,
    EvaluationConfig,
    PPOConfig,
    RunConfig,
    TrainConfig,
)
from equipoise.ppo.presets import PRESETS
from equipoise.ppo.warm_start_config import WarmStartConfig
from equipoise.ppo.watch_config import WatchConfig
from equipoise.protocol.reward import RewardWeights
from equipoise.protocol.task import PROTOCOL, Task
from tests.evaluation.hostile import example, training_run
from tests.tasks import foreign_task, one_class_task

SUMMARY = {"exported_step": 50, "exported_because": "the best evaluation (strict 99.0 % of 500 sentences)"}


def told(config: TrainConfig, summary: dict[str, Any] | None = None, task: Task | None = None) -> str:
    record = json.loads(json.dumps({"config": config.document()}))
    run = TrainingRun("mine", (1, 2, 75), {}, (), (), record, SUMMARY if summary is None else summary)
    return training_text(run, config.task if task is None else task)


FOREIGN = TrainConfig(
    task=foreign_task(held_out=["Ärztin"]),
    holdout=True,
    system="Be brief.",
    missing_eos_penalty=0.25,
    fluency_weight=0.2,
    reward=RewardWeights(length_penalty=0.3),
    ppo=PPOConfig(ppo_epochs=3, ref_kl_target=6.0, value_warmup_steps=2),
    diversity=DiversityConfig(opening_weight=0.125),
    warm_start=WarmStartConfig(warm_start="samples", warm_start_candidates=2, warm_start_keep="conditional"),
    watch=WatchConfig(on_alert="rollback"),
    evaluation=EvaluationConfig(export="last", eval_sentences=30),
)


@pytest.mark.parametrize("config", [*PRESETS.values(), FOREIGN], ids=[*PRESETS, "a foreign task"])
def test_every_option_in_force_is_named_and_none_that_was_not(config: TrainConfig) -> None:
    text, ppo, warm, diversity = told(config), config.ppo, config.warm_start, config.diversity
    for fact in (
        f"trained with PPO for 75 steps (model {config.policy.model}, prompt {config.prompt},",
        f"batch {ppo.batch_size}, mini-batch {ppo.mini_batch_size}, PPO epochs {ppo.ppo_epochs}, learning rate "
        f"{ppo.learning_rate} (",
        f"rising over {ppo.warmup_steps} steps",
        f"target KL of an update {ppo.target_kl}, KL coefficient {ppo.kl_coef}",
        f"temperature {config.sampling.temperature}, top-p {config.sampling.top_p}",
        f"seed {config.seed})",
        "Exported: step 50, the best evaluation (strict 99.0 % of 500 sentences). The rule: ",
    ):
        assert fact in text, fact
    lora = f"LoRA adapters on linear layers were trained (rank {config.policy.lora_rank}"
    best = config.evaluation.export == "best" and config.evaluation.eval_sentences > 0
    dual = diversity.diversity_on == "even"
    # What is said of an option, and whether the option was in force.
    for words, in_force in {
        "system message": bool(config.system),
        f"falling linearly to 0 at step {ppo.decay_steps}": ppo.decay_steps > 0,
        "the value head alone learns": ppo.value_warmup_steps > 0,
        f"hidden units of the value head {ppo.value_hidden}": ppo.value_hidden > 0,
        f"steered towards a KL to the base model of {ppo.ref_kl_target}": ppo.ref_kl_target is not None,
        f"entropy bonus {ppo.entropy_coef}": ppo.entropy_coef > 0,
        lora: config.policy.tuning == "lora",
        "8 bits": config.policy.use_8bit,
        "All weights were trained.": config.policy.tuning == "full",
        "supervised warm start": warm.wanted,
        "forced beginnings": warm.warm_start == "forced",
        f"{warm.warm_start_sentences:,} sentences": warm.wanted,
        f"{warm.warm_start_rounds} rounds": warm.wanted and warm.warm_start_rounds > 1,
        f"{warm.warm_start_candidates} candidates": warm.wanted and warm.warm_start_candidates > 1,
        f"epochs {warm.warm_start_epochs}, batch {warm.warm_start_batch_size}, learning rate "
        f"{warm.warm_start_learning_rate} at most": warm.wanted,
        f"a bonus of {config.strict_bonus} for strict success": config.strict_bonus > 0,
        f"a diversity bonus of at most ±{diversity.diversity_weight}": diversity.diversity_weight != 0 and not dual,
        f"for strict success {diversity.diversity_weight} × nats that were raised": dual,
        f"a malus of {config.fluency_weight} for each nat": config.fluency_weight > 0,
        f"a malus of at most {diversity.opening_weight}": diversity.opening_weight > 0,
        f"a penalty of {config.missing_eos_penalty} for": config.missing_eos_penalty > 0,
        "differ from the protocol’s": config.reward != RewardWeights(),
        f"moving average of the weights over steps, with decay {ppo.average_weights}": ppo.average_weights > 0,
        "hacking watch": config.watch.on_alert != "warn",
        f"evaluations of {config.evaluation.eval_sentences} sentences": best,
        "the last weights": not best,
        "occupations, without": config.holdout,
    }.items():
        assert (words in text) == in_force, words
    for words, in_force in {
        "bonus": bool(ppo.entropy_coef or config.strict_bonus or diversity.diversity_weight),
        "warm start": warm.wanted,
        "LoRA": config.policy.tuning == "lora",
        "None": False,
    }.items():
        assert (words in text) == in_force, words


def test_what_the_varied_preset_did_reads_as_it_was() -> None:
    text = told(PRESETS["varied"])
    assert (
        "Before PPO a supervised warm start taught it from its own strictly successful continuations of forced "
        "beginnings with a term of each class, every pair alike, and after the first round from its own samples that "
        "succeed strictly (at most 4,000 sentences a round, 2 rounds, 4 candidates for each, of which are kept the "
        "likeliest under the untrained model, of each pair alike and no two of one mould, epochs 2, batch 64, "
        "learning rate 6e-05 at most, at most 200,000 samples drawn in search of them)."
    ) in text
    assert (
        "Added to each sentence’s reward: a bonus of 1.0 for strict success; a diversity bonus of at most ±1.0 for "
        "rare pairs (frequencies over the last 1,024 compliant sentences)."
    ) in text
    assert (
        "The rule: the best of evaluations of 500 sentences (temperature 1.0, top-p 0.95), made every 25 steps and at "
        "the end, by strict success, within its sampling error by effective pairs, then by KL to the base model "
        "(k1, of the evaluation’s sentences)."
    ) in text


def test_a_foreign_run_is_told_in_its_own_words() -> None:
    text = told(FOREIGN)
    assert "trained on 2 of the task’s 3 occupations, without Ärztin." in text
    assert "2 candidates for each, of which are kept resampled towards what the untrained model writes" in text
    assert "length penalty 0.3 in place of 0.1" in text and "which is not the one that is measured" not in text
    assert "the task fähig-warm-ehrlich, which is not the one that is measured here." in told(FOREIGN, task=PROTOCOL)
    forced = dataclasses.replace(FOREIGN, warm_start=WarmStartConfig(warm_start="forced"))
    assert "every combination alike" in told(forced)
    one = dataclasses.replace(forced, task=one_class_task(), holdout=False)
    assert "forced beginnings with a term of the class, every term alike" in told(one)


def test_sentences_from_a_file_take_the_place_of_the_first_rounds() -> None:
    options = WarmStartConfig(warm_start="forced", warm_start_file="a.csv")
    text = told(TrainConfig(warm_start=options))
    assert "those sentences of the file a.csv that succeed strictly (at most 256 sentences," in text
    assert "forced" not in text and "drawn in search" not in text


def test_a_target_and_where_the_kl_is_charged_for_are_told() -> None:
    options = WarmStartConfig(
        warm_start_target="even", warm_start_file="even-0f.csv", warm_start_rounds=2, warm_start_candidates=2,
        warm_start_keep="even",
    )  # fmt: skip
    text = told(TrainConfig(warm_start=options, ppo=PPOConfig(kl_in="both")))
    towards = "importance weights towards what the untrained model writes where it succeeds strictly, but every pair"
    assert f"{towards} alike" in text
    assert "are kept resampled towards what the untrained model writes, of each pair" in text and "0f.csv" not in text
    assert "KL charged for exactly over the vocabulary" in text
    assert (
        "sentences of Ctrl-G and then, in 3 rounds of 100,000 sentences, of a policy that learnt them, resamp" in text
    )
    assert "exp(" not in text
    other = WarmStartConfig(warm_start_target="even", warm_start_target_rounds=0, warm_start_fluency=1.5)
    text = told(TrainConfig(warm_start=other, diversity=DiversityConfig(0.1, diversity_on="even")))
    assert "sentences of Ctrl-G, resampled by" in text and "exp(" not in text  # which is of the rounds
    assert "for strict success 0.1 × nats that were raised or lowered for each pair towards every pair alike" in text
    with_rounds = WarmStartConfig(warm_start_target="even", warm_start_fluency=1.5)
    diversity = DiversityConfig(0.1, diversity_on="even", even_power=0.15)
    text = told(TrainConfig(warm_start=with_rounds, diversity=diversity))
    assert "in proportion to exp(−1.5 × its nats per token)" in text and "alike" not in text
    proportion = "in proportion to its share under the untrained model to the power 0.15"
    assert f"{towards} {proportion}" in text and f"for each pair towards every pair {proportion} (dual" in text
    plain = told(TrainConfig(warm_start=WarmStartConfig(warm_start_target="near", warm_start_file="near-0f.csv")))
    assert "where it succeeds strictly (" in plain and "KL charged for" not in plain
    file = told(TrainConfig(warm_start=WarmStartConfig(warm_start_target="near", warm_start_file="mine.csv")))
    assert "taught it from those sentences of the file mine.csv that succeed" in file and "Ctrl-G" not in file


def of_run(config: TrainConfig, **records: Any) -> str:
    record = json.loads(json.dumps({"config": config.document()}))
    run = TrainingRun("mine", (1, 2, 75), {}, (), (), record)
    return training_text(dataclasses.replace(run, **records), PROTOCOL)


def test_what_an_alert_was_to_do_is_not_told_as_done() -> None:
    alert = Alert(75, "length", "", "")
    stop = TrainConfig(watch=WatchConfig(on_alert="stop"), steps=100)
    assert "An alert of the hacking watch was to end the run; none did." in of_run(stop)
    assert "was to end the run; one did at step 75." in of_run(stop, alerts=(alert,))
    # It was raised, and the same command went on in spite of it.
    assert "; none did." in of_run(dataclasses.replace(stop, steps=75), alerts=(alert,))
    back = TrainConfig(watch=WatchConfig(on_alert="rollback", alert_rollbacks=1))
    assert "1 time at most; it did so 0 times." in of_run(back)
    assert "it did so 1 time, each time with other settings" in of_run(back, summary={"alert_rollbacks": 1})


def test_the_two_kls_of_the_options_are_told_apart_and_what_was_planned_from_what_was_done() -> None:
    text = of_run(TrainConfig(steps=100))
    assert "in nats per token, that of the policy before a step to the policy after it; the KL coefficient" in text
    assert "for 75 steps (" in text and "100 steps were planned." in text
    assert "planned" not in of_run(TrainConfig(steps=75))


def test_one_is_singular() -> None:
    config = TrainConfig(
        steps=1, ppo=PPOConfig(value_warmup_steps=1), run=RunConfig(save_every=1),
        evaluation=EvaluationConfig(eval_sentences=1),
        diversity=DiversityConfig(diversity_weight=1, diversity_window=1),
    )  # fmt: skip
    text = of_run(config, steps=(1,))
    assert (
        "for 1 step (" in text
        and "0 in the first step, in which" in text
        and "over the last compliant sentence" in text
    )
    assert "evaluations of 1 sentence (" in text and "made every step and at the end" in text
    assert not re.search(r"\b1 [a-z]+s\b", text)


def test_a_run_that_has_not_ended_has_a_rule_and_no_step_yet() -> None:
    assert "To be exported: the best of evaluations of 500" in told(PRESETS["varied"], summary={})
    ranked = SUMMARY | {"evaluation": {"rank": 0.5}}
    assert "and at the end, by a function of our own." in told(PRESETS["varied"], summary=ranked)


def test_the_folder_of_a_run_gives_record_and_summary(tmp_path: Path) -> None:
    folder = training_run(tmp_path / "run")
    (folder / "run.json").write_text(json.dumps({"config": PRESETS["bundled-cpu"].document()}))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    run = read_run(folder)
    assert run.task == PROTOCOL
    paragraph = next(p for p in methods_text(example(), [run]) if "the run run" in p)
    assert "Exported: step 50" in paragraph and "PPO epochs 2" in paragraph


def test_a_run_without_a_record_is_not_told_of() -> None:
    assert training_text(TrainingRun("bare", (), {}, (), (), {}), PROTOCOL) == ""


def test_what_an_old_record_does_not_have_is_not_told(tmp_path: Path) -> None:
    text = training_text(read_run(training_run(tmp_path / "run")), PROTOCOL)
    assert (
        text == "The policy of the run run was trained with PPO for 40 steps (prompt describe, learning rate 1e-05, "
        "seed 3)."
    )


def test_the_method_text_claims_nothing_that_the_program_cannot_know() -> None:
    text = " ".join(methods_text(example(), []))
    assert "beforehand" not in text and "We generated" not in text and "not the policy" not in text
    assert "bundled (bundled)" not in text and "The primary measure is strict success" in text


def test_the_method_text_says_how_each_kl_to_the_base_model_was_estimated() -> None:
    evaluation = example()
    kl = evaluation.methods["PPO"].kl
    assert kl is not None
    methods = {
        name: dataclasses.replace(m, kl=dataclasses.replace(kl, note="from weights" if name == "PPO" else "k1"))
        for name, m in evaluation.methods.items()
    }
    text = " ".join(methods_text(dataclasses.replace(evaluation, methods=methods), []))
    assert "These KLs are, of Prompt-Only and Generate-and-Filter, k1; of PPO, from weights." in text


def test_draws_are_told_as_many_as_were_made() -> None:
    """With thousands of occupations fewer draws are made than were asked for."""
    evaluation = example()
    method = evaluation.methods["PPO"]
    many = {str(i): next(iter(method.occupations.values())) for i in range(4000)}
    crowded = dataclasses.replace(evaluation, methods={"PPO": dataclasses.replace(method, occupations=many)})
    assert "Bootstraps have 500 draws" in " ".join(methods_text(crowded, []))
    assert "bootstraps of 500 draws" in " ".join(f.answer for f in findings(crowded))


def test_each_algorithm_is_told_by_its_name_its_paper_and_its_own_options() -> None:
    def of(algorithm: Any, **more: Any) -> str:
        return told(TrainConfig(ppo=PPOConfig(algorithm=algorithm, **more)))

    assert "In PPO" not in of("ppo") and "group" not in of("ppo")
    grpo = of("grpo", num_generations=16)
    assert "was trained with GRPO for 75 steps" in grpo and "group 16, epochs a step 4" in grpo
    assert "In GRPO (Shao et al. 2024, arXiv 2402.03300) the advantage" in grpo and "16 sentences about one" in grpo
    assert "the weight in the loss of a nat per token of KL" in grpo
    rloo = of("rloo")
    assert "In RLOO (Ahmadian et al. 2024, arXiv 2402.14740)" in rloo and "the mean of the 7 others" in rloo
    assert "the price, in reward, of a nat per sentence of KL" in rloo
    plus = of("reinforce++", gamma=0.99)
    assert "In REINFORCE++ (Hu 2025, arXiv 2501.03262)" in plus and "γ 0.99" in plus and "group" not in plus
    for text in (grpo, rloo, plus):
        assert "PPO" not in text and "value" not in text and "λ" not in text and "{" not in text
    assert "γ" not in grpo + rloo
    warmed = TrainConfig(ppo=PPOConfig(algorithm="rloo"), warm_start=FOREIGN.warm_start)
    assert "Before RLOO a supervised warm start" in told(warmed)


def test_a_record_of_before_there_was_a_choice_is_of_ppo() -> None:
    record = json.loads(json.dumps({"config": TrainConfig().document()}))
    del record["config"]["ppo"]["algorithm"], record["config"]["ppo"]["num_generations"]
    old = training_text(TrainingRun("mine", (1, 2, 75), {}, (), (), record, SUMMARY), PROTOCOL)
    assert old == told(TrainConfig()) and "was trained with PPO" in old
