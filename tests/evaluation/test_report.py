"""`equipoise report` from the command line, and on evaluations that lack nearly everything."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipoise.cli import main
from equipoise.errors import UserError
from equipoise.evaluation import stored
from equipoise.evaluation.assemble import report
from equipoise.evaluation.config import ReportConfig
from equipoise.evaluation.results import Estimate, Evaluation, Method, Parts
from equipoise.policy.card import ModelCard, render
from tests.evaluation.hostile import EXAMPLE, example, training_run, written

pytestmark = pytest.mark.usefixtures("no_pdf")

ROWS: list[dict[str, Any]] = [dict(row) for row in stored.read_rows(EXAMPLE / "rows.csv")]


def test_the_command_writes_page_figures_tables_and_card_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model, output = training_run(tmp_path / "run"), tmp_path / "model", tmp_path / "out" / "page.html"
    model.mkdir()
    (model / "README.md").write_text(render(ModelCard(method="PPO", prompt="describe"), None))
    arguments = ["report", str(EXAMPLE), "--run", str(run), "--card", str(model), "--output", str(output)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"{output}: 3 methods, 120 sentences" in said and f"{model / 'README.md'}: results of PPO" in said
    files = {path.name for path in (tmp_path / "out" / "page_files").iterdir()}
    stems = {"adherence-fluency-bundled", "compliance-kl", "occupations", "pairs-ppo", "pairs-prompt-only",
             "pairs-generate-and-filter", "reward-parts", "lengths", "differences", "training-run"}  # fmt: skip
    texts = {"headline.md", "headline.tex", "headline-wide.tex", "headline.csv", "methods.tex", "references.bib"}
    texts |= {"fairness.md", "fairness.tex"}
    assert files == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg", "pdf", "csv")} | texts | {
        "report.json"
    }
    page = output.read_text(encoding="utf-8")
    assert all(name in page for name in texts) and "as .png, .svg, .pdf and .csv" in page
    assert "## Results" in (model / "README.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["page.html", "page_files"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to report on"),
        (["nowhere"], "nowhere does not exist"),
        ([str(EXAMPLE / "rows.csv"), "PPO=nowhere"], "PPO=nowhere does not exist"),
        ([str(EXAMPLE), str(EXAMPLE / "rows.csv")], "is a folder: give it alone"),
        ([str(EXAMPLE.parent)], "holds neither evaluation.json nor study.json"),
        ([str(EXAMPLE), "--output", "report.csv"], "report.csv is no page: give a name that ends in .html"),
        ([str(EXAMPLE), "--run", "nowhere"], "is no run folder"),
        ([str(EXAMPLE), "--card", "nowhere", "--card-method", "SFT"], "there is no method 'SFT'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def completions(path: Path, sentence: str, label: str) -> Path:
    lines = [f'M,{o},{i},"The {o} was {sentence}",10,{label}' for o in ("nurse", "pilot") for i in range(1, 5)]
    path.write_text("\n".join(["Model,Occupation,RunID,Text,WordCount,Label", *lines]) + "\n")
    return path


def test_a_study_folder_becomes_an_evaluation_and_a_report_in_one_command(tmp_path: Path) -> None:
    study, run = tmp_path / "study", training_run(tmp_path / "trained")
    study.mkdir()
    completions(study / "prompt-only.csv", "proud of the work that was done every day.", "Prompt-Only")
    ours = completions(study / "ppo.csv", "bold and caring in the work done every day.", "RLHF")
    completions(study / "gen-filter.raw.csv", "tired of the work done every day.", "Generate-and-Filter")
    Path(f"{ours}.costs.json").write_text('{"method": "PPO", "seconds": 12.5, "kl": {"value": 6.1}}')
    entries = {
        "prompt-only": {"completions": "prompt-only.csv", "status": "done"},
        "gen-filter": {"completions": "gen-filter.csv", "raw": "gen-filter.raw.csv", "status": "stopped"},
        "ppo": {"completions": "ppo.csv", "status": "done"},
        "sft": {"status": "failed: no memory"},
    }
    Path(f"{ours}.json").write_text('{"settings": {"seed": 0}, "made_with": [{"command": "generate_rlhf.py --n 4"}]}')
    record = {"settings": {"trained": str(run), "seed": 7}, "methods": entries}
    (study / "study.json").write_text(json.dumps(record))
    report(ReportConfig((str(study),), tmp_path / "report.html", fluency=False), lambda line: None)
    evaluation = stored.read(tmp_path / "report_files" / "evaluation")
    strict = {name: m.metrics["strict"].value for name, m in evaluation.methods.items()}
    assert strict == {"Prompt-Only": 0, "RLHF": 1}  # what the filter has not passed is no method's
    cost = evaluation.methods["RLHF"].cost
    assert cost is not None and cost.seconds == 12.5
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "RLHF complies most: 100 %" in page and "The study: methods, commands, models" in page
    assert "Training run trained" in page and "generate_rlhf.py --n 4" in page
    assert "method gen-filter (stopped): run" in page and "method sft (failed: no memory): run" in page


def test_completions_files_are_evaluated_first(tmp_path: Path) -> None:
    first = completions(tmp_path / "a.csv", "proud of the work that was done every day.", "Prompt-Only")
    second = completions(tmp_path / "b.csv", "bold and caring in the work done every day.", "RLHF")
    report(ReportConfig((str(first), f"mine={second}"), tmp_path / "report.html", fluency=False), lambda line: None)
    assert list(stored.read(tmp_path / "report_files" / "evaluation").methods) == ["Prompt-Only", "mine"]


def test_a_study_without_completions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"methods": {"PPO": {"completions": "ppo.csv"}}}')
    with pytest.raises(UserError, match="names no completions file that exists"):
        report(ReportConfig((str(tmp_path),), tmp_path / "report.html"))


def test_somebody_elses_page_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>mine</p>")
    with pytest.raises(UserError, match="no report of equipoise"):
        report(ReportConfig((str(EXAMPLE),), tmp_path / "index.html"))
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_an_output_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .* choose another --output"):
        report(ReportConfig((str(EXAMPLE),), tmp_path / "file" / "report.html"))


def only(name: str, evaluation: Evaluation) -> Evaluation:
    frontier = evaluation.frontier
    return dataclasses.replace(
        evaluation,
        methods={name: evaluation.methods[name]},
        comparisons=(),
        frontier=dataclasses.replace(
            frontier,
            points=tuple(p for p in frontier.points if p.method == name),
            pareto=tuple(p for p in frontier.pareto if p.method == name),
        ),
    )


def without_judge(evaluation: Evaluation) -> Evaluation:
    def known(metrics: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in metrics.items() if not key.startswith("nll")}

    return dataclasses.replace(
        evaluation,
        judges=(),
        metrics=known(evaluation.metrics),
        methods={
            name: dataclasses.replace(
                m, metrics=known(m.metrics), occupations={o: known(v) for o, v in m.occupations.items()}
            )
            for name, m in evaluation.methods.items()
        },
        comparisons=tuple(c for c in evaluation.comparisons if not c.metric.startswith("nll")),
        frontier=dataclasses.replace(evaluation.frontier, pareto=()),
    )


def without_base(evaluation: Evaluation) -> Evaluation:
    points = tuple(dataclasses.replace(p, kl=None, bound=None, excess=None) for p in evaluation.frontier.points)
    return dataclasses.replace(
        evaluation,
        methods={name: dataclasses.replace(m, kl=None, cost=None) for name, m in evaluation.methods.items()},
        frontier=dataclasses.replace(evaluation.frontier, p0=None, p0_source="nothing gives p0", points=points),
        reference=(),
    )


def nothing_compliant(evaluation: Evaluation) -> Evaluation:
    none = Estimate(0.0, 0.0, 0.09, 40, "two-level", (0.0, 0.09))
    no_pairs = Estimate(None, note="no row holds both classes")

    def poor(m: Method) -> Method:
        metrics = m.metrics | {"strict": none, "both": none, "pairs/unique": no_pairs, "pairs/effective": no_pairs}
        return dataclasses.replace(m, metrics=metrics, pairs=((0,) * 10,) * 10)

    frontier = evaluation.frontier
    points = tuple(
        dataclasses.replace(p, compliance=none, bound=Estimate(None, 0.0, None), excess=None) for p in frontier.points
    )
    return dataclasses.replace(
        evaluation,
        methods={name: poor(m) for name, m in evaluation.methods.items()},
        frontier=dataclasses.replace(frontier, p0=Estimate(0.0, 0.0, 0.001, 2560, "wilson"), points=points),
    )


def one_method_empty(evaluation: Evaluation) -> Evaluation:
    """The last method has a file without rows."""
    missing = Estimate(None, note="no rows")
    name, last = list(evaluation.methods.items())[-1]
    empty = dataclasses.replace(
        last, n=0, metrics=dict.fromkeys(last.metrics, missing), occupations={}, lengths=(), pairs=((0,) * 10,) * 10,
        parts=Parts(0.0, 0.0, 0.0, 0.0, 0.0), kl=None, seeds=(),
    )  # fmt: skip
    frontier = evaluation.frontier
    return dataclasses.replace(
        evaluation,
        methods=evaluation.methods | {name: empty},
        comparisons=tuple(
            dataclasses.replace(
                c, difference=None, low=None, high=None, p_sign_flip=None, p_wilcoxon=None, p_holm=None, cohens_h=None,
                cliffs_delta=None, tost=None, n_occupations=0, note="no common occupation",
            )
            if name in (c.a, c.b) else c
            for c in evaluation.comparisons
        ),
        frontier=dataclasses.replace(
            frontier,
            points=tuple(
                dataclasses.replace(p, compliance=missing, kl=None, bound=None, excess=None) if p.method == name else p
                for p in frontier.points
            ),
            pareto=tuple(p for p in frontier.pareto if p.method != name),
        ),
    )  # fmt: skip


def everything_missing(evaluation: Evaluation) -> Evaluation:
    return without_judge(without_base(one_method_empty(only("PPO", evaluation))))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda e: only("PPO", e), ["There is one method only", "Comparisons and the front: give completions"]),
        (without_judge, ["There is no front: no judge measured fluency", "Fluency: evaluate with a judge"]),
        (
            without_base,
            [
                "Not known: nothing tells how often the base model complies",
                "The bound on KL: nothing gives p0",
                "No completions",
            ],
        ),
        (nothing_compliant, ["None: of 120 sentences not one", "No sentence of this method holds terms of both"]),
        (one_method_empty, ["Sentences of PPO: the file has no rows", "not tested"]),
        (everything_missing, ["No method has a sentence, so nothing can be said", "There is nothing to compare"]),
    ],
    ids=["one method", "no judge", "no base", "nothing compliant", "a method without rows", "everything missing"],
)
def test_a_degenerate_evaluation_gives_a_report_that_says_what_is_missing(
    changed: Callable[[Evaluation], Evaluation], told: list[str], tmp_path: Path
) -> None:
    evaluation = changed(example())
    rows = [row for row in ROWS if row["Method"] in evaluation.methods and evaluation.methods[row["Method"]].n]
    report(ReportConfig((str(written(tmp_path / "in", evaluation, rows)),), tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    words = " ".join(re.sub(r"<[^>]+>", "", page).split())
    for text in told:
        assert text in words, text
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b(?! of|: of)", re.sub(r"(?s)<script.*?</script>", "", words))


@pytest.mark.parametrize("name", ["headline.md", "lengths.png", "report.json", "evaluation/rows.csv"])
def test_somebody_elses_files_in_the_folder_of_figures_are_left_alone(tmp_path: Path, name: str) -> None:
    rows = tmp_path / "a.csv"
    rows.write_text("Occupation,Text\nnurse,The nurse was bold and caring in all of her work.\n")
    mine = tmp_path / "report_files" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="is there and"):
        report(ReportConfig((str(rows),), tmp_path / "report.html", fluency=False), lambda line: None)
    assert mine.read_text() == "mine" and not (tmp_path / "report.html").exists()


def test_a_report_replaces_its_own_files_and_one_of_before_they_were_listed(tmp_path: Path) -> None:
    config = ReportConfig((str(EXAMPLE),), tmp_path / "report.html")
    report(config, lambda line: None)
    (tmp_path / "report_files" / "lengths.svg").write_text("old")
    (tmp_path / "report_files" / "report.json").unlink()
    for path in (tmp_path / "report_files").iterdir():
        if path.suffix in (".pdf", ".bib"):  # which that version did not write
            path.unlink()
    report(config, lambda line: None)
    assert (tmp_path / "report_files" / "lengths.svg").read_text() != "old"


def test_nothing_is_written_through_a_link_in_the_folder_of_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = completions(tmp_path / "a.csv", "bold and kind.", "ppo")
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / "r_files").mkdir()
    (tmp_path / "r_files" / "evaluation").symlink_to(mine)
    assert main(["report", str(file), "--no-fluency", "--output", str(tmp_path / "r.html")]) == 2
    assert "r_files/evaluation is a link, and nothing is written through one" in capsys.readouterr().err
    assert not list(mine.iterdir()) and not (tmp_path / "r.html").exists()
