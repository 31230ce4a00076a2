"""`equipoise evaluate` from files to files."""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from equipoise.cli import main
from equipoise.evaluation import results, stored, tables
from equipoise.evaluation.files import FILES
from equipoise.evaluation.page import _inputs
from equipoise.evaluation.paper import methods_text
from equipoise.runs.locks import FolderLock
from tests.default import AGENTIC, COMMUNAL, OCCUPATIONS
from tests.evaluation.files import write_csv
from tests.evaluation.test_results import HOSTILE
from tests.tiny import words_folder

COLUMNS = ["Model", "Occupation", "RunID", "Text", "WordCount", "Label"]


def completions(path: Path, label: str, compliant: int, n: int = 10) -> str:
    """Of n sentences for each occupation the first `compliant` are strict successes."""
    rows = []
    for o, occupation in enumerate(OCCUPATIONS):
        for i in range(1, n + 1):
            k = o * n + i
            terms = f"{AGENTIC[k % 10]} and {COMMUNAL[k // 3 % 10]}" if i <= compliant + o % 2 else "calm and quick"
            text = f"The {occupation} was {terms} at work with number {k} ."
            rows.append(["tiny", occupation, i, text, len(text.split()), label])
    return write_csv(path, COLUMNS, rows)


def run(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, results.Evaluation]:
    folder = tmp_path_factory.mktemp("three")
    judge = words_folder(folder / "judge")
    files = [
        completions(folder / "base.csv", "Prompt-Only", 0),
        completions(folder / "gf.csv", "Generate-and-Filter", 9),
        completions(folder / "ppo.csv", "RLHF", 7, n=12),
    ]
    (folder / "gf.csv.costs.json").write_text(
        json.dumps(
            {"method": "Generate-and-Filter", "seconds": 5, "generations": 900, "accepted": 200, "kl": {"value": 4.0}}
        )
    )
    assert run(*files, "--judge", judge, "--output", folder / "out", "--device", "cpu", "--bootstrap-draws", 200) == 0
    return folder / "out", stored.read(folder / "out")


def numbers(document: Any) -> Iterator[float]:
    if isinstance(document, dict):
        for value in document.values():
            yield from numbers(value)
    elif isinstance(document, list):
        for value in document:
            yield from numbers(value)
    elif isinstance(document, float):
        yield document


def test_three_methods_are_measured_and_compared(three: tuple[Path, results.Evaluation]) -> None:
    _, evaluation = three
    assert list(evaluation.methods) == ["Prompt-Only", "Generate-and-Filter", "RLHF"]
    assert [m.n for m in evaluation.methods.values()] == [200, 200, 240] and evaluation.equal_n == 200
    strict = {name: m.metrics["strict"].value for name, m in evaluation.methods.items()}
    assert strict == pytest.approx({"Prompt-Only": 10 / 200, "Generate-and-Filter": 190 / 200, "RLHF": 150 / 240})
    found = {(c.metric, c.a, c.b): c for c in evaluation.comparisons}
    strict_gap = found["strict", "Generate-and-Filter", "Prompt-Only"]
    assert strict_gap.difference == pytest.approx(0.9) and strict_gap.p_sign_flip == 2.0**-19
    assert strict_gap.p_holm == pytest.approx(3 * 2.0**-19) and strict_gap.n_occupations == 20
    assert strict_gap.low is not None and strict_gap.high is not None and strict_gap.low <= 0.9 <= strict_gap.high
    assert found["nll/median@judge", "RLHF", "Prompt-Only"].tost is not None and strict_gap.tost is None
    assert "unequal n: 240 and 200" in found["strict", "RLHF", "Prompt-Only"].note
    cost = evaluation.methods["Generate-and-Filter"].cost
    assert cost is not None and cost.generations_per_accepted == 4.5
    assert evaluation.frontier.p0 is not None and evaluation.frontier.p0_source.startswith(
        "200 rows of Prompt-Only, taken for the untrained model"
    )
    points = {p.method: p for p in evaluation.frontier.points}
    assert points["Generate-and-Filter"].excess is not None and points["RLHF"].excess is None
    assert len(evaluation.frontier.pareto) == 3 and all(p.support is not None for p in evaluation.frontier.pareto)
    assert evaluation.reference and {j.name for j in evaluation.judges} == {"judge"}


def test_no_file_holds_a_number_that_is_none(three: tuple[Path, results.Evaluation]) -> None:
    folder, _ = three
    assert all(math.isfinite(x) for x in numbers(json.loads((folder / "evaluation.json").read_text())))
    for name in ("rows", "methods", "occupations", "comparisons"):
        assert "nan" not in (folder / f"{name}.csv").read_text().lower().split(",")


