"""A training run's records are read as they lie on disk, and the curve of least KL is the inequality's."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest

from equipoise.errors import UserError
from equipoise.evaluation.curves import frontier_plot, training_plots
from equipoise.evaluation.runs import Alert, read_run, read_runs, smoothed
from equipoise.measures.shares import kl_bound
from tests.evaluation.hostile import example, training_run


def test_a_run_is_read_with_its_gaps_alerts_and_events(tmp_path: Path) -> None:
    run = read_run(training_run(tmp_path / "run"))
    assert run.steps == tuple(range(1, 41))  # the forty-first line is cut short
    assert run.curves["ppo/entropy"][6] is None and run.curves["ppo/entropy"][0] == 2 - 1 / 40
    assert [(a.step, a.name, a.evidence) for a in run.alerts] == [
        (9, "one-class plateau", "compliance/one 0.61"),
        (30, "term collapse", "4 pairs"),
    ]
    assert run.events == ((20, "resume"),)
    assert run.path("compliance/both")[-1] == (40, 10.0, 0.9)
    assert run.record["config"]["seed"] == 3


def test_alerts_of_one_name_are_one_sign_from_its_first_step_to_its_last(tmp_path: Path) -> None:
    run = read_run(training_run(tmp_path / "run"))
    alerts = tuple(Alert(step, name, "", "") for step, name in ((9, "b"), (2, "a"), (5, "a"), (7, "a")))
    signs = dataclasses.replace(run, alerts=alerts).signs
    assert [(alert.step, alert.name, times, last) for alert, times, last in signs] == [(2, "a", 3, 7), (9, "b", 1, 9)]


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder: training_metrics\.csv"):
        read_run(tmp_path)
    (tmp_path / "training_metrics.csv").write_text("name,value\n")
    with pytest.raises(UserError, match="first column is not `step`"):
        read_run(tmp_path)


def test_a_run_that_has_just_begun_has_no_steps(tmp_path: Path) -> None:
    (tmp_path / "training_metrics.csv").write_text("")
    with pytest.raises(UserError):
        read_run(tmp_path)
    (tmp_path / "training_metrics.csv").write_text("step,kl/ref\n")
    assert read_run(tmp_path).steps == ()


def test_runs_of_the_same_name_are_told_apart_and_a_run_named_twice_is_read_once(tmp_path: Path) -> None:
    folders = [training_run(tmp_path / parent / "run") for parent in ("a", "b")]
    (tmp_path / "c" / "b").mkdir(parents=True)
    folders.append(training_run(tmp_path / "c" / "b" / "run"))
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/run", "b/run", "b/run′"]
    assert [plot.name for plot in training_plots(read_runs(folders))] == [
        "training-a-run", "training-b-run", "training-b-run-2"
    ]  # fmt: skip


def test_smoothing_is_a_centred_mean_that_skips_gaps() -> None:
    assert smoothed([0, 3, None, 6, 9], 3) == [1.5, 1.5, 4.5, 7.5, 7.5]
    assert smoothed([None, None, 1], 1) == [None, None, 1]


def test_least_kl_is_what_the_cheapest_distribution_over_four_sentences_costs() -> None:
    # A base model over four sentences, two of which comply. Any policy with compliance 0.7 on a fine grid:
    base = (0.05, 0.15, 0.5, 0.3)
    grid = [i / 100 for i in range(71)]
    cheapest = math.inf
    for a, c in itertools.product(grid, [i / 100 for i in range(31)]):
        policy = (a, 0.7 - a, c, 0.3 - c)
        if min(policy) >= 0:
            cheapest = min(cheapest, sum(q * math.log(q / p) for q, p in zip(policy, base, strict=True) if q > 0))
    assert kl_bound(0.7, 0.2) == pytest.approx(cheapest, abs=1e-3)
    assert kl_bound(0.7, 0.2) <= cheapest + 1e-12


def test_least_kl_at_the_ends() -> None:
    assert kl_bound(1.0, 0.0035) == pytest.approx(math.log(1 / 0.0035))
    assert kl_bound(0.2, 0.2) == 0
    assert kl_bound(0.5, 0.0) == math.inf
    assert kl_bound(0.0, 0.0) == 0


def test_a_caption_tells_of_no_curve_and_no_distance_that_is_not_drawn() -> None:
    evaluation = example()
    whole = frontier_plot(evaluation, []).caption
    assert "left of the curve kl(c‖p₀)" in whole and whole.endswith("sampling error, or rows cut by top-p.")
    for change in ({"p0": None, "p0_source": "no base"}, {"points": ()}):
        frontier = dataclasses.replace(evaluation.frontier, **change)
        caption = frontier_plot(dataclasses.replace(evaluation, frontier=frontier), []).caption
        assert "left of the curve" not in caption and ("No curve: no base." in caption) == ("p0" in change)


@pytest.mark.parametrize("value", [0.3, -2.0, 1e-6, 0.0])
def test_the_axis_of_a_constant_is_not_one_of_its_rounding(tmp_path: Path, value: float) -> None:
    (tmp_path / "r").mkdir()
    rows = [f"{step},{value * (1 + 1e-9 * (step % 3))!r}" for step in range(1, 30)]
    (tmp_path / "r" / "training_metrics.csv").write_text("\n".join(["step,reward/mean", *rows, ""]))
    (plot,) = training_plots(read_runs([tmp_path / "r"]))
    axes = plot.draw().axes[0]
    low, high = axes.get_ylim()
    assert low < value < high and high - low >= 0.05 * abs(value)


def test_the_figures_file_holds_bound_methods_and_every_step_of_the_path(tmp_path: Path) -> None:
    plot = frontier_plot(example(), [read_run(training_run(tmp_path / "run"))])
    series = [row[0] for row in plot.rows]
    assert series[:3] == ["Prompt-Only", "Generate-and-Filter", "PPO"]
    assert series.count("run run") == 40 and series.count("bound") == 201
    last = next(row for row in plot.rows if row[0] == "bound" and row[2] == 1.0)
    assert last[5] == pytest.approx(math.log(1 / 0.0035))
    assert last[6] < last[5] < last[7]  # the more often the base model complies, the less is needed
