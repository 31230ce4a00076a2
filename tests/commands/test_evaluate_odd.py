"""`equipoise evaluate` on degenerate, hostile, empty and wrong input."""

import csv
import json
import math
from pathlib import Path

import pytest

from equipoise.cli import main
from equipoise.evaluation import stored, tables
from equipoise.evaluation.files import FILES
from equipoise.evaluation.page import _inputs
from equipoise.evaluation.paper import methods_text
from tests.commands.completions import COLUMNS, completions, numbers, run
from tests.default import OCCUPATIONS
from tests.evaluation.files import write_csv
from tests.evaluation.test_results import HOSTILE
from tests.tiny import words_folder

DEGENERATE = {
    "one row": [("nurse", "The nurse was bold.")],
    "three rows": [("nurse", "The nurse was bold and caring."), ("pilot", "x"), ("pilot", "")],
    "one occupation": [("nurse", f"The nurse was bold and loyal {i}.") for i in range(9)],
    "nothing compliant": [(o, f"The {o} was here.") for o in OCCUPATIONS for _ in range(3)],
    "all the same": [("nurse", "The nurse was bold and caring.")] * 9,
    "all empty": [("nurse", ""), ("pilot", "")],
    "one class": [(o, f"The {o} was bold.") for o in OCCUPATIONS],
    "two occupations": [("nurse", "The nurse was bold."), ("astronaut", "The astronaut was loyal.")],
}


@pytest.mark.parametrize("a", DEGENERATE)
def test_degenerate_files_give_finite_numbers_or_say_why_not(tmp_path: Path, a: str) -> None:
    files = [
        write_csv(tmp_path / f"{i}.csv", ["occupation", "text", "label"], [[o, t, name] for o, t in DEGENERATE[name]])
        for i, name in enumerate((a, "nothing compliant", "two occupations"))
    ]
    names = [f"{i}={path}" for i, path in enumerate(files)]
    assert run(*names, "--no-fluency", "--output", tmp_path / "out", "--bootstrap-draws", 100) == 0
    text = (tmp_path / "out" / "evaluation.json").read_text()
    assert all(math.isfinite(x) for x in numbers(json.loads(text))) and "NaN" not in text
    evaluation = stored.read(tmp_path / "out")
    assert evaluation.methods["0"].n == len(DEGENERATE[a])
    for method in evaluation.methods.values():
        for key, estimate in method.metrics.items():
            assert estimate.value is not None or estimate.note, key
    for c in evaluation.comparisons:
        assert c.p_sign_flip is not None or "cannot be tested: " in c.note


@pytest.mark.parametrize(
    ("others", "told"),
    [
        (0, "They complete “The [occupation] was”; this beginning counts"),
        (2, "All but 2 of 6 complete “The [occupation] was”; those begin otherwise or are empty."),
        (6, "None of them completes “The [occupation] was”; each counts as it is"),
    ],
)
def test_the_method_text_says_how_many_sentences_begin_with_the_frame(tmp_path: Path, others: int, told: str) -> None:
    texts = ["Nurses are bold.", *(["A nurse was kind."] * 4), "As a nurse, she was kind."][:others]
    texts += ["The nurse was bold and kind."] * (6 - others)
    path = write_csv(tmp_path / "a.csv", ["occupation", "text"], [["nurse", text] for text in texts])
    assert run(path, "--form", "sentence", "--no-fluency", "--output", tmp_path / "out") == 0
    assert told in methods_text(stored.read(tmp_path / "out"), [])[0]


def test_a_method_without_rows_is_not_told_to_be_the_smallest_nor_its_file_to_be_of_sentences(tmp_path: Path) -> None:
    rows = [["nurse", f"The nurse was bold {i}."] for i in range(9)]
    header = ["occupation", "text"]
    files = [write_csv(tmp_path / f"{i}.csv", header, rows[:n]) for i, n in enumerate((0, 4, 9))]
    assert run(*files, "--no-fluency", "--output", tmp_path / "out") == 0
    evaluation = stored.read(tmp_path / "out")
    assert "n = 4, the smallest of those that have sentences" in " ".join(evaluation.notices)
    assert tables.equal_n(evaluation).caption == "At 4 sentences of each method that has any."
    empty, full, _ = _inputs(evaluation).rows
    assert [cell.text for cell in empty[1:4]] == ["0", "–", "text text, occupation occupation"]
    assert [cell.text for cell in full[1:4]] == ["4", "sentence (detected)", "text text, occupation occupation"]