def test_every_key_is_in_the_catalogue_of_the_file(three: tuple[Path, results.Evaluation]) -> None:
    _, evaluation = three
    for method in evaluation.methods.values():
        assert method.metrics.keys() == evaluation.metrics.keys()
        assert method.equal_n.keys() <= evaluation.metrics.keys()
        for found in method.occupations.values():
            assert found.keys() <= evaluation.metrics.keys()
    assert {c.metric for c in evaluation.comparisons} <= evaluation.metrics.keys()


def test_rows_csv_has_each_row_with_its_parts(three: tuple[Path, results.Evaluation]) -> None:
    folder, evaluation = three
    rows = list(stored.read_rows(folder / "rows.csv"))
    assert tuple(rows[0]) == (*results.row_columns(["agentic", "communal"]), "NLL@judge", "Tokens@judge")
    assert len(rows) == 640 and [r["Line"] for r in rows[:2]] == ["1", "2"]
    for name, method in evaluation.methods.items():
        own = [r for r in rows if r["Method"] == name]
        assert sum(r["Strict"] == "1" for r in own) == round((method.metrics["strict"].value or 0) * method.n)
        total = sum(float(r["Base"]) + float(r["Bonus"]) + float(r["LengthPenalty"]) for r in own) / method.n
        assert total + method.parts.repetition_penalty == pytest.approx(method.parts.reward)


def test_the_same_command_gives_the_same_numbers(tmp_path: Path) -> None:
    path = completions(tmp_path / "a.csv", "A", 4)
    files = []
    for i in range(2):
        assert run(path, "--no-fluency", "--output", tmp_path / str(i), "--bootstrap-draws", 100) == 0
        document = json.loads((tmp_path / str(i) / "evaluation.json").read_text())
        files.append({k: v for k, v in document.items() if k not in ("provenance", "settings")})
    assert files[0] == files[1]


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


def test_its_own_rows_can_be_read_again(tmp_path: Path) -> None:
    path = completions(tmp_path / "a.csv", "A", 4)
    assert run(path, "--no-fluency", "--output", tmp_path / "1", "--bootstrap-draws", 100) == 0
    assert run(tmp_path / "1" / "rows.csv", "--no-fluency", "--output", tmp_path / "2", "--bootstrap-draws", 100) == 0
    first, second = (stored.read(tmp_path / name).methods["A"] for name in "12")
    assert first.metrics == second.metrics


def test_another_lexicon_and_other_bounds_are_used(tmp_path: Path) -> None:
    classes = "classes: {agentic: [tough], communal: [warm, soft]}"
    (tmp_path / "l.yaml").write_text(f"name: other\noccupations: [nurse]\n{classes}\n")
    path = write_csv(tmp_path / "a.csv", ["job", "text"], [["nurse", "The nurse was tough and warm."]])
    options = ["--task", tmp_path / "l.yaml", "--min-words", 6, "--max-words", 6]
    assert run(path, *options, "--no-fluency", "--output", tmp_path / "out") == 0
    method = stored.read(tmp_path / "out").methods["a"]
    assert method.metrics["strict"].value == 1 and method.pairs == ((1, 0),)


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


def test_the_table_goes_to_standard_output_and_notes_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(completions(tmp_path / "a.csv", "A", 4), "--no-fluency", "--output", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == [
        "method",
        "n",
        "strict",
        "success",
        "%",
        "unique",
        "pairs",
        "effective",
        "pairs",
    ]
    assert "45.0 [" in out.splitlines()[1] and "read as sentence (detected)" in err


def test_without_fluency_no_model_library_is_loaded(tmp_path: Path) -> None:
    path = completions(tmp_path / "a.csv", "A", 4)
    code = (
        "import sys; from equipoise.cli import main; assert main(sys.argv[1:]) == 0; "
        "assert not {'torch', 'transformers'} & {m.partition('.')[0] for m in sys.modules}"
    )
    arguments = ["evaluate", path, "--no-fluency", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment, capture_output=True)


def test_a_folder_with_files_of_someone_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = completions(tmp_path / "rows.csv", "A", 4, n=1)
    before = Path(path).read_bytes()
    assert run(path, "--no-fluency", "--output", tmp_path) == 2
    assert "not this program's to replace" in capsys.readouterr().err and Path(path).read_bytes() == before
    assert run(path, "--no-fluency", "--output", tmp_path / "out") == 0
    assert run(path, "--no-fluency", "--output", tmp_path / "out") == 0  # its own are
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(FILES)


def test_files_with_hundreds_of_occupations_are_compared(tmp_path: Path) -> None:
    rows = [[f"job {i}", f"The job {i} was bold and {'loyal' if i % 3 else 'calm'} at work."] for i in range(150)]
    files = [f"{k}={write_csv(tmp_path / f'{k}.csv', ['job', 'text'], rows[k:])}" for k in (0, 4)]
    assert run(*files, "--no-fluency", "--output", tmp_path / "out") == 0
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


def test_what_was_found_in_a_file_stands_in_the_first_lines_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [["nurse", "The nurse was bold."], ["", ""], ["nurse", "The nurse was kind."], ["job", "text"]]
    path = write_csv(tmp_path / "a.csv", ["job", "text"], rows)
    assert run(path, "--no-fluency", "--bootstrap-draws", 100, "--output", tmp_path / "out") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        f"note: {path}: 2 rows, texts in 'text' read as sentence (detected), occupations in 'job'; --text-column, "
        "--occupation-column, --method-column and --form decide otherwise",
        f"note: {path}: 1 row is blank; not counted as sentences (line 3)",
        f"note: {path}: 1 row is the header once more; not counted as sentences (line 5)",
    ]
    assert len(lines) == len(set(lines)) and stored.read(tmp_path / "out").methods["a"].n == 2


