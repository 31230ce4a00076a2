"""`equipoise evaluate` from files to files."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.cli import main
from equipoise.evaluation import results, stored
from equipoise.evaluation.page import _inputs
from equipoise.runs.locks import FolderLock
from tests.commands.completions import completions, numbers, run
from tests.default import OCCUPATIONS
from tests.evaluation.files import write_csv
from tests.tiny import words_folder


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
