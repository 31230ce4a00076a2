"""Other tasks than the default one: three classes, stems, German, occupations of several words, another frame; and one
class. Every number and phrase is that task's."""

import csv
import dataclasses
import html
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.cli import main
from equipoise.errors import UserError
from equipoise.evaluation import pairs, results, stored
from equipoise.evaluation.assemble import report
from equipoise.evaluation.catalogue import catalogue, titled
from equipoise.evaluation.config import EvaluateConfig, ReportConfig
from equipoise.evaluation.curves import frontier_plot
from equipoise.evaluation.diversity import Mask, substrings
from equipoise.evaluation.evaluate import evaluate
from equipoise.evaluation.figures import figures
from equipoise.evaluation.findings import findings
from equipoise.evaluation.inputs import read_inputs
from equipoise.evaluation.modelcard import with_results
from equipoise.evaluation.paper import methods_text
from equipoise.evaluation.results import Evaluation
from equipoise.evaluation.summary import estimates, occupation_estimates
from equipoise.evaluation.tables import excess, headline, study_table
from equipoise.protocol.task import PROTOCOL, Task, task_from_document
from equipoise.tables.layout import Columns, arrange
from equipoise.tables.read import read_table
from tests.evaluation.files import sample, write_csv
from tests.evaluation.hostile import example
from tests.tasks import foreign_task, one_class_task

FOREIGN, ONE = foreign_task(), one_class_task()
pytestmark = pytest.mark.usefixtures("no_pdf")

LETTERS = ("aa", "bb", "cc", "dd")
FOUR = task_from_document(
    {
        "name": "four",
        "occupations": ["nurse", "pilot"],
        "classes": {name: [f"{name}{i}" for i in range(30)] for name in LETTERS},
    },
    "four",
)
GERMAN = [
    ("Ärztin", "Die Ärztin gilt als klug, herzlich und ehrlich."),
    ("Ärztin", "Die Ärztin gilt als kluge, herzliche und ehrliche Frau."),
    ("Ärztin", "Die Ärztin gilt als fähig und klug und fürsorglich."),
    ("Maschinenbauingenieur", "Der Maschinenbauingenieur gilt als entschlossen, hilfsbereit und aufrichtig."),
    ("Kauffrau im Einzelhandel", "Die Kauffrau im Einzelhandel gilt als klug, hilfsbereit und ehrlich."),
    ("Kauffrau im Einzelhandel", "Die Kauffrau im Einzelhandel gilt als pünktlich."),
]


def values(task: Task, texts: Sequence[tuple[str, str]]) -> dict[str, float | None]:
    return {key: e.value for key, e in estimates(sample(texts, task), 4).items()}


def test_three_classes_by_hand() -> None:
    found = values(FOREIGN, GERMAN)
    # Of the second, "herzliche" and "ehrliche" are other words; of the third, honesty is missing; the last holds none.
    assert found["both"] == pytest.approx(3 / 6) and found["either"] == pytest.approx(5 / 6)
    assert found["strict"] == pytest.approx(3 / 6)  # 8, 8 and 10 words, 5 to 12 wanted
    assert found["neither"] == pytest.approx(1 / 6)
    assert found["fähig_any"] == pytest.approx(5 / 6) and found["warm_any"] == pytest.approx(4 / 6)
    assert found["ehrlich_any"] == pytest.approx(3 / 6)
    assert found["fähig_only"] == pytest.approx(1 / 6) and found["warm_only"] == found["ehrlich_only"] == 0
    assert found["stuffed"] == pytest.approx(1 / 6) and found["terms"] == pytest.approx((3 + 1 + 3 + 3 + 3) / 6)
    assert found["fähig_share"] == pytest.approx(6 / 13) and found["ehrlich_share"] == pytest.approx(3 / 13)
    assert found["pairs/unique"] == 3 and found["pairs/effective"] == pytest.approx(3)
    # The public study's matcher also finds terms inside words: herzlich in herzliche, ehrlich in ehrliche.
    assert found["study/both"] == pytest.approx(4 / 6)
    assert found["study/pairs"] == 3 and math.isfinite(found["study/entropy"] or math.nan)
    assert not {"agentic_only", "strict/heldout", "agentic_per_communal"} & found.keys()


