"""What a KL is spent on, from two costs files to the page."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import frontier
from equipoise.cli import main
from equipoise.errors import UserError
from equipoise.evaluation import stored
from equipoise.evaluation.frontier import base_pairs
from equipoise.evaluation.side import read_side
from equipoise.evaluation.spent import parts_of, spent_plots, table
from equipoise.measures.decomposition import read_rates

A, B, C = ["bold", "caring"], ["decisive", "loyal"], ["ambitious", "helpful"]
pytestmark = pytest.mark.usefixtures("no_pdf")

RATES = {
    "event": "strict",
    "pairs": [{"pair": A, "value": 3e-4, "variance": 1e-10}, {"pair": B, "value": 1e-4, "variance": 1e-10}],
    "unseen": 1e-5,
    "n": 5000,
}
# Eight sentences: four with the first pair, two with the second, one with a third that was never seen, one that fails.
OUTCOMES = [
    {"pair": A, "n": 4, "mean": 9.0, "variance": 1.0},
    {"pair": B, "n": 2, "mean": 9.5, "variance": 0.5},
    {"pair": C, "n": 1, "mean": 12.0, "variance": 0.0},
    {"pair": None, "n": 1, "mean": 1.0, "variance": 0.0},
]


def completions(path: Path, sentence: str, label: str, costs: dict[str, Any]) -> Path:
    lines = [f'M,{o},{i},"The {o} was {sentence}",10,{label}' for o in ("nurse", "pilot") for i in range(1, 5)]
    path.write_text("\n".join(["Model,Occupation,RunID,Text,WordCount,Label", *lines]) + "\n")
    path.with_name(path.name + ".costs.json").write_text(json.dumps(costs))
    return path


def study(where: Path) -> tuple[Path, Path]:
    all_alike = [{"pair": A, "n": 8, "mean": 8.5, "variance": 1.0}]
    guided = completions(
        where / "ctrlg.csv", "bold and caring in the work done every day.", "Ctrl-G",
        {"method": "ctrlg", "pair_rates": RATES, "outcomes": {"strict": all_alike}},
    )  # fmt: skip
    ours = completions(
        where / "ppo.csv", "bold and caring in the work done every day.", "RLHF",
        {"method": "ppo", "kl": {"value": 8.5, "low": 8.0, "high": 9.0}, "outcomes": {"strict": OUTCOMES, "both": []}},
    )  # fmt: skip
    return guided, ours


def test_the_parts_by_hand_in_evaluation_report_and_csv(tmp_path: Path) -> None:
    guided, ours = study(tmp_path)
    output = tmp_path / "page.html"
    assert main(["report", str(guided), str(ours), "--output", str(output)]) == 0
    evaluation = stored.read(tmp_path / "page_files" / "evaluation")
    parts = parts_of(evaluation)["RLHF"]
    assert parts.share == 7 / 8 and parts.unseen == pytest.approx(1 / 7)
    assert parts.kl.value == pytest.approx((4 * 9.0 + 2 * 9.5 + 12.0 + 1.0) / 8)
    bound = sum(m * math.log(m / p) for m, p in ((4 / 8, 3e-4), (2 / 8, 1e-4), (1 / 8, 1e-5), (1 / 8, 1 - 4e-4)))
    # Less the biases: of A half Σ q·variance/A², of q (3 pairs − 1)/16, and of 1 − p0 next to nothing.
    bound -= (4 / 8 * 1e-10 / 9e-8 + 2 / 8 * 1e-10 / 1e-8) / 2 + 2 / 16
    assert parts.waste.value == pytest.approx(parts.kl.value - bound, abs=1e-6)
    sum_of = sum(e.value or 0.0 for e in (parts.compliance, parts.variety, parts.waste))
    assert sum_of == pytest.approx(parts.kl.value)
    entropy = -sum(m / 7 * math.log(m / 7) for m in (4, 2, 1))
    assert parts.effective_pairs == pytest.approx(math.exp(entropy))
    assert evaluation.frontier.pairs_event == "strict"
    assert evaluation.frontier.least_variety[-1][0] == pytest.approx(2.0)

    page = output.read_text(encoding="utf-8")
    assert (
        "What the KL is spent on" in page
        and "importance weights of 5,000 sentences, in the costs file of Ctrl-G" in page
    )
    rows = (tmp_path / "page_files" / "variety-kl.csv").read_text().splitlines()
    assert rows[0].startswith("series,effective,beyond_compliance,variety,waste")
    assert {line.split(",")[0] for line in rows[1:]} == {"Ctrl-G", "RLHF", "least"}
    (plot,) = spent_plots(evaluation)
    assert f"RLHF {parts.waste.value:.2f}" in plot.alt


def test_without_the_pairs_of_the_base_model_nothing_is_split(tmp_path: Path) -> None:
    _, ours = study(tmp_path)
    assert main(["evaluate", str(ours), "--output", str(tmp_path / "e")]) == 0
    evaluation = stored.read(tmp_path / "e")
    assert parts_of(evaluation) == {} and table(evaluation) is None and list(spent_plots(evaluation)) == []
    assert "no costs file tells" in evaluation.frontier.pairs_source


def test_the_event_that_is_asked_for_comes_first_and_then_the_most_sentences(tmp_path: Path) -> None:
    guided, _ = study(tmp_path)
    side = read_side(str(guided))
    assert side is not None
    more = {"strict": side.pair_rates["strict"]._replace(n=6000)}
    other = {"both": side.pair_rates["strict"]._replace(n=10)}
    sides = {"X": [side], "Y": [side.__class__("Y", {}, None, None, "", {}, more)]}
    assert base_pairs("strict", sides)[2].endswith("of Y") and base_pairs("both", sides)[1] == "strict"
    sides["Z"] = [side.__class__("Z", {}, None, None, "", {}, other)]
    assert base_pairs("both", sides)[1:] == ("both", "importance weights of 10 sentences, in the costs file of Z")


@pytest.mark.parametrize(
    ("member", "value", "said"),
    [
        ("outcomes", {"strict": [{"pair": A, "n": 0, "mean": 1.0, "variance": 0.0}]}, "counts of 1 or more"),
        ("outcomes", {"strict": 7}, "no outcomes of sentences"),
        ("outcomes", 7, "outcomes is 7, expected an object"),
        ("pair_rates", RATES | {"pairs": [{"pair": A, "value": 2.0, "variance": 0.0}]}, "between 1e-100 and 1"),
        ("pair_rates", RATES | {"unseen": 0}, "an upper limit for others"),
    ],
)
def test_a_damaged_record_is_told_in_one_line(tmp_path: Path, member: str, value: Any, said: str) -> None:
    path = completions(tmp_path / "a.csv", "bold.", "X", {"method": "x", member: value})
    with pytest.raises(UserError, match=f"cannot be used .*{said}"):
        read_side(str(path))


@pytest.mark.parametrize(
    ("given", "says"),
    [("nowhere.csv", "there is no"), ("frontier.csv", "nothing of waste is known"), ("", "no run in")],
)
def test_the_frontier_that_cannot_be_drawn_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str, says: str
) -> None:
    docs = Path(__file__).parents[2] / "docs"
    monkeypatch.setattr("sys.argv", ["frontier.py", str(docs / given), "--waste", str(tmp_path / "w.svg")])
    with pytest.raises(SystemExit) as ended:
        frontier.main()
    assert ended.value.code == 2 and says in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_run_with_rates_of_its_own_is_split_by_them_unless_others_are_given() -> None:
    measures = {"kl": 10.0, "kl_compliance": 8.4, "kl_variety": 0.1, "kl_waste": 1.5}
    summary = {"final": measures, "outcomes": OUTCOMES}
    assert frontier.spent(summary, None) == {"compliance": 8.4, "variety": 0.1, "waste": 1.5}
    assert frontier.spent({"final": {"kl": 10.0}}, None) == {}
    rates = read_rates(RATES)
    split = frontier.spent(summary, rates)
    assert list(split) == list(frontier.SPENT) and split["compliance"] != 8.4
    assert frontier.spent({"final": measures}, rates) == {}


def test_rates_given_to_the_table_of_a_sweep_without_outcomes_add_what_no_run_can_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs' own parts have no interval of the waste, and runs without a target have no parts."""
    measures = dict.fromkeys(frontier.MEASURES, 0.9)
    for name, parts in (("near-0", {"kl_compliance": 8.4, "kl_variety": 0.1, "kl_waste": 1.5}), ("plain-0", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({"steps": 9, "final": measures | parts}))
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps(RATES))

    def run(*given: object) -> None:
        monkeypatch.setattr("sys.argv", ["frontier.py", *map(str, given)])
        frontier.main()

    run(tmp_path, "--output", tmp_path / "own")
    assert (tmp_path / "own.csv").read_text().splitlines()[0].endswith("kl,compliance,variety,waste")
    run(tmp_path / "own.csv", "--pairs", rates, "--waste", tmp_path / "w.svg")
    run(tmp_path, "--pairs", rates, "--output", tmp_path / "given")
    assert "| near | 1 |" in capsys.readouterr().out and (tmp_path / "w.svg").is_file()
    assert (tmp_path / "given.csv").read_text().splitlines()[-1].startswith("least,")
