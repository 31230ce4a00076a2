"""Data frames in and out: the numbers of the command line on the same sentences, one-line refusals, figures."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

import equipoise
from equipoise.cli import main
from equipoise.evaluation.plots import draw
from equipoise.evaluation.stored import read

ENDS = ("confident and caring at work every day", "bold and loyal, and so kind to all of us", "confident.", "kind",
        "decisive, caring and helpful with each of them.")  # fmt: skip


def sentences() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"Label": method, "Occupation": name, "RunID": run, "Text": f"The {name} was {ENDS[(run * step) % 5]}."}
            for step, method in enumerate(("PPO", "Base"), 2)
            for name in ("nurse", "pilot", "chef")
            for run in range(6)
        ]
    )


def test_the_numbers_are_those_of_the_command_on_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    sentences().to_csv(path, index=False)
    options = ["--no-fluency", "--bootstrap-draws", "200", "--max-words", "12", "--base", "Base"]
    assert main(["evaluate", str(path), *options, "--output", str(tmp_path / "cli")]) == 0
    result = equipoise.evaluate(pd.read_csv(path), fluency=False, bootstrap_draws=200, max_words=12, base="Base")
    written = {name: pd.read_csv(tmp_path / f"cli/{name}.csv", keep_default_na=False) for name in TABLES}
    for name, expected in written.items():
        ours = pd.read_csv(io.StringIO(getattr(result, name).to_csv(index=False)), keep_default_na=False)
        pd.testing.assert_frame_equal(ours.drop(columns="File", errors="ignore"),
                                      expected.drop(columns="File", errors="ignore"))  # fmt: skip
    by = written["methods"].set_index(["Method", "Metric"])
    for method, row in result.headline.iterrows():
        assert row["strict"] == float(by.loc[(method, "strict"), "Value"])
        assert row["strict_low"] == float(by.loc[(method, "strict"), "Low"])
    assert list(result.headline["n"]) == [18, 18]
    from_file = equipoise.evaluate(path, fluency=False, bootstrap_draws=200, max_words=12, base="Base")
    assert from_file.evaluation.methods == read(tmp_path / "cli").methods


TABLES = ("rows", "methods", "occupations", "comparisons")


def test_what_is_saved_is_an_evaluation_that_a_report_can_be_made_of(tmp_path: Path) -> None:
    result = equipoise.evaluate(sentences(), fluency=False, bootstrap_draws=100)
    result.save(tmp_path / "made")
    assert read(tmp_path / "made") == result.evaluation
    assert main(["report", str(tmp_path / "made"), "--output", str(tmp_path / "page.html")]) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other/rows.csv").write_text("mine")
    with pytest.raises(equipoise.UserError, match="did not write it"):
        result.save(tmp_path / "other")


def test_a_mapping_names_the_methods_of_frames_and_files(tmp_path: Path) -> None:
    parts = {name: own.drop(columns="Label") for name, own in sentences().groupby("Label")}
    parts["Base"].to_csv(tmp_path / "base.csv", index=False)
    mixed = equipoise.evaluate({"Base": tmp_path / "base.csv", "PPO": parts["PPO"]}, fluency=False, bootstrap_draws=100)
    whole = equipoise.evaluate(sentences(), fluency=False, bootstrap_draws=100)
    pd.testing.assert_frame_equal(mixed.headline.loc[["PPO", "Base"]], whole.headline)


def test_levels_of_the_index_and_of_the_columns_are_columns() -> None:
    plain = equipoise.evaluate(sentences(), fluency=False, bootstrap_draws=100).headline
    grouped = sentences().set_index(["Label", "Occupation"])
    glued = pd.concat({name: own.drop(columns="Label") for name, own in sentences().groupby("Label", sort=False)})
    nested = sentences().drop(columns="Label").assign(Method=sentences()["Label"].astype("category"))
    nested.columns = pd.MultiIndex.from_product([["out"], nested.columns])
    for frame in (grouped, glued, nested):
        found = equipoise.evaluate(frame, fluency=False, bootstrap_draws=100).headline
        pd.testing.assert_frame_equal(found, plain)


def test_scores_are_those_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [*sentences()["Text"], "She was “bold” and caring", ""]
    for text in texts:
        assert main(["score", "--json", "--bonus-per-term", "0.2", "--", text]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for given_ in (texts, tuple(texts), pd.Series(texts), pd.DataFrame({"n": range(len(texts)), "answer": texts})):
        with pytest.warns(UserWarning, match="1 with no text"):
            assert equipoise.score(given_, bonus_per_term=0.2).to_dict("records") == expected
    assert equipoise.score(texts[0], bonus_per_term=0.2).to_dict("records") == expected[:1]


def test_continuations_beside_occupations_get_the_frame_and_rows_keep_their_index() -> None:
    whole = sentences()
    bare = whole.assign(
        Text=[t.removeprefix(f"The {o} was") for o, t in zip(whole.Occupation, whole.Text, strict=True)]
    )
    bare.index = bare.index[::-1] * 7
    scored = equipoise.score(bare)
    assert list(scored["text"]) == list(whole["Text"]) and list(scored.index) == list(bare.index)
    rows = equipoise.evaluate(bare, fluency=False, bootstrap_draws=100).rows
    assert list(scored["reward"]) == list(rows["Reward"]) and list(scored["strict"]) == list(rows["Strict"] == 1)


@pytest.mark.parametrize(("gone", "dtype"), [(None, object), (np.nan, object), (pd.NA, object), (pd.NaT, object),
                                             (None, "string"), (np.nan, "str"), (None, "category")])  # fmt: skip
def test_missing_texts_count_as_empty_ones_in_every_spelling_of_pandas(gone: object, dtype: str) -> None:
    texts = pd.Series(["The nurse was caring.", gone, "The nurse was bold."], dtype=object).astype(dtype)
    frame = pd.DataFrame({"occupation": "nurse", "text": texts, "run_id": pd.array([7, None, 9], dtype="Int64")})
    with pytest.warns(UserWarning, match="1 row has no text"):
        assert list(equipoise.score(frame)["reward"]) == [0.2, -0.3, 0.2]
    rows = equipoise.evaluate(frame, fluency=False, bootstrap_draws=100).rows
    assert list(rows["Reward"]) == [0.2, -0.3, 0.2] and list(rows["RunID"]) == ["7", "", "9"]


def test_texts_may_be_bytes_and_numbers_numpys() -> None:
    """Bytes that are UTF-8 are the text that they spell; what JSON has no form for in a column beside is no matter."""
    given = sentences().rename(columns={"Text": "text", "Occupation": "occupation"})[["occupation", "text"]]
    odd = [{("a", 1): 2}, np.arange(3), HELD, b"\xff", {1, 2}, 1j, np.float32(1)]
    cells = pd.Series([odd[i % len(odd)] for i in range(len(given))], dtype=object)
    as_bytes = given.assign(**{name: given[name].str.encode("utf-8") for name in given}, more=cells)
    pd.testing.assert_frame_equal(equipoise.score(as_bytes), equipoise.score(given))
    rows = [equipoise.evaluate(frame, fluency=False, bootstrap_draws=np.int64(100)).rows for frame in (as_bytes, given)]
    pd.testing.assert_frame_equal(*rows)
    text = np.array("The nurse was bold in the busy emergency room.")
    for one in (np.float32(0.5), np.float64(0.5), np.int64(1)):
        assert list(equipoise.score(text, base_one=one)["reward"]) == [float(one)]


def test_a_frame_without_rows_has_no_scores_and_no_evaluation() -> None:
    empty = sentences().iloc[:0]
    assert equipoise.score(empty).empty and list(equipoise.score(empty)) == list(equipoise.score("x"))
    with pytest.raises(equipoise.UserError, match="holds no rows"):
        equipoise.evaluate(empty, fluency=False)


def test_another_task_is_a_task_a_file_or_a_packaged_name(tmp_path: Path) -> None:
    text, name = "The nurse is skilled and warm.", "competence-warmth"
    path = tmp_path / "mine.yaml"
    path.write_bytes(equipoise.packaged_tasks()[name].read_bytes())
    scored = [equipoise.score(text, task=task) for task in (equipoise.read_task(name), path, str(path), name)]
    assert all(each.equals(scored[0]) for each in scored) and "reward" in scored[0] and "agentic" not in scored[0]


class Other:
    """Another library's table, which goes through its columns where texts are looked for."""

    def __iter__(self) -> Iterator[str]:
        return iter(("text", "occupation"))

    def to_pandas(self) -> pd.DataFrame:
        return sentences()