def test_one_class_by_hand() -> None:
    texts = [
        ("real estate agent", "Every real estate agent is careful and thorough."),
        ("real estate agent", "Every real estate agent is careful."),
        ("air traffic controller", "Every air traffic controller is well-organised."),
        ("air traffic controller", "Every air traffic controller is tired."),
    ]
    found = values(ONE, texts)
    assert found["both"] == found["either"] == found["strict"] == 0.75 and found["neither"] == 0.25
    assert found["pairs/unique"] == 2 and found["pairs/effective"] == pytest.approx(2 ** (math.log2(3) - 2 / 3))
    assert found["terms"] == 1 and found["stuffed"] == 0.25
    assert not [key for key in found if key.endswith(("_only", "_any", "_share"))]


some_words = st.lists(st.sampled_from([f"{name}{i}" for name in LETTERS for i in (0, 1, 29)]), max_size=8)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["nurse", "pilot"]), some_words), min_size=1, max_size=9))
def test_any_number_of_classes_is_its_slow_definition(texts: list[tuple[str, list[str]]]) -> None:
    found = values(FOUR, [(o, f"The {o} was {' '.join(words)} .") for o, words in texts])
    firsts = [tuple(next((w for w in words if w.startswith(name)), "") for name in LETTERS) for _, words in texts]
    n, complete = len(texts), [first for first in firsts if all(first)]
    assert found["both"] == pytest.approx(len(complete) / n)
    for k, name in enumerate(LETTERS):
        only = [first for first in firsts if first[k] and sum(map(bool, first)) == 1]
        assert found[f"{name}_only"] == pytest.approx(len(only) / n)
    assert found["pairs/unique"] == len(set(complete))
    if complete:
        shares = [c / len(complete) for c in Counter(complete).values()]
        assert found["pairs/effective"] == pytest.approx(2 ** -sum(p * math.log2(p) for p in shares))
    # The study's matcher finds aa2 in aa29 as well.
    of_class = [[{w for own in words for w in {own, own[:3]} if w[:2] == k} for k in LETTERS] for _, words in texts]
    assert found["study/pairs"] == len({c for sets in of_class for c in product(*sets)})


@pytest.mark.parametrize("task", [PROTOCOL, FOREIGN, ONE, FOUR, foreign_task(held_out=["Ärztin"])])
def test_the_estimates_of_any_task_are_its_catalogues(task: Task) -> None:
    name = task.names[0]
    own = sample([(name, f"{task.prefix(name)} {task.lexicon.terms[0].replace('*', 'e')}.")], task)
    assert estimates(own, 1).keys() == titled(task, [], None).keys()
    assert occupation_estimates(own)[name].keys() <= catalogue(task).keys()
    for metric in catalogue(task).values():
        assert task is PROTOCOL or not re.search("agentic|communal|five", metric.title)


def test_the_jackknife_over_millions_of_combinations_has_a_column_for_those_that_occur() -> None:
    texts = [(o, f"The {o} was aa{i} bb{i % 3} cc1 dd{i % 2} .") for o in ("nurse", "pilot") for i in range(9)][:-1]
    own = sample(texts, FOUR)
    assert FOUR.pair_count == 30**4 and own.pair_numbers == 9
    found = estimates(own, 4)["pairs/effective"]
    bits = -8 * 2 / 17 * math.log2(2 / 17) - 1 / 17 * math.log2(1 / 17)  # eight combinations twice, one once
    assert found.value == pytest.approx(2**bits)
    assert found.interval == "jackknife" and (found.low or 9) <= 2**bits <= (found.high or 0)


