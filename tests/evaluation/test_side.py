"""Side files and reference rows."""

import json
from pathlib import Path

import pytest

from equipoise.errors import UserError
from equipoise.evaluation.catalogue import catalogue
from equipoise.evaluation.reference import STUDY_ROWS, read_reference
from equipoise.evaluation.side import cost, distance, read_side
from equipoise.protocol.task import PROTOCOL

GIVEN = {
    "method": "GF", "seconds": 10.0, "load_seconds": 1.5, "tokens": 1000, "generations": 600, "accepted": 2, "rows": 2,
    "generations_per_accepted": 300.0, "ess": 5.5, "kl": {"value": 5.0, "low": 4.0, "high": 6.0, "how": "exact"},
    "p0": {"value": 0.003, "low": 0.001, "high": 0.01, "n": 600, "event": "strict", "how": "yield"},
}  # fmt: skip


def write(path: Path, **changes: object) -> str:
    path.with_name(path.name + ".costs.json").write_text(json.dumps(GIVEN | changes))
    return str(path)


@pytest.mark.parametrize("name", ["a.csv.costs.json", "a.costs.json"])
def test_a_side_file_is_found_beside_its_file(tmp_path: Path, name: str) -> None:
    assert read_side(str(tmp_path / "a.csv")) is None
    (tmp_path / name).write_text(json.dumps(GIVEN))
    side = read_side(str(tmp_path / "a.csv"))
    assert side is not None and side.kl is not None and side.p0 is not None
    assert (side.method, side.event, side.kl.value, side.kl.note, side.p0.n) == ("GF", "strict", 5.0, "exact", 600)
    assert cost([side]) and cost([side]).generations_per_accepted == 300  # type: ignore[union-attr]


def test_costs_of_a_methods_files_are_added_and_their_distances_averaged(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.csv"), write(tmp_path / "b.csv", accepted=4, generations=600, kl={"value": 7})]
    sides = [s for f in files if (s := read_side(f))]
    total = cost(sides)
    assert total is not None and (total.seconds, total.generations, total.generations_per_accepted) == (20, 1200, 200)
    kl = distance(sides)
    assert kl is not None and kl.value == 6 and kl.low == 0.0 and kl.note.startswith("mean of 2 files")
    assert cost([]) is None and distance([]) is None


@pytest.mark.parametrize(
    "changes",
    [{"seconds": "fast"}, {"kl": 3}, {"p0": {"value": 2}}, {"tokens": -1}, {"p0": {"value": 0.1, "event": 3}}],
)
def test_a_side_file_that_makes_no_sense_is_refused_in_one_line(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"a\.csv\.costs\.json cannot be used") as raised:
        read_side(write(tmp_path / "a.csv", **changes))
    assert "\n" not in str(raised.value)


def test_p0_of_an_event_without_a_name_is_taken_for_none(tmp_path: Path) -> None:
    for given, event in (({}, ""), ({"event": "strict, finished"}, "strict, finished"), ({"event": "both"}, "both")):
        side = read_side(write(tmp_path / "a.csv", p0={"value": 0.1} | given))
        assert side is not None and side.event == event


def test_the_studys_rows_are_the_published_numbers_and_say_when_not_comparable() -> None:
    found = {(r.method, r.metric): r for r in STUDY_ROWS}
    assert found["Ctrl-G (AND), gpt2-large", "study/pairs"].value == 13
    assert found["SFT (LoRA, 750 template sentences)", "study/entropy"].value == 3.284
    assert found["DPO", "study/either"].value == 0.3371
    assert found["prompt-only, GPT-4o", "study/both"].comparable
    for row in STUDY_ROWS:
        assert row.why and row.metric.split("@")[0] in {key.rstrip("@") for key in catalogue(PROTOCOL)}
        assert not (row.comparable and ("ppl" in row.metric or "filter" in row.method or "Ctrl-G" in row.method))


def test_reference_rows_of_a_file_are_read_and_wrong_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "- {method: M, metric: both, value: 0.5, n: 10, comparable: true}\n- {method: M, metric: x, value: 1}\n"
    )
    rows = read_reference(path)
    assert (rows[0].value, rows[0].comparable, rows[0].source) == (0.5, True, "r.yaml")
    assert not rows[1].comparable and rows[1].why
    for bad in (
        "x: 1",
        "- {method: M}",
        "- {method: M, metric: x, value: .nan}",
        "- {method: M, metric: x, value: 1, y: 2}",
        "[",
    ):
        path.write_text(bad)
        with pytest.raises(UserError, match=r"holds no reference rows|line [12]: this is no YAML"):
            read_reference(path)
