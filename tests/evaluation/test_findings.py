"""The findings in words say what the numbers say, and what a report lacks is named with its remedy."""

import dataclasses

from equipoise.evaluation import findings as words
from equipoise.evaluation.findings import findings, gaps
from equipoise.evaluation.results import Equivalence, Estimate, Evaluation
from tests.evaluation.hostile import example


def answers(evaluation: Evaluation) -> dict[str, str]:
    return {finding.question: finding.answer for finding in findings(evaluation)}


def test_the_best_method_is_named_with_its_interval_and_the_others_behind_it() -> None:
    told = answers(example())["Which method complies most?"]
    assert told.startswith("Generate-and-Filter complies most: 100 % [89.2, 100] of 40 sentences")
    assert told.endswith(
        "PPO reaches 90.0 % [74.9, 98.0] of 40 sentences and Prompt-Only reaches 2.5 % [0, 14.9] of 40 sentences."
    )


def test_a_difference_that_few_occupations_cannot_show_is_not_called_significant() -> None:
    told = answers(example())["Is the difference real?"]
    # The example holds PPO − Generate-and-Filter = −0.1 [−0.2, 0]; it is told the other way round.
    assert "Generate-and-Filter against PPO: +10.0 percentage points (95 % interval 0.0 to +20.0)" in told
    assert "not significant at 0.05 (p = 0.375, Holm-corrected, sign-flips over 4 occupations)" in told
    assert "With 4 occupations no p-value below 0.125 is possible." in told


def test_a_corrected_p_value_below_five_percent_is_called_significant() -> None:
    evaluation = example()
    sure = tuple(dataclasses.replace(c, p_holm=0.0004, note="") for c in evaluation.comparisons)
    told = answers(dataclasses.replace(evaluation, comparisons=sure))["Is the difference real?"]
    assert "the difference is significant at 0.05 (p < 0.001, Holm-corrected" in told


def test_fluency_is_told_for_every_method_and_against_the_prompted_model() -> None:
    told = answers(example())["At what cost in fluency?"]
    assert "PPO 2.88 [2.78, 2.98] (n = 40)" in told
    assert "Difference to Prompt-Only, taken for the untrained model because of its name (" in told
    assert "PPO −0.05 (non-inferior at the margin of 0.3)" in told
    assert "above 0 is less fluent): Generate-and-Filter +0.06" in told


def turned(p_noninferior: float, p_equivalent: float) -> str:
    """What is told of fluency where the evaluation tested the prompted model against the other."""
    evaluation = example()
    comparisons = tuple(
        dataclasses.replace(
            c, a=c.b, b=c.a,
            tost=Equivalence(0.3, p_noninferior, p_equivalent, p_noninferior < 0.05, p_equivalent < 0.05, ""),
        )
        for c in evaluation.comparisons if c.metric.startswith("nll")
    )  # fmt: skip
    return answers(dataclasses.replace(evaluation, comparisons=comparisons))["At what cost in fluency?"]


def test_non_inferiority_is_read_from_the_test_of_the_opposite_difference_only_where_it_follows() -> None:
    # With margin m the opposite test has H0: difference ≤ −m; the larger of both p-values is p_equivalent.
    assert "PPO +0.05 (non-inferior at" in turned(0.01, 0.03)  # both below 0.05
    assert "PPO +0.05 (not shown to be non-inferior at" in turned(0.01, 0.2)  # this one is the larger: 0.2
    assert "inferior" not in turned(0.2, 0.2)  # this one is some p below 0.2


def test_the_distance_above_the_bound_is_told_from_the_nearest_on() -> None:
    told = answers(example())["How far from the optimum?"]
    nearest, far = told.index("Generate-and-Filter 0.0 (5.7"), told.index("PPO 7.0")
    assert nearest < far
    assert "PPO 7.0 (11.8 where its compliance, of 40 sentences, needs 4.8)" in told


def test_where_nothing_complies_the_report_says_so() -> None:
    evaluation = example()
    methods = {
        name: dataclasses.replace(m, metrics=m.metrics | {"strict": Estimate(0.0, 0.0, 0.01, 40)})
        for name, m in evaluation.methods.items()
    }
    told = answers(dataclasses.replace(evaluation, methods=methods))["Which method complies most?"]
    assert told.startswith("None: of 120 sentences not one is a strict success")


def test_a_report_of_everything_lacks_only_the_run() -> None:
    evaluation = example()
    cost = evaluation.methods["Generate-and-Filter"].cost
    full = {name: dataclasses.replace(m, cost=cost) for name, m in evaluation.methods.items()}
    assert [gap.what for gap in gaps(dataclasses.replace(evaluation, methods=full), [])] == [
        "Training curves and the path of training"
    ]


