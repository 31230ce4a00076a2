"""Every figure says of how many sentences it is, and nothing in it lies over something else or off its edge."""

import dataclasses
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from equipoise.evaluation.curves import frontier_plot, training_plots
from equipoise.evaluation.figures import MOST_OCCUPATIONS, figures
from equipoise.evaluation.plots import STYLE, Plot, draw
from equipoise.evaluation.results import Estimate, Evaluation, Method
from equipoise.evaluation.runs import TrainingRun, read_run
from equipoise.evaluation.visible import shortened
from tests.evaluation.hostile import example, renamed, training_run


def drawn(plot: Plot) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = plot.draw()
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    return figure


def with_occupations(evaluation: Evaluation, count: int) -> Evaluation:
    """Occupation i succeeds in i of `count` sentences, with every method."""
    own = {f"occupation {i:03}": {"strict": Estimate(i / count, n=count)} for i in range(count)}
    methods: dict[str, Method] = {
        name: dataclasses.replace(m, occupations=own) for name, m in evaluation.methods.items()
    }
    return dataclasses.replace(evaluation, methods=methods)


def crowded() -> Evaluation:
    """Twelve methods whose names are long and differ at their ends."""
    evaluation = example()
    names = [f"A method with a name that is quite long, number {i}" for i in range(12)]
    method = dict(zip(names, itertools.cycle(evaluation.methods.values()), strict=False))
    points = itertools.cycle(evaluation.frontier.points)
    front = itertools.cycle(evaluation.frontier.pareto)
    frontier = dataclasses.replace(
        evaluation.frontier,
        points=tuple(dataclasses.replace(next(points), method=name) for name in names),
        pareto=tuple(dataclasses.replace(next(front), method=name) for name in names),
    )
    return dataclasses.replace(evaluation, methods=method, frontier=frontier)


def every(evaluation: Evaluation, run: TrainingRun) -> Iterator[tuple[Plot, Figure]]:
    for plot in [*figures(evaluation), frontier_plot(evaluation, [run]), *training_plots([run])]:
        yield plot, drawn(plot)


@pytest.fixture
def run(tmp_path: Path) -> TrainingRun:
    found = read_run(training_run(tmp_path / "run"))
    return dataclasses.replace(found, record={"config": {"ppo": {"batch_size": 64}}})


def test_no_legend_lies_over_a_plot_or_is_cut_off(run: TrainingRun) -> None:
    for plot, figure in every(crowded(), run):
        legends = [*figure.legends, *(legend for axes in figure.axes if (legend := axes.get_legend()))]
        for legend in legends:
            box = legend.get_window_extent()
            for axes in figure.axes:
                inside = axes.patch.get_window_extent()
                apart = box.x1 <= inside.x0 + 1 or box.x0 >= inside.x1 - 1 or box.y1 <= inside.y0 + 1
                assert apart or box.y0 >= inside.y1 - 1, plot.name
            assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y0 >= -1, plot.name