def seeded(path: Path, method: str, seed: int, rows: int = 20) -> str:
    texts = [["tiny", o, 1, f"The {o} was bold and kind .", method, seed] for o in OCCUPATIONS[:rows]]
    return write_csv(path, ["Model", "Occupation", "RunID", "Text", "Method", "Seed"], texts)


def test_files_of_one_method_are_pooled_with_a_word_and_refused_where_they_are_of_one_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = seeded(tmp_path / "a.csv", "gen-filter", 0), seeded(tmp_path / "a.raw.csv", "gen-filter", 0, 9)
    assert run(first, second, "--no-fluency", "--output", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"{first} and {second} both hold the method 'gen-filter' with seed 0: leave one out" in said
    remedy = said.strip().rpartition("such as ")[2]
    assert run(first, remedy, "--no-fluency", "--output", tmp_path / "out") == 0
    assert {name: m.n for name, m in stored.read(tmp_path / "out").methods.items()} == {"gen-filter": 20, "a.raw": 9}
    other = seeded(tmp_path / "b.csv", "gen-filter", 1)
    assert run(first, other, "--no-fluency", "--output", tmp_path / "out") == 0
    evaluation = stored.read(tmp_path / "out")
    assert evaluation.methods["gen-filter"].n == 40
    assert any("rows of 2 files" in line and "'gen-filter' and are pooled" in line for line in evaluation.notices)


def test_a_base_without_sentences_is_said_to_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, empty = seeded(tmp_path / "full.csv", "ppo", 0), seeded(tmp_path / "empty.csv", "gf", 0, 0)
    assert run(full, empty, "--base", "empty", "--no-fluency", "--output", tmp_path / "out") == 2
    assert "--base 'empty' has no sentences to compare with: there are 'ppo'" in capsys.readouterr().err


def test_an_evaluation_and_a_report_keep_other_processes_out_of_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, page = seeded(tmp_path / "a.csv", "ppo", 0), tmp_path / "out", tmp_path / "r.html"
    out.mkdir()
    with FolderLock(out, "x"):
        assert run(file, "--no-fluency", "--output", out) == 2
    assert f"another process is writing to {out}: wait for it" in capsys.readouterr().err and not list(out.iterdir())
    folder = tmp_path / "r_files"
    folder.mkdir()
    with FolderLock(folder, "x"):
        assert main(["report", file, "--no-fluency", "--output", str(page)]) == 2
    assert f"another process is writing a report to {folder}: wait for it" in capsys.readouterr().err
    assert not page.exists() and not list(folder.iterdir())
    new = tmp_path / "new"
    assert run(tmp_path / "none.csv", "--output", new) == 2 and not new.exists()


def test_the_columns_of_a_file_without_rows_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write_csv(tmp_path / "empty.csv", ["Occupation", "Text", "mood"], [])
    assert run(empty, "--no-fluency", "--output", tmp_path / "out") == 2
    assert "holds no rows, only the columns 'Occupation', 'Text', 'mood': give" in capsys.readouterr().err
    full = seeded(tmp_path / "full.csv", "ppo", 0)
    assert run(full, empty, "--no-fluency", "--output", tmp_path / "out") == 0
    line = _inputs(stored.read(tmp_path / "out")).rows[1]
    assert [cell.text for cell in line[1:4]] == ["0", "–", "text Text, occupation Occupation"]