@pytest.mark.parametrize("task", [PROTOCOL, FOREIGN, ONE])
def test_pairs_are_read_back_as_they_were_counted(task: Task) -> None:
    classes = {name: terms for name, terms in task.classes}
    every = list(product(*classes.values()))
    counted = Counter({every[0]: 2, every[-1]: 5, every[1]: 1})
    table = pairs.table(counted, classes)
    assert pairs.counted(table, classes) == [(every[-1], 5), (every[0], 2), (every[1], 1)]
    assert pairs.total(table, classes) == 8 and pairs.total(pairs.table(Counter(), classes), classes) == 0


def rows_of(path: str, task: Task, form: str = "auto") -> list[tuple[str, str]]:
    rows, _, _ = arrange(read_table(path), 0, task, columns=Columns(), form=form, method=None, seed="")  # type: ignore[arg-type]
    return [(row.occupation, row.measured) for row in rows]


def test_occupations_are_read_from_the_frame_of_the_task(tmp_path: Path) -> None:
    texts = [
        "Die Kauffrau im Einzelhandel gilt als klug.",
        "„die ÄRZTIN gilt  als klug.",
        "Der Dachdecker gilt als klug.",
        "Sie gilt.",
    ]
    found = rows_of(write_csv(tmp_path / "a.csv", ["text"], [[text] for text in texts]), FOREIGN)
    assert [o for o, _ in found] == ["Kauffrau im Einzelhandel", "Ärztin", "Der Dachdecker", "(unknown)"]
    one = rows_of(write_csv(tmp_path / "b.csv", ["text"], [["Every air traffic controller is calm."]]), ONE)
    assert one[0][0] == "air traffic controller"
    with pytest.raises(UserError, match="or begin each text with 'Every X is'"):
        rows_of(write_csv(tmp_path / "c.csv", ["text"], [["The nurse was calm."]]), ONE)


def test_occupations_are_called_by_their_names_whatever_form_a_file_has(tmp_path: Path) -> None:
    given_names = ["ärztin", "die Ärztin", "Die  ÄRZTIN", "der maschinenbauingenieur", "Dachdecker"]
    path = write_csv(tmp_path / "a.csv", ["job", "text"], [[o, "x"] for o in given_names])
    assert [o for o, _ in rows_of(path, FOREIGN)] == ["Ärztin"] * 3 + ["Maschinenbauingenieur", "Dachdecker"]


def test_continuations_get_the_frame_or_the_rest_of_it(tmp_path: Path) -> None:
    ends = [" klug.", "gilt als klug.", ", so heißt es, klug.", "gilt als Alsdann klug."]
    path = write_csv(tmp_path / "a.csv", ["job", "text"], [["Ärztin", end] for end in ends])
    assert [text for _, text in rows_of(path, FOREIGN)] == [
        "Die Ärztin gilt als klug.", "Die Ärztin gilt als klug.", "Die Ärztin gilt als, so heißt es, klug.",
        "Die Ärztin gilt als Alsdann klug.",
    ]  # fmt: skip
    whole = write_csv(tmp_path / "b.csv", ["job", "text"], [["Ärztin", "die Ärztin, heißt es, ist klug."]])
    assert rows_of(whole, FOREIGN)[0][1] == "die Ärztin, heißt es, ist klug."


@pytest.mark.parametrize(
    ("frame", "text", "occupation"),
    [
        ("Why the {occupation}'s day was", "Why the civil engineer's day was long.", "civil engineer"),
        ("We met the {occupation}", "we met the pilot on a bench.", "pilot"),
        ("{occupation}", "Nurse of the year.", "nurse"),
        ("«{occupation}» was", "«the old pilot» was old.", "the old pilot"),
    ],
)
def test_any_frame_tells_its_occupation(frame: str, text: str, occupation: str, tmp_path: Path) -> None:
    document = {"name": "x", "occupations": ["nurse", "pilot"], "classes": {"a": ["bold"]}, "frame": frame}
    task = task_from_document(document, "x")
    assert rows_of(write_csv(tmp_path / "a.csv", ["text"], [[text]]), task) == [(occupation, text)]