FRAME = sentences()
HELD: list[object] = []
HELD.append(HELD)  # a list that holds itself
WRONG = {
    "evaluate was given a value of the type int: give pandas' data frame": lambda: equipoise.evaluate(3),
    "with a value of the type list under 'a'": lambda: equipoise.evaluate({"a": []}),
    "no option 'fluencyy'; did you mean 'fluency'?": lambda: equipoise.evaluate(FRAME, fluencyy=False),
    "no option 'task_file'": lambda: equipoise.evaluate(FRAME, task_file="x"),
    "form='x' does not fit: expected one of 'auto'": lambda: equipoise.evaluate(FRAME, form="x"),
    "margin='x' does not fit: expected float": lambda: equipoise.evaluate(FRAME, margin="x"),
    "seed=True does not fit: expected int": lambda: equipoise.evaluate(FRAME, seed=True),
    "no column 'zz' for text_column": lambda: equipoise.score(FRAME, text_column="zz"),
    "no column 'zz' for occupation_column": lambda: equipoise.evaluate(FRAME, occupation_column="zz"),
    "say it with occupation_column": lambda: equipoise.evaluate(pd.DataFrame({"text": ["so kind"]})),
    "form='sentence' or form='continuation'": lambda: equipoise.score(
        pd.DataFrame({"occupation": ["nurse", "chef"], "text": ["Is kind or so.", "Was there."]})
    ),
    "score was given a value of the type dict": lambda: equipoise.score({"a": 1}),
    "text 2 is a value of the type dict": lambda: equipoise.score(["x", {"text": "y"}]),
    "; its to_pandas() makes one": lambda: equipoise.score(Other()),
    "no option 'base_on'; did you mean 'base_one'?": lambda: equipoise.score(FRAME, base_on=1),
    "base_one='1' does not fit": lambda: equipoise.score(FRAME, base_one="1"),
    "the task is a value of the type int": lambda: equipoise.score(FRAME, task=3),
    "there is no task 'no-such'": lambda: equipoise.score(FRAME, task="no-such"),
    "cannot read gone.csv": lambda: equipoise.evaluate("gone.csv"),
    "text_column=1 does not fit: expected str": lambda: equipoise.score(FRAME, text_column=1),
    "evaluate was given an empty mapping": lambda: equipoise.evaluate({}),
    "stand within JSON": lambda: equipoise.score(FRAME.assign(text=[HELD] * len(FRAME)), text_column="text"),
    "bootstrap_draws 5 must lie between": lambda: equipoise.evaluate(FRAME, bootstrap_draws=5),
}


