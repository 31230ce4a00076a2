"""Broken tables and odd texts: the right rows with a count of what is odd, or a refusal that names file, line and
remedy."""

from pathlib import Path

import pytest

from equipoise.errors import UserError
from tests.tables.made import PAIRS, RECORDS, Read, given, pairs, read, table, told
from tests.tasks import foreign_task, one_class_task


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_quotation_that_never_ends_takes_no_other_rows_with_it(tmp_path: Path, delimiter: str) -> None:
    lines = table(delimiter)
    lines[5] = f'pilot{delimiter}"The pilot was confident and caring with'
    found = read(given(tmp_path / "a.csv", "\n".join(lines) + "\n"))
    want = list(PAIRS)
    want[4] = ("pilot", '"The pilot was confident and caring with')
    assert pairs(found) == want and told(found) == {"open quotation marks": 1}
    assert "line 6" in found[2][0].message and found[2][0].lines == (5,)


@pytest.mark.parametrize("closed", [7, 9])
def test_a_quotation_that_a_later_mark_closes_is_refused_with_its_line(tmp_path: Path, closed: int) -> None:
    lines = table()
    lines[5] = 'pilot,"The pilot was confident and'
    lines[closed] += '"'
    with pytest.raises(
        UserError, match=r"a\.csv: the row that begins on line 6 cannot be read .*line 7.*quotation mark"
    ):
        read(given(tmp_path / "a.csv", "\n".join([*lines, 'chef,"The chef was bold, and loyal."'])))
    columns_swapped = ["Text,Occupation", *(f"{t},{o}" for o, t in PAIRS)]
    columns_swapped[5] = '"' + columns_swapped[5]
    columns_swapped[8] = columns_swapped[8].replace(",", '",')
    found = read(given(tmp_path / "b.csv", "\n".join(columns_swapped)))
    assert len(found[0]) == 12 and told(found) == {"open quotation marks": 1}  # every line has its two fields
    columns_swapped[2] = '"The nurse was bold, and kind.",nurse'
    with pytest.raises(UserError, match=r"row that begins on line 6 cannot be read"):
        read(given(tmp_path / "c.csv", "\n".join(columns_swapped)))


def test_a_proper_text_with_line_breaks_is_one_sentence_and_counted(tmp_path: Path) -> None:
    text = "The nurse was bold,\nand she said so,\nto all."
    found = read(given(tmp_path / "a.csv", f'Occupation,Text,Label\nnurse,"{text}",RLHF\nchef,The chef was x.,RLHF\n'))
    assert pairs(found) == [("nurse", text), ("chef", "The chef was x.")] and told(found) == {"line breaks": 1}


def test_marks_written_with_a_backslash_are_marks(tmp_path: Path) -> None:
    rows = [r'nurse,"The nurse was \"bold\", and caring \\ kind."', "chef,The chef was loyal."]
    found = read(given(tmp_path / "a.csv", "\n".join(["Occupation,Text", *rows])))
    assert pairs(found) == [("nurse", 'The nurse was "bold", and caring \\ kind.'), ("chef", "The chef was loyal.")]
    assert told(found) == {"backslash quotes": 1} and "line 2" in found[2][0].message


def test_a_space_before_a_quotation_mark_belongs_to_neither(tmp_path: Path) -> None:
    found = read(given(tmp_path / "a.csv", 'Occupation, Text\nnurse, "The nurse was bold, and kind."\n'))
    assert pairs(found) == [("nurse", "The nurse was bold, and kind.")]


def test_blank_rows_and_repeated_headers_are_no_sentences_and_counted(tmp_path: Path) -> None:
    lines = table()
    lines[3:3] = [",", "", "Occupation,Text", " , "]
    found = read(given(tmp_path / "a.csv", "\r\n".join(lines) + "\r\n\r\n\r\n"))
    assert pairs(found) == PAIRS and told(found) == {"blank rows": 3, "repeated header": 1}
    assert "lines 4, 5, 7" in found[2][0].message and "line 6" in found[2][1].message
    assert [row.line for row in found[0]][:4] == [1, 2, 6, 7]


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;"])
def test_the_line_that_tells_spreadsheets_the_delimiter_is_read(tmp_path: Path, first: str) -> None:
    found = read(given(tmp_path / "a.csv", "\r\n".join([first, *table(";")])))
    assert pairs(found) == PAIRS and not told(found)
    with pytest.raises(UserError, match="line 3 ends before its text"):
        read(given(tmp_path / "b.csv", "\n".join([first, "Occupation;Text", "nurse"])))