def test_on_the_front_no_number_lies_over_another_however_alike_the_methods_are() -> None:
    evaluation = crowded()
    alike = [dataclasses.replace(p, support=i / 20) for i, p in enumerate(evaluation.frontier.pareto)]
    frontier = dataclasses.replace(evaluation.frontier, pareto=tuple(alike))
    plot = next(
        p for p in figures(dataclasses.replace(evaluation, frontier=frontier)) if p.name.startswith("adherence")
    )
    figure = drawn(plot)
    (axes,), (legend,) = figure.axes, figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert len(shown) == 12 and all(text.endswith(f", {5 * i} %") for i, text in enumerate(shown))
    ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    texts = [text for text in figure.findobj(Text) if text.get_text() and text not in ticks and text.get_visible()]
    boxes = [text.get_window_extent() for text in texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


def test_every_pdf_is_of_lines_and_letters_with_its_font_inside_and_the_same_bytes_at_any_time(
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = renamed(example(), lambda old: f"Müller 🙂 \U00020000 שלום $x$ {old}")
    plots = {plot.name: plot for plot in [*figures(strange), *training_plots([run])]}
    kinds = [plots[name] for name in ("occupations", "reward-parts", "training-run")]
    moment = time.time()
    for i, plot in enumerate(kinds):
        pdf = draw(plot).files[f"{plot.name}.pdf"]
        assert isinstance(pdf, bytes)
        assert b"/CreationDate" not in pdf and b"/ModDate" not in pdf
        assert b"/Subtype /Image" not in pdf, plot.name
        assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, which is type 42
        if i == 0:  # more than a year on: neither the file's date nor the font's may show it
            with monkeypatch.context() as later:
                later.setattr(time, "time", lambda: moment + 40_000_000)
                assert draw(plot).files[f"{plot.name}.pdf"] == pdf


def test_every_figure_says_its_n(run: TrainingRun) -> None:
    for plot, figure in every(example(), run):
        texts = " ".join([plot.caption, *(text.get_text() for text in figure.findobj(Text))])
        assert re.search(r"n = \d+\b|\d+ (compliant )?sentence|No sentence of this method", texts), plot.name


def test_forty_occupations_stand_below_each_other_with_room_for_each() -> None:
    plot = next(p for p in figures(with_occupations(example(), 40)) if p.name == "occupations")
    figure = drawn(plot)
    (axes,) = figure.axes
    labels = [label for label in axes.get_yticklabels() if label.get_text()]
    assert len(labels) == 40 and not plot.dense and figure.get_size_inches()[0] < 7
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in itertools.pairwise(boxes))
    assert "A cell is of 40 sentences." in plot.caption and "drawn" not in plot.caption


def test_of_more_occupations_those_that_succeed_least_are_drawn_and_it_is_said() -> None:
    plot = next(p for p in figures(with_occupations(example(), 200)) if p.name == "occupations")
    (axes,) = drawn(plot).axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == [f"occupation {i:03}" for i in range(MOST_OCCUPATIONS)]
    assert f"Of 200 occupations the {MOST_OCCUPATIONS} that succeed least are drawn" in plot.caption
    assert len(plot.rows) == 3 * 200


def test_a_method_of_few_sentences_is_named_as_on_no_front() -> None:
    evaluation = example()
    pareto = [dataclasses.replace(p, member=p.method == "PPO", support=None) for p in evaluation.frontier.pareto]
    pareto = [
        dataclasses.replace(p, adherence=dataclasses.replace(p.adherence, n=4)) if p.method[0] == "G" else p
        for p in pareto
    ]
    frontier = dataclasses.replace(evaluation.frontier, pareto=tuple(pareto))
    plot = next(p for p in figures(dataclasses.replace(evaluation, frontier=frontier)) if "adherence" in p.name)
    assert "With fewer than 30 sentences, Generate-and-Filter cannot be on it." in plot.caption
    before = next(p for p in figures(evaluation) if "adherence" in p.name)
    assert "fewer than" not in before.caption


def test_a_running_mean_is_told_of_only_where_one_is_drawn(run: TrainingRun) -> None:
    short = dataclasses.replace(run, steps=run.steps[:8], curves={k: v[:8] for k, v in run.curves.items()})
    (plot,) = training_plots([short])
    assert (
        plot.caption.startswith("Each value is of one batch of 64 sentences. ") and "running mean" not in plot.caption
    )
    assert ", smoothed" not in frontier_plot(example(), [short]).caption
    long = dataclasses.replace(run, steps=tuple(range(1, 121)), curves={k: v * 3 for k, v in run.curves.items()})
    (plot,) = training_plots([long])
    assert "of one batch of 64 sentences (pale) with a running mean over 5 steps" in plot.caption
    assert "training runs, smoothed, from their batches of 64 sentences" in frontier_plot(example(), [long]).caption


def test_the_distances_of_a_training_run_are_told_apart(run: TrainingRun) -> None:
    (plot,) = training_plots([run])
    assert "that of one update is of the policy before a step to the one after it" in plot.caption
    (single,) = training_plots([dataclasses.replace(run, steps=(1,), curves={k: v[:1] for k, v in run.curves.items()})])
    assert "over 1 step." in single.alt


def test_long_names_stay_different() -> None:
    names = [f"A method with a name that is quite long, number {i}" for i in range(12)]
    assert len({shortened(name, 18) for name in names}) == 12 and {len(shortened(n, 18)) for n in names} == {18}
    assert shortened("short", 18) == "short"
    plots = figures(renamed(example(), lambda old: f"A method with a name that is quite long, of {old}"))
    assert all(p.title for p in plots)


def test_pairs_that_are_equally_common_are_not_told_as_if_one_led() -> None:
    evaluation = example()
    counts = [[0] * 10 for _ in range(10)]
    for i in range(5):
        counts[i][i] = 2
    method = dataclasses.replace(evaluation.methods["PPO"], pairs=tuple(map(tuple, counts)))
    changed = dataclasses.replace(evaluation, methods={"PPO": method})
    plot = next(p for p in figures(changed) if p.name == "pairs-ppo")
    assert "2 of 10 compliant sentences; 4 others occur as often." in plot.caption


def test_a_printed_page_keeps_the_sentences_and_every_column() -> None:
    style = (Path(__file__).parents[2] / "equipoise/evaluation/templates/report.css").read_text()
    printed = style[style.index("@media print") :]
    assert "#samples-table" not in printed and "overflow-wrap: break-word" in printed
    # A sheet is as narrow as some telephones: what makes rows of their tables blocks is for screens.
    assert "@media (max-width" not in style