def test_a_column_of_the_tasks_own_outcomes_names_no_method(tmp_path: Path) -> None:
    texts = ["Die Ärztin gilt als klug."] * 3
    for labels in (["fähig", "warm", "neither"], ["fähig+warm", "both", "fähig only"]):
        path = write_csv(tmp_path / "a.csv", ["Label", "text"], list(zip(labels, texts, strict=True)))
        rows, _, _ = arrange(read_table(path), 0, FOREIGN, columns=Columns(), form="auto", method=None, seed="")
        assert {row.method for row in rows} == {"a"}


def test_the_mask_tells_classes_apart_and_hides_the_occupation_in_its_form() -> None:
    mask = Mask(FOREIGN)
    text = "Die Kauffrau im Einzelhandel gilt als kluge, ehrlich und fürsorgliche."
    assert mask(text, "Kauffrau im Einzelhandel") == "<x> gilt als <a>, <d> und <c>."


def test_the_studys_matcher_takes_a_stem_for_its_beginning() -> None:
    assert substrings("UNKLUG, Freund", ("klug*", "Freund", "warm")) == (True, True, False)


def recorded(folder: Path, name: str, task: Task, label: str, texts: Sequence[tuple[str, str]]) -> str:
    path = folder / name
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["Occupation", "Text", "Label"], *([o, text, label] for o, text in texts)])
    Path(f"{path}.json").write_text(json.dumps({"settings": {"seed": 5, "task": task.document()}}), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation of two methods on the German task with its source; nothing but the files' records tells it."""
    folder = tmp_path_factory.mktemp("foreign")
    task = foreign_task(sources=["Müller, A., & Maier, B. (2020). Wörter."], labels={"fähig": "kompetent"})
    poor = [(o, f"{task.prefix(o)} pünktlich.") for o, _ in GERMAN]
    files = [recorded(folder, "base.csv", task, "Prompt-Only", poor), recorded(folder, "a.csv", task, "RLHF", GERMAN)]
    assert main(["evaluate", *files, "--no-fluency", "--output", str(folder / "out"), "--bootstrap-draws", "200"]) == 0
    return folder


@pytest.fixture(scope="module")
def evaluation(folder: Path) -> Evaluation:
    return stored.read(folder / "out")


def test_the_whole_task_is_in_the_evaluation_and_comes_from_the_records(evaluation: Evaluation, folder: Path) -> None:
    assert evaluation.task.name == "fähig-warm-ehrlich" and evaluation.task.labels[0] == "kompetent"
    document = json.loads((folder / "out" / "evaluation.json").read_text())
    assert document["settings"]["task"] == evaluation.task.document()
    assert document["lexicon"]["warm"] == ["herzlich", "hilfsbereit", "fürsorg*"]
    assert evaluation.methods["RLHF"].seeds == ("5",)
    assert evaluation.methods["RLHF"].pairs == ((2, 1, 1, 1), (1, 1, 0, 1), (1, 0, 0, 1))


def test_rows_csv_has_a_column_for_each_class_and_says_which_are_there(folder: Path) -> None:
    rows = [row for row in stored.read_rows(folder / "out" / "rows.csv") if row["Method"] == "RLHF"]
    assert tuple(rows[0]) == results.row_columns(["fähig", "warm", "ehrlich"])
    assert tuple(rows[0])[9:13] == ("Fähig", "Warm", "Ehrlich", "Outcome")
    assert [row["Outcome"] for row in rows] == ["both", "fähig", "fähig+warm", "both", "both", "neither"]
    assert (rows[2]["Fähig"], rows[2]["Warm"], rows[2]["Ehrlich"]) == ("fähig;klug*", "fürsorg*", "")


def words_of(page: Path) -> str:
    text = re.sub(r"(?s)<(script|style|svg|pre).*?</\1>", "", page.read_text(encoding="utf-8"))
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", text)).split())


def test_the_report_speaks_of_this_task_only(folder: Path, tmp_path: Path) -> None:
    report(ReportConfig((str(folder / "out"),), tmp_path / "report.html"), lambda line: None)
    text = words_of(tmp_path / "report.html")
    for phrase in (
        "strict successes (terms of all 3 classes, 5 to 12 words, one complete sentence)",
        "Effective term combinations, of 18: RLHF 3",
        "Kompetent terms are bold on blue, warm ones underlined on orange, ehrlich ones italic on green.",
        "They complete “[occupation] gilt als”; this beginning counts towards their length.",
        "There are 3 kompetent terms (fähig, klug*, entschlossen), 3 warm ones (herzlich, hilfsbereit, fürsorg*) and "
        "2 ehrlich ones (ehrlich, aufrichtig), after Müller and Maier (2020).",
        "A term that ends in * counts in every word that begins so.",
        "the grey band is the wanted 5 to 12",
        "kompetent and warm only",
        "No sentence of this method holds terms of all 3 classes.",
        "the numbers published in arXiv 2510.22084 are left out",
    ):
        assert phrase in text, phrase
    text = text.replace("of the task agentic-communal", "")  # whose published numbers are left out
    assert not re.search(r"agentic|communal|Gaucher|8 to 15|of 100\b|The X|both classes|term pairs", text, re.I)
    files = {path.name for path in (tmp_path / "report_files").iterdir()}
    assert {"pairs-rlhf.png", "pairs-prompt-only.csv"} <= files
    head = (tmp_path / "report_files" / "pairs-rlhf.csv").read_text(encoding="utf-8").splitlines()[0]
    assert head == "fähig,warm,ehrlich,rows"


def test_the_page_marks_the_terms_of_every_class_by_number(folder: Path, tmp_path: Path) -> None:
    report(ReportConfig((str(folder / "out"),), tmp_path / "report.html"), lambda line: None)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<mark class="term-2">ehrlich</mark>' in page and '<mark class="term-0">klug</mark>' in page
    data = json.loads(re.search(r'(?s)id="samples-data">(.*?)</script>', page)[1])  # type: ignore[index]
    assert data["outcomes"] == [
        *("strict success", "all, not strict", "kompetent only", "warm only", "ehrlich only"),
        *("kompetent and warm only", "kompetent and ehrlich only", "warm and ehrlich only", "none"),
    ]
    assert {kind for row in data["rows"] for kind in row[-1][2::3]} == {0, 1, 2}


def test_a_report_on_a_task_of_one_class_has_bars_of_terms(tmp_path: Path) -> None:
    texts = [(o, f"Every {o} is {term} at work.") for o in ONE.names for term in ONE.lexicon.terms]
    path = recorded(tmp_path, "a.csv", ONE, "RLHF", texts)
    report(ReportConfig((path,), tmp_path / "report.html", fluency=False), lambda line: None)
    text = words_of(tmp_path / "report.html")
    assert "(a term of the class, 4 to 20 words, one complete sentence)" in text
    assert "Effective terms, of 3: RLHF 3" in text and "The commonest term is" in text
    assert "There are 3 careful terms (careful, thorough, well-organised)." in text
    assert "at least one term, 4 to 20 words, and one complete sentence" in text
    assert not re.search(r"pairs of terms|term pairs|agentic\b(?!-)|Gaucher|both", text)


def test_figures_and_tables_and_card_name_the_classes_of_the_task(evaluation: Evaluation) -> None:
    plots = {plot.name: plot for plot in [*figures(evaluation), frontier_plot(evaluation, [])]}
    assert plots["pairs-rlhf"].alt.startswith("Bars of the term combinations of RLHF. The commonest combination is")
    assert len(plots["pairs-rlhf"].rows) == 3
    assert "Share of sentences with all 3 classes of terms against KL" in plots["compliance-kl"].caption
    assert "all 3 classes, % ↑" in headline(evaluation).heads and excess(evaluation).heads[2] == "all 3 classes, %"
    assert not study_table(evaluation).published
    card = with_results("# A model\n", evaluation, "RLHF", "model")
    assert "unique combinations" in card and "5 to 12 words" in card and "task fähig-warm-ehrlich" in card


def test_the_same_example_with_other_bounds_and_terms_tells_one_truth(tmp_path: Path) -> None:
    document = {key: value for key, value in PROTOCOL.document().items() if key != "prompts"} | {
        "name": "mine", "words": [5, 30], "sources": ["Kay, A. (1999). Mine."], "not_in_source": [],
        "classes": {"agentic": ["bold", "tough"], "communal": ["caring", "soft", "warm"]},
    }  # fmt: skip
    task = task_from_document(document, "mine")
    texts = [(o, f"The {o} was tough and warm with {'very ' * 12}many people.") for o in task.names]
    path = write_csv(tmp_path / "a.csv", ["job", "text"], texts)
    made, _, _ = evaluate(EvaluateConfig((path,), task=task, fluency=False, bootstrap_draws=200))
    text = " ".join([*(finding.answer for finding in findings(made)), *methods_text(made, [])])
    assert text.count("5 to 30 words") == 2 and "of 6: a" in text and "after Kay (1999)" in text
    assert "2 agentic terms (bold, tough) and 3 communal ones" in text
    assert not re.search(r"8 to 15|Gaucher|of 100\b", text)
    assert made.methods["a"].metrics["strict"].value == 1


def test_files_recorded_under_different_tasks_are_refused_with_the_difference(folder: Path, tmp_path: Path) -> None:
    other = recorded(tmp_path, "b.csv", foreign_task(words=[6, 20]), "other", GERMAN)
    files = (str(folder / "a.csv"), other)
    with pytest.raises(UserError, match=r"made under different tasks \(.*words: \[5, 12\] → \[6, 20\].*--task"):
        read_inputs(EvaluateConfig(files, fluency=False))
    inputs = read_inputs(EvaluateConfig(files, fluency=False, task=FOREIGN))
    assert inputs.task == FOREIGN
    assert any("b.csv was made under another task than --task: words: [6, 20] → [5, 12]" in n for n in inputs.notices)


def test_a_file_without_a_record_goes_with_the_others_and_a_record_without_a_task_is_of_the_default(
    folder: Path, tmp_path: Path
) -> None:
    bare = write_csv(tmp_path / "bare.csv", ["job", "text"], GERMAN)
    assert read_inputs(EvaluateConfig((bare, str(folder / "a.csv")))).task.name == "fähig-warm-ehrlich"
    assert read_inputs(EvaluateConfig((bare,))).task == PROTOCOL
    Path(f"{bare}.json").write_text('{"settings": {"seed": 1}}')
    with pytest.raises(UserError, match="made under different tasks"):
        read_inputs(EvaluateConfig((bare, str(folder / "a.csv"))))


def test_bounds_of_the_command_line_are_the_tasks_in_every_record(folder: Path, tmp_path: Path) -> None:
    made, _, _ = evaluate(EvaluateConfig((str(folder / "a.csv"),), fluency=False, max_words=30, bootstrap_draws=100))
    assert made.task.bounds == "5 to 30 words" and made.settings["task"]["words"] == [5, 30]
    assert (made.settings["min_words"], made.settings["max_words"]) == (5, 30)


def test_a_report_by_another_task_than_the_evaluations_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"was measured by another task \(name: "):
        report(ReportConfig((str(folder / "out"),), tmp_path / "report.html", task=ONE))
    assert not list(tmp_path.iterdir())


def test_a_damaged_task_on_record_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recorded(tmp_path, "a.csv", FOREIGN, "x", GERMAN)
    Path(f"{path}.json").write_text('{"settings": {"task": {"name": "x"}}}')
    assert main(["evaluate", path, "--no-fluency", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "a.csv.json" in error and "occupations" in error and error.count("\n") == 1


def test_an_evaluation_of_an_earlier_version_is_of_the_default_task_with_its_bounds() -> None:
    old = example()
    assert "task" not in old.settings and old.task == PROTOCOL
    other = dataclasses.replace(old, settings=old.settings | {"min_words": 5, "max_words": 30})
    assert other.task.bounds == "5 to 30 words"
    with pytest.raises(UserError, match="is of other terms than its task's"):
        stored.from_json(stored.to_json(dataclasses.replace(old, lexicon={"agentic": ("x",), "communal": ("y",)})))