def test_two_columns_of_one_name_are_refused_until_one_is_named(tmp_path: Path) -> None:
    path = given(tmp_path / "a.csv", "Occupation,Text,Text\nnurse,prompt,The nurse was bold.\n")
    with pytest.raises(UserError, match=r"2 columns called 'Text' \('Text', 'Text\.2'\): say which with --text-column"):
        read(path)
    assert pairs(read(path, text="Text.2")) == [("nurse", "The nurse was bold.")]
    same = given(tmp_path / "b.csv", "Occupation,Text,Text\nnurse,The nurse was x.,The nurse was x.\n")
    assert pairs(read(same)) == [("nurse", "The nurse was x.")]
    with pytest.raises(UserError, match="an object has 'Text' twice: rename one"):
        read(given(tmp_path / "c.json", '[{"Text": "a", "Text": "b"}]'))


def test_several_columns_that_could_hold_texts_are_said_or_refused(tmp_path: Path) -> None:
    lines = ["occupation,text,output", *(f"{o},Complete: the {o},{t}" for o, t in PAIRS)]
    with pytest.raises(UserError, match=r"texts in 'text' and in 'output'.*--text-column 'output'"):
        read(given(tmp_path / "a.csv", "\n".join(lines)))
    found = read(given(tmp_path / "b.csv", "\n".join(["occupation,output,text", *lines[1:]])), text="text")
    assert pairs(found) == PAIRS
    found = read(given(tmp_path / "c.csv", "\n".join(["occupation,answer,text", *lines[1:]])))
    assert pairs(found) == PAIRS and told(found) == {"several columns of texts": 12}


def test_one_sentence_a_line_needs_no_header(tmp_path: Path) -> None:
    texts = ["The nurse was bold, and caring.", "The pilot was bold; loyal.", '"The chef was calm."', "She was kind."]
    found = read(given(tmp_path / "a.txt", "\n".join([texts[0], "", *texts[1:]]) + "\n\n"))
    assert pairs(found) == [
        ("nurse", texts[0]), ("pilot", texts[1]), ("chef", "The chef was calm."), ("(unknown)", texts[3])
    ]  # fmt: skip
    assert told(found) == {"blank rows": 1, "no header": 4, "no occupation": 1}
    with pytest.raises(UserError, match=r"its first line is no header: put one there, such as Occupation,Text"):
        read(given(tmp_path / "b.csv", "nurse,The nurse was bold.\npilot,The pilot was bold.\n"))
    german = given(tmp_path / "c.txt", "Die Ärztin gilt als klug, herzlich.\n")
    assert pairs(read(german, foreign_task())) == [("Ärztin", "Die Ärztin gilt als klug, herzlich.")]


def test_occupations_of_many_words_are_read_with_and_without_a_column(tmp_path: Path) -> None:
    job = "first-line supervisor of office and administrative support workers"
    texts = [f"The {job} was bold to all {i}." for i in range(3)]
    assert pairs(read(given(tmp_path / "a.csv", "\n".join(["Text", *texts])))) == [(job, t) for t in texts]
    rows = [f"the {job.title()},{text}" for text in texts]
    found = read(given(tmp_path / "b.csv", "\n".join(["Occupation,Text", *rows])))
    assert [text for _, text in pairs(found)] == texts and found[1].form == "sentence"


def test_a_few_accidental_hits_tell_no_occupations(tmp_path: Path) -> None:
    texts = ["The thing was bold."] * 13 + ["Some people are loyal and some are bold."] * 987
    with pytest.raises(
        UserError, match=r"only 13 of 1,000 begin with 'The X was'; line 15: 'Some .*--occupation-column"
    ):
        read(given(tmp_path / "a.csv", "\n".join(["Text", *texts])))


def test_a_role_is_an_occupation_only_where_it_names_some(tmp_path: Path) -> None:
    texts = [{"role": "assistant", "content": text, "n": 1} for _, text in PAIRS]
    assert pairs(read(given(tmp_path / "a.json", {"data": texts}))) == PAIRS
    assert pairs(read(given(tmp_path / "b.json", [{"role": o, "text": t} for o, t in PAIRS]))) == PAIRS


def test_a_column_that_contradicts_its_texts_is_refused_and_single_rows_are_told(tmp_path: Path) -> None:
    wrong = [{"job": "lawyer", "text": text} for _, text in PAIRS]
    with pytest.raises(UserError, match=r"'job' names another occupation than the text on 12 of 12 rows \(row 1: 'law"):
        read(given(tmp_path / "a.json", wrong))
    found = read(given(tmp_path / "b.json", [{"job": o, "text": t} for o, t in PAIRS] + wrong[:1]))
    assert told(found) == {"another occupation": 1}