def test_everything_that_is_missing_is_named_with_an_option_or_a_command() -> None:
    evaluation = example()
    (name, method), *_ = evaluation.methods.items()
    bare = dataclasses.replace(
        evaluation,
        judges=(),
        methods={name: dataclasses.replace(method, kl=None, cost=None, n=0)},
        frontier=dataclasses.replace(evaluation.frontier, p0=None, p0_source="no base model's file was given"),
    )
    told = {gap.what: gap.remedy for gap in gaps(bare, [])}
    assert len(told) == 7
    assert "--judge" in told["Fluency"]
    assert "--run" in told["Training curves and the path of training"]
    assert told["The bound on KL"].startswith("no base model's file was given")


def test_the_base_model_is_recognised_by_the_usual_names() -> None:
    evaluation = example()
    assert words.baseline(evaluation, "PPO") == "Prompt-Only"
    renamed = {("prompt-only (study)" if n == "Prompt-Only" else n): m for n, m in evaluation.methods.items()}
    assert words.baseline(dataclasses.replace(evaluation, methods=renamed), "PPO") == "prompt-only (study)"
    assert words.baseline(evaluation, "Prompt-Only") is None
    # Of two that may be it, neither; a name that only begins so is none; what --base named is, and is no guess.
    methods = evaluation.methods
    assert words.baseline(dataclasses.replace(evaluation, methods=methods | {"Base": methods["PPO"]}), "") is None
    sft = {("Baseline-SFT" if n == "Prompt-Only" else n): m for n, m in methods.items()}
    assert words.baseline(dataclasses.replace(evaluation, methods=sft), "") is None
    given = dataclasses.replace(evaluation, settings=evaluation.settings | {"base": "PPO"})
    assert words.baseline(given, "") == "PPO"
    assert "Difference to PPO (above 0" in answers(given)["At what cost in fluency?"]


def with_n(evaluation: Evaluation, **n: int) -> Evaluation:
    names = {name.partition("-")[0]: name for name in evaluation.methods}
    changed = {names[k]: dataclasses.replace(evaluation.methods[names[k]], n=v) for k, v in n.items()}
    return dataclasses.replace(evaluation, methods=evaluation.methods | changed)


def test_a_method_of_four_sentences_is_not_called_the_best() -> None:
    told = answers(with_n(example(), Generate=4))["Which method complies most?"]
    assert told.startswith("PPO complies most: 90.0 % [74.9, 98.0] of 40 sentences are strict successes")
    assert told.endswith(
        "Not ranked, with fewer than 30 sentences: Generate-and-Filter, 100 % [89.2, 100] of 4 sentences."
    )
    told = answers(with_n(example(), Generate=4, PPO=4, Prompt=1))["Which method complies most?"]
    assert told.endswith("2.5 % [0, 14.9] of 1 sentence. No method has 30 sentences, so this order may be chance.")


def test_the_base_model_is_at_no_distance_from_itself_and_nothing_is_0_where_0_is_needed() -> None:
    evaluation = example()
    first, second, third = evaluation.frontier.points
    zero, near = Estimate(0.0), Estimate(0.01, n=40)
    points = (
        dataclasses.replace(first, kl=zero, bound=zero, excess=0.0),
        dataclasses.replace(second, kl=near, bound=zero, excess=0.01),
        dataclasses.replace(third, kl=Estimate(4.5), bound=Estimate(4.8), excess=-0.3),
    )
    frontier = dataclasses.replace(evaluation.frontier, points=points)
    told = answers(dataclasses.replace(evaluation, frontier=frontier))["How far from the optimum?"]
    assert first.method + " 0.0" not in told and "0.0 where" not in told
    assert f"{second.method} 0.0 (it is no farther from the base model than can be told" in told
    assert "Below 0 is sampling error" in told
    assert "the base model's own share of sentences with both classes of terms, 0.35 % [0.16, 0.66] of 2,560" in told


def test_a_judge_is_named_once_and_methods_and_occupations_agree_in_number() -> None:
    told = answers(example())["How was it measured?"]
    assert "bundled (bundled)" not in told and "40 sentences of each of 3 methods about 4 occupations" in told
    evaluation = with_n(example(), PPO=1)
    alone = dataclasses.replace(evaluation, methods={"PPO": evaluation.methods["PPO"]}, settings={})
    told = answers(alone)["How was it measured?"]
    assert told.startswith("1 sentence of 1 method about 4 occupations") and "None" not in told and "seed" not in told


def test_pairs_of_too_few_sentences_have_a_note_in_place_of_an_interval() -> None:
    evaluation = example()
    method = evaluation.methods["PPO"]
    estimate = Estimate(48.4, n=60, note="corrected it is 75.0")
    changed = dataclasses.replace(method, metrics=method.metrics | {"pairs/effective": estimate})
    told = answers(dataclasses.replace(evaluation, methods=evaluation.methods | {"PPO": changed}))
    assert "PPO 48.4 (" in told["At what cost in variety?"]
    assert "of 60 compliant sentences)" in told["At what cost in variety?"]
    assert " Of PPO, corrected it is 75.0." in told["At what cost in variety?"]