@pytest.mark.parametrize("said", WRONG)
def test_bad_input_is_one_line_in_the_words_of_python(said: str) -> None:
    with pytest.raises(equipoise.UserError) as caught:
        WRONG[said]()
    message = str(caught.value)
    assert said in message and "\n" not in message and "--" not in message


def test_figures_are_those_of_a_report_and_ones_own_to_change(tmp_path: Path) -> None:
    result = equipoise.evaluate(sentences(), fluency=False, bootstrap_draws=100)
    drawn, again = result.figures(), result.figures()
    assert {"occupations", "pairs-ppo", "lengths", "differences", "compliance-kl"} <= {*drawn}
    for name, figure in drawn.items():
        assert isinstance(figure, Figure) and figure is not again[name]
    drawn["lengths"].savefig(tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    from equipoise.evaluation.figures import figures

    plot = next(p for p in figures(result.evaluation) if p.name == "lengths")
    axes = again["lengths"].axes[0]
    assert axes.get_xlabel() and axes.get_xlabel() in draw(plot).svg


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_any_texts_score_as_the_task_scores_them(texts: list[str]) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rewards = equipoise.score(texts)["reward"]
    gone = {"nan", "none", "null", "<na>", "n/a"}  # what marks a missing text
    expected = [equipoise.PROTOCOL.score("" if text.strip().lower() in gone else text).reward for text in texts]
    assert list(rewards) == expected


def test_the_package_is_imported_without_any_library_and_has_what_it_lists() -> None:
    code = (
        "import sys; before = {*sys.modules}; import equipoise; "
        "print({name.partition('.')[0] for name in {*sys.modules} - before} - {*sys.stdlib_module_names})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'equipoise'}\n"
    assert all(hasattr(equipoise, name) for name in equipoise.__all__)
    assert {*equipoise.__all__} <= {*dir(equipoise)}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = equipoise.trian  # type: ignore[attr-defined]