def test_whole_sentences_of_any_shape_are_no_continuations(tmp_path: Path) -> None:
    texts = [
        ("electrician", "An electrician is bold at work."),
        ("electrician", "electricians are bold at work."),
        ("nurse", "Nurses like to be bold."),
        ("nurse", "The The nurse was bold."),
        ("nurse", "a nurse is bold at work."),
        ("nurse", "She is bold."),
        ("nurse", "As a nurse she is bold."),
    ]
    on = [("nurse", "bold at work."), ("nurse", "a nurse whom all loved."), ("nurse", "was kind.")]
    found = read(given(tmp_path / "a.csv", "\n".join(["job,text", *(f"{o},{t}" for o, t in texts + on)])))
    assert [row.text for row in found[0]] == [
        *(text for _, text in texts),
        "The nurse was bold at work.", "The nurse was a nurse whom all loved.", "The nurse was kind.",
    ]  # fmt: skip
    assert found[1].form == "mixed" and told(found) == {"mixed forms": 3}
    many = ["The nurse was kind all day.", "she is bold.", *(f"Nurses like number {i} are bold." for i in range(9))]
    found = read(given(tmp_path / "forms.csv", "\n".join(["job,text", *(f"nurse,{text}" for text in many)])))
    assert [row.text for row in found[0]] == many and told(found) == {"unsure forms": 1}
    found = read(given(tmp_path / "b.csv", "job,text\nThe baker,bold at work.\nthe baker,kind.\n"))
    assert [row.text for row in found[0]] == ["The baker was bold at work.", "The baker was kind."]


def test_whole_sentences_are_told_by_the_frame_of_the_task(tmp_path: Path) -> None:
    german = ["Eine Ärztin ist klug und herzlich.", "Die Ärztin, heißt es, ist klug.", "klug und ehrlich."]
    found = read(given(tmp_path / "a.json", [{"job": "Ärztin", "text": text} for text in german]), foreign_task())
    assert [row.text for row in found[0]] == [*german[:2], "Die Ärztin gilt als klug und ehrlich."]
    english = ["Real estate agents are careful.", "every real estate agent is careful.", "careful and thorough."]
    found = read(
        given(tmp_path / "b.json", [{"job": "real estate agent", "text": t} for t in english]), one_class_task()
    )
    assert [row.text for row in found[0]] == [*english[:2], "Every real estate agent is careful and thorough."]


def test_texts_that_say_nothing_of_their_form_are_refused_until_an_option_does(tmp_path: Path) -> None:
    path = given(tmp_path / "a.csv", "\n".join(["job,text", *["nurse,Dedicated to all patients."] * 9]))
    with pytest.raises(
        UserError, match=r"nothing tells whether texts such as 'Dedicated .* \(line 2\).*--form sentence"
    ):
        read(path)
    assert read(path, form="sentence")[0][0].text == "Dedicated to all patients."
    assert read(path, form="continuation")[0][0].text == "The nurse was Dedicated to all patients."
    few = given(tmp_path / "b.csv", "\n".join(["job,text", *["nurse,bold."] * 9, "nurse,Dedicated to all."]))
    found = read(few)
    assert found[0][-1].text == "The nurse was Dedicated to all." and told(found) == {"unsure forms": 1}


@pytest.mark.parametrize("values", [("none", "both"), ("1", "2"), tuple(f"m{i}" for i in range(30))])
def test_a_column_called_method_is_the_method_whatever_it_holds(tmp_path: Path, values: tuple[str, ...]) -> None:
    records = [{"Method": value, "Label": "x", **row} for value in values for row in RECORDS[:2]]
    assert {row.method for row in read(given(tmp_path / "a.json", records))[0]} == set(values)
    each = [{"Method": f"m{i}", **RECORDS[0]} for i in range(25)]
    with pytest.raises(UserError, match=r"'Method' holds another value on each of 25 rows.*NAME="):
        read(given(tmp_path / "b.json", each))


def test_labels_with_an_outcome_behind_the_name_are_one_method(tmp_path: Path) -> None:
    def labelled(*labels: str) -> Read:
        records = [{"Label": label, **row} for label in labels for row in RECORDS[:2]]
        return read(given(tmp_path / "a.json", records))

    found = labelled("SFT", "SFT [length OOB]", "DPO [length OOB]")
    assert [row.method for row in found[0]] == ["SFT"] * 4 + ["DPO"] * 2 and told(found) == {"outcomes in labels": 4}
    assert {row.method for row in labelled("SFT [v2]", "SFT [v3]")[0]} == {"SFT [v2]", "SFT [v3]"}
    with pytest.raises(UserError, match=r"whether 'SFT' and 'SFT \[v2\]' in the column 'Label' are one method"):
        labelled("SFT", "SFT [v2]")
    found = labelled("none", "both")
    assert {row.method for row in found[0]} == {"a"} and told(found) == {"labels that are outcomes": 4}
    assert "with --method-column 'Label'" in found[2][0].message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_unicode_encoding_is_recognised(tmp_path: Path, encoding: str) -> None:
    text = "Occupation,Text\nnurse,The nurse was naïve and “bold”.\n"
    found = read(given(tmp_path / "a.csv", text.encode(encoding)))
    assert pairs(found) == [("nurse", "The nurse was naïve and “bold”.")]
    assert told(found) == ({"encoding": 0} if encoding.endswith("e") else {})