def test_degenerate_texts_survive_a_judge(tmp_path: Path) -> None:
    judge = words_folder(tmp_path / "judge")
    files = []
    for i, name in enumerate(("all empty", "all the same", "three rows")):
        path = write_csv(tmp_path / f"{i}.csv", ["occupation", "text"], DEGENERATE[name])
        files.append(f"{name}={path}")
    assert run(*files, "--judge", judge, "--output", tmp_path / "out", "--bootstrap-draws", 100) == 0
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert all(math.isfinite(x) for x in numbers(document))


@pytest.mark.parametrize("layout", ["csv", "json"])
def test_hostile_texts_come_through_unchanged(tmp_path: Path, layout: str) -> None:
    texts = [t for t in HOSTILE if layout == "json" or t != "\ufeff"]
    if layout == "json":
        path = tmp_path / "a.json"
        path.write_text(json.dumps([{"job": "nurse", "text": f"The nurse was {t}"} for t in texts]))
    else:
        path = tmp_path / "a.csv"
        with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            csv.writer(file).writerows([["job", "text"], *(["nurse", f"The nurse was {t}"] for t in texts)])
    assert run(f"<b>\x1b[31m={path}", "--no-fluency", "--output", tmp_path / "out", "--bootstrap-draws", 100) == 0
    rows = list(stored.read_rows(tmp_path / "out" / "rows.csv"))
    assert [r["Text"] for r in rows] == [f"The nurse was {t}" for t in texts]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no files given"),
        (["none.csv"], "cannot read none.csv"),
        (["A", "--bootstrap-draws", "3"], "between 100 and 100000"),
        (["A", "--margin", "0"], "must be positive"),
        (["A", "--min-words", "9", "--max-words", "3"], "leave no length"),
        (["A", "--task", "none.yaml"], "none.yaml"),
        (["A", "--lexicon", "none.yaml"], "--lexicon has become --task FILE: write the terms into a task file"),
        (["A", "--base", "X"], "--base 'X' is no method"),
        (["A", "A"], "given twice"),
        (["A", "--judge", "./nowhere"], "no model folder"),
        (["A", "--colour"], "--colour"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    path = completions(tmp_path / "a.csv", "A", 4, n=1)
    given = [path if a == "A" else a for a in arguments]
    extra = [] if "--judge" in given else ["--no-fluency"]
    assert run(*given, *extra, "--output", tmp_path / "out") == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert said in error and all(note.startswith("note: ") for note in notes)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_folder_with_files_of_someone_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = completions(tmp_path / "rows.csv", "A", 4, n=1)
    before = Path(path).read_bytes()
    assert run(path, "--no-fluency", "--output", tmp_path) == 2
    assert "not this program's to replace" in capsys.readouterr().err and Path(path).read_bytes() == before
    assert run(path, "--no-fluency", "--output", tmp_path / "out") == 0
    assert run(path, "--no-fluency", "--output", tmp_path / "out") == 0  # its own are
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(FILES)


def test_files_with_hundreds_of_occupations_are_compared(tmp_path: Path) -> None:
    # Two sentences about each: a mixed logit of occupations that always or never succeed takes many seconds.
    words = [(i, word) for i in range(150) for word in ("loyal", "loyal" if i % 3 else "calm")]
    rows = [[f"job {i}", f"The job {i} was bold and {word} at work."] for i, word in words]
    files = [f"{k}={write_csv(tmp_path / f'{k}.csv', ['job', 'text'], rows[2 * k :])}" for k in (0, 4)]
    assert run(*files, "--no-fluency", "--bootstrap-draws", 100, "--output", tmp_path / "out") == 0
    found = {(c.metric): c for c in stored.read(tmp_path / "out").comparisons}
    assert found["strict"].n_occupations == 146 and "cannot be tested" in found["strict"].note
    assert found["strict"].difference == 0


def test_a_file_without_rows_is_a_method_without_numbers_beside_others_and_refused_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = completions(tmp_path / "a.csv", "A", 4, n=2)
    none = write_csv(tmp_path / "gf.csv", COLUMNS, [])
    Path(f"{none}.json").write_text(json.dumps({"settings": {"Label": "Generate-and-Filter"}}))
    options = ["--no-fluency", "--bootstrap-draws", 100]
    assert run(path, none, *options, "--output", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[2].split() == ["Generate-and-Filter", "0", "–", "–", "–"]
    assert f"note: {none}: no rows; its method is shown without numbers" in err.splitlines()
    evaluation = stored.read(tmp_path / "out")
    method = evaluation.methods["Generate-and-Filter"]
    assert method.n == 0 and {e.value for e in method.metrics.values()} == {None} and evaluation.equal_n is None
    assert method.metrics.keys() == evaluation.methods["A"].metrics.keys()
    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "report.html")]) == 0
    assert run(none, *options, "--output", tmp_path / "none") == 2
    assert "gf.csv holds no rows" in capsys.readouterr().err and not (tmp_path / "none" / "rows.csv").exists()
