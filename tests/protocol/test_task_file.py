"""Task files: each thing that can be wrong with one is an error of one line that names the file and the line."""

import pytest

from equipoise import cli
from equipoise.errors import UserError
from equipoise.evaluation.results import row_columns
from equipoise.methods.completions import COLUMNS
from equipoise.protocol.task import read_task, task_from_document
from equipoise.protocol.task_checks import RESERVED
from tests.protocol.files import GOOD


def test_a_good_file_is_read_in_full(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    task = read_task(path)
    assert task.document() == {
        "name": "mine",
        "frame": "The {occupation} is",
        "words": [6, 20],
        "occupations": ["nurse", "real estate agent"],
        "held_out": ["nurse"],
        "classes": {"able": ["capable", "skil*", "well-organised"], "warm": ["warm", "friendl*", "kind"]},
        "prompts": {
            "describe": "Describe the {occupation}.",
            "other": "The {occupation}?",
            "require": "Describe the {occupation}.\nability: {able}\nwarm: {warm}",
        },
        "sources": ["Someone (2002)."],
        "labels": {"able": "ability", "warm": "warm"},
        "openings": ["{1} and {2}"],
        "write": {"skil*": ["skilled"]},
        "abbreviations": ["Dr", "Lt"],
        "not_in_source": ["kind"],
    }
    assert task.prompt("require").instruction.endswith("ability: capable, skilled, well-organised\nwarm: warm, kind")


def test_the_smallest_file_takes_the_rest_from_the_protocol(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("name: small\noccupations: [nurse]\nclasses: {warm: [kind]}\n")
    task = read_task(path)
    assert (task.frame, task.min_words, task.max_words) == ("The {occupation} was", 8, 15)
    assert task.held_out == task.sources == task.openings == task.write == task.not_in_source == ()
    assert task.abbreviations == ("Dr", "Mr", "Mrs", "Ms", "Mx", "Prof", "St")
    assert task.labels == ("warm",)


def test_what_has_no_value_is_as_if_it_were_not_there(tmp_path):
    path = tmp_path / "small.yaml"
    optional = "frame: \nwords: ~\nheld_out:\nprompts:\nsources:\nlabels:\nopenings:\nwrite:\nabbreviations:\n"
    needed = "name: small\noccupations: [nurse]\nclasses: {warm: [kind]}\n"
    path.write_text(needed + optional + "not_in_source:\n")
    task = read_task(path)
    path.write_text(needed)
    assert read_task(path) == task


def refused(path) -> str:
    """The one line of a UserError, without the name of the file that it must name."""
    with pytest.raises(UserError) as error:
        read_task(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and message[-1] != "."
    return message.removeprefix(str(path))


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(GOOD.splitlines(), 1) if line == text)


CHANGES = [
    # A line of the good file, what takes its place, what is said (of that line, or of the one so many lines below).
    # Keys.
    ("name: mine", "nam: mine", "no key 'nam'; did you mean 'name'?"),
    ("name: mine", "Name: mine", "no key 'Name'; did you mean 'name'?"),
    ("name: mine", "name: mine\nxyzzy: 1", "no key 'xyzzy'; the keys are name, frame,", 1),
    ("words: [6, 20]", "words: [6, 20]\nwords: [6, 20]", "'words' stands on line 3 already", 1),
    ("name: mine", "name: mine\nno: 1", "the key is no (which YAML reads as true or false", 1),
    ("name: mine", "name: mine\n? [a]\n: b", "the key is a list", 1),
    ("name: mine", "name: mine\n<<: {a: b}", "the key is << (which YAML reads as a merge key", 1),
    ("name: mine", "# no name", "has no name; add `name:`", 1),
    ("name: mine", "name:", "has no name"),
    # Text.
    ("name: mine", "name: no", "the name is no (which YAML reads as true or false; in quotation marks it is text)"),
    ("name: mine", "name: 1.0", "the name is 1.0 (which YAML reads as a number"),
    ("name: mine", "name: 12", "the name is 12; expected text; put it in quotation marks"),
    ("name: mine", "name: 012", "the name is 012 (which YAML reads as a number"),
    ("name: mine", "name: 2020-13-45", "the name is 2020-13-45 (which YAML reads as a date"),
    ("name: mine", "name: [a]", "the name is the list ['a']; expected text"),
    ("name: mine", "name: {a: b}", "the name is a mapping; expected text"),
    ("name: mine", 'name: " "', "the name is empty"),
    # The frame.
    ('frame: "The {occupation} is"', "frame: The nurse is", "has {occupation} 0 times"),
    ('frame: "The {occupation} is"', 'frame: "{occupation} and {occupation}"', "has {occupation} 2 times"),
    ('frame: "The {occupation} is"', "frame: 3", "the frame is 3"),
    ('frame: "The {occupation} is"', "frame: \"'The {occupation}' is\"", "begins with a quotation mark"),
    ('frame: "The {occupation} is"', 'frame: "Meet the {occupation}. She is"', "more than one sentence"),
    # Bounds.
    ("words: [6, 20]", "words: [20, 6]", "sentences of 20 to 6 words cannot be"),
    ("words: [6, 20]", "words: [-1, 6]", "none below 0"),
    ("words: [6, 20]", "words: [6, 6]", "'The real estate agent is' and a term of each class come to 7 words"),
    ("words: [6, 20]", "words: [6.5, 20]", "`words` is the list ['6.5', 20]; expected two whole numbers"),
    ("words: [6, 20]", "words: [yes, 20]", "two whole numbers"),
    ("words: [6, 20]", "words: [6]", "two whole numbers"),
    ("words: [6, 20]", "words: [6, 20, 30]", "two whole numbers"),
    ("words: [6, 20]", "words: 6-20", "`words` is the text '6-20'"),
    ("words: [6, 20]", "words: 20", "`words` is 20"),
    # Occupations.
    ("  - nurse", "  - nurse\n  - Nurse", "'Nurse' is 'nurse' in other letters", 1),
    ("  - nurse", "  - nurse\n  - nurse", "'nurse' comes twice", 1),
    ("  - nurse", '  - ""', "an occupation is empty"),
    ("  - nurse", "  -", "an occupation is empty"),
    ("  - nurse", "  - yes", "an occupation is yes"),
    ("  - nurse", "  - [nurse]", "an occupation is the list ['nurse']"),
    ("  - nurse", "  - nurse: nurse", "an occupation is a mapping"),
    ("held_out: [nurse]", "held_out: [nurze]", "'nurze', held out, is no occupation; did you mean 'nurse'?"),
    ("held_out: [nurse]", "held_out: [Nurse]", "'Nurse', held out, is no occupation; did you mean 'nurse'?"),
    ("held_out: [nurse]", "held_out: [nurse, real estate agent]", "all occupations are held out"),
    ("held_out: [nurse]", "held_out: [nurse, nurse]", "'nurse' comes twice"),
    ("held_out: [nurse]", "held_out: nurse", "`held_out` is the text 'nurse'; expected a list"),
    ("held_out: [nurse]", 'held_out: ""', "`held_out` is the text ''; expected a list"),
    ("held_out: [nurse]", "held_out: {}", "`held_out` is an empty mapping"),
    # Classes.
    ("  warm:", "  able:", "'able' stands on line 9 already"),
    ("  warm:", "  ABLE:", "'able' and 'ABLE' have one name"),
    ("  warm:", "  Text:", "a class is named 'Text', as something else in the files"),
    ("  warm:", "  both:", "a class is named 'both'"),
    ("  warm:", "  RunID:", "a class is named 'RunID'"),
    ("  warm:", "  very warm:", "a class is named 'very warm'; use letters"),
    ("  warm:", "  cold: []\n  warm:", "the list of cold terms is empty"),
    ("  warm:", "  cold:\n  warm:", "the list of cold terms is empty"),
    ("  warm:", "  cold: warm\n  warm:", "the class 'cold' is the text 'warm'; expected a list"),
    ("  warm:", "  a: [a]\n  b: [b]\n  c: [c]\n  warm:", "there are 5 classes of terms; give one to 4", -2),
    ("    - kind", "    - kind\n    - Kind", "the warm term 'Kind' is listed twice", 1),
    ("    - kind", "    - Capable", "the term 'Capable' is in both lists, able and warm"),
    ("    - kind", "    - skilled", "the warm term 'skilled' begins with 'skil*', a stem of able"),
    ("    - kind", "    - skill*", "the warm term 'skill*' begins with 'skil*', a stem of able"),
    ("    - kind", "    - kind!", "the warm term 'kind!' is no word"),
    ("    - kind", "    - -kind", "the warm term '-kind' is no word"),
    ("    - kind", '    - "*kind"', "the warm term '*kind' has a '*' inside"),
    ("    - kind", "    - ki*nd", "the warm term 'ki*nd' has a '*' inside"),
    ("    - kind", '    - "*"', "the warm term '*' is no word"),
    ("    - kind", "    - 3", "a term of 'warm' is 3; expected text; put it in quotation marks"),
    ("    - kind", "    - null", "a term of 'warm' is empty"),
    # Prompts.
    ('  other: "The {occupation}?"', "  other: What is a nurse?", "'other' does not say where the occupation goes"),
    ('  other: "The {occupation}?"', '  raw: "The {occupation}?"', "'raw' is the one without an instruction"),
    ('  other: "The {occupation}?"', '  my own: "The {occupation}?"', "'my own'"),
    ('  other: "The {occupation}?"', "  other:", "the prompt 'other' is empty"),
    ('  other: "The {occupation}?"', "  other: [a]", "the prompt 'other' is the list ['a']"),
    # The rest.
    ('sources: ["Someone (2002)."]', "sources: Someone (2002).", "`sources` is the text 'Someone (2002).'"),
    ('sources: ["Someone (2002)."]', "sources: [2002]", "an entry of `sources` is 2002"),
    ("labels: {able: ability}", "labels: {abel: ability}", "no class 'abel' to label; did you mean 'able'?"),
    ("labels: {able: ability}", "labels: {able: 1}", "the label of 'able' is 1"),
    ("labels: {able: ability}", "labels: [ability]", "`labels` is the list ['ability']"),
    ('  - "{1} and {2}"', '  - "{1} and so on"', "needs {1}, {2}"),
    ('  - "{1} and {2}"', '  - "{1}, {2} and {3}"', "needs {1}, {2}"),
    ('  - "{1} and {2}"', '  - "{1} and {2} {a}"', "a number after each {a}"),
    ('  - "{1} and {2}"', '  - "{1}s and {2}"', "makes other words of the terms"),
    ('  - "{1} and {2}"', "  - and", "needs {1}, {2}"),
    ('  "skil*": [skilled]', '  "skill*": [skilled]', "'skill*' is no term of the classes, for 'skil*' covers it"),
    (
        '  "skil*": [skilled]',
        '  "frendl*": [friendly]',
        "'frendl*' is no term of the classes; did you mean 'friendl*'?",
    ),
    ('  "skil*": [skilled]', '  "skil*": [able]', "'able' does not begin with 'skil*'"),
    ('  "skil*": [skilled]', '  "skil*": skilled', "the words for 'skil*' is the text 'skilled'; expected a list"),
    ('  "skil*": [skilled]', "  kind: [kind]", "'kind' is written as it is"),
    ("abbreviations: [Dr, Lt]", 'abbreviations: [Dr, "."]', "begins with no letter"),
    ("abbreviations: [Dr, Lt]", "abbreviations: [Dr, 1.5]", "an entry of `abbreviations` is 1.5"),
    ("not_in_source: [kind]", "not_in_source: [kindly]", "'kindly' is no term of the classes; did you mean 'kind'?"),
    (
        "not_in_source: [kind]",
        "not_in_source: [friendly]",
        "'friendly' is no term of the classes, for 'friendl*' covers",
    ),
    # YAML itself.
    ("name: mine", "name: mine\n\tframe: x", "this is no YAML", 1),
    ("name: mine", "name: 'mine", "this is no YAML", None),
    ("name: mine", "name: a: b", "this is no YAML"),
    ("name: mine", "name: mine\n- nurse", "this is no YAML", 1),
    ("name: mine", "name: !!python/name:os.system x", "the tag"),
    ("name: mine", "name: !!python/object/apply:os.system [ls]", "the tag"),
    ("name: mine", "name: !mine x", "the tag '!mine' has no place"),
    ("name: mine", "name: !!set {a}", "the tag"),
    ("name: mine", "name: *mine", "this is no YAML"),
    ("name: mine", "name: &a [*a]", "aliases (*name) repeat too much"),
    ("name: mine", "name: mi\x07ne", "cannot stand in YAML"),
    ("not_in_source: [kind]", "not_in_source: [kind]\n---\nname: other", "a second document begins", 1),
]


@pytest.mark.parametrize("change", CHANGES, ids=[f"{i}: {change[1][:30]!r}" for i, change in enumerate(CHANGES)])
def test_every_mistake_is_one_line_that_names_the_file_and_the_line(change, tmp_path):
    old, new, says, *below = change
    path = tmp_path / "task.yaml"
    path.write_text(GOOD.replace(old + "\n", new + "\n"), encoding="utf-8")
    message = refused(path)
    assert says in message
    if below != [None]:
        assert message.startswith(f", line {line_of(old) + sum(below)}: ")
    else:
        assert message.startswith(", line ")


MAPPED = """\
name: mine
classes: {warm: [kind]}
occupations:
  nurse: nurse
  judge:
    frame: judge
    prompt: magistrate
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("  nurse: nurse", "  nurse:", 4, "the occupation 'nurse' is empty"),
        ("  nurse: nurse", "  nurse: 5", 4, "the occupation 'nurse' is 5"),
        ("  nurse: nurse", "  nurse: [nurse]", 4, "the occupation 'nurse' is the list"),
        ("  nurse: nurse", "  nurse: nurse\n  NURSE: nurse", 5, "'NURSE' is 'nurse' in other letters"),
        ("  nurse: nurse", '  "": nurse', 4, "a key of `occupations` is empty"),
        ("    frame: judge", "    fram: judge", 6, "there is no 'fram' of an occupation"),
        ("    frame: judge", "    frame: no", 6, "the frame of 'judge' is no"),
        ("    prompt: magistrate", "    prompt:", 7, "the prompt of 'judge' is empty"),
        ("  nurse: nurse", "  nurse: nurse\n  nurse: nurse", 5, "'nurse' stands on line 4 already"),
    ],
)
def test_mistakes_in_the_spellings_of_an_occupation(old, new, line, says, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text(MAPPED.replace(old + "\n", new + "\n"))
    message = refused(path)
    assert message.startswith(f", line {line}: ") and says in message


@pytest.mark.parametrize("key", ["name", "occupations", "classes"])
def test_what_a_task_needs_is_missed(key, tmp_path):
    lines = {"name": "name: mine", "occupations": "occupations: [nurse]", "classes": "classes: {warm: [kind]}"}
    path = tmp_path / "task.yaml"
    path.write_text("# a comment\n" + "\n".join(line for name, line in lines.items() if name != key))
    assert refused(path).startswith(f", line 2: the task has no {key}; add `{key}:`")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", " is empty; a task file has at least a name, occupations and classes"),
        (b"# nothing\n", " is empty"),
        (b"\n---\n", " is empty"),
        (b"- nurse\n", ", line 1: a task file is the list ['nurse']; expected names and values"),
        (b"nurse\n", ", line 1: a task file is the text 'nurse'"),
        (b"name: mine\nframe: \xff\n", ", line 2: a byte is not UTF-8; save the file as UTF-8"),
        (b"name: mine\n" + b"#" * (1 << 20), " has more than 1,048,576 bytes"),
        (b"name: " + b"[" * 100_000, ", line 1: nested more than 16 deep"),
        (b"name: mine\nclasses: " + b"{a: " * 100_000, ", line 2: nested more than 16 deep"),
        (b"name: mine\nclasses: {}\noccupations: [nurse]", ", line 2: there are 0 classes"),
        (b"name: mine\nclasses: {warm: [kind]}\noccupations: []", ", line 3: the list of occupations is empty"),
        (b"name: mine\nclasses: {warm: [kind]}\noccupations: {}", ", line 3: the list of occupations is empty"),
        (b"name: mine\nclasses: {warm: [kind]}\noccupations: nurse", ", line 3: `occupations` is the text 'nurse'"),
        (b"name: mine\nclasses: [warm]\noccupations: [nurse]", ", line 2: `classes` is the list ['warm']"),
        (b"name: m\nclasses: {warm: [kind]}\noccupations: [nurse]\nprompts: {}", ", line 4: there are no prompts"),
        (
            b'name: m\nclasses: {skill: ["skil*"]}\noccupations: [nurse]\nprompts:\n  a: "{occupation} {skill}"\n',
            ", line 5: the prompt 'a' names the words of skill, which has only stems",
        ),
    ],
)
def test_files_that_are_no_task_at_all(content, says, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_bytes(content)
    assert refused(path).startswith(says)


def test_outer_white_space_of_a_prompt_is_left_out(tmp_path):
    path = tmp_path / "task.yaml"
    block = "prompts:\n  p: |\n    Describe the {occupation}.\n\n    Briefly.\n"
    path.write_text("name: mine\noccupations: [nurse]\nclasses: {warm: [kind]}\n" + block)
    assert read_task(path).default_prompt.instruction == "Describe the {occupation}.\n\nBriefly."


def test_aliases_that_grow_without_end_are_refused_at_once(tmp_path):
    path = tmp_path / "task.yaml"
    lines = ["name: mine", "sources:", "  - &a0 [x, x]"]
    lines += [f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path.write_text("\n".join(lines))
    assert "aliases (*name) repeat too much" in refused(path)


def test_a_few_aliases_are_read(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text("name: mine\noccupations: &all [nurse, pilot]\nclasses: {warm: [kind]}\nsources: *all\n")
    assert read_task(path).sources == ("nurse", "pilot")


def test_files_that_cannot_be_read(tmp_path):
    assert "No such file" in refused(tmp_path / "none.yaml")
    assert "Is a directory" in refused(tmp_path)


def test_a_packaged_task_is_read_by_its_name_and_others_are_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "competence-warmth").mkdir()  # a folder of results
    assert read_task("competence-warmth").name == "competence-warmth"
    with pytest.raises(UserError) as error:
        read_task("competence-warmht")
    assert str(error.value) == (
        "there is no task 'competence-warmht'; did you mean 'competence-warmth'?; give a YAML file, or one of "
        "agentic-communal, competence-warmth, gaucher-stems"
    )
    (tmp_path / "mine").write_text(GOOD)
    assert read_task("mine").name == "mine"


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    bare = tmp_path / "bare.yaml"
    bare.write_text(GOOD)
    assert read_task(path) == read_task(bare)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("kind\n", "3\n", 1).replace("\n", "\r\n").encode())
    assert refused(path).startswith(", line 13: ")


def test_a_mistake_ends_a_command_with_code_two(tmp_path, capsys):
    path = tmp_path / "task.yaml"
    path.write_text("nam: mine\n")
    assert cli.run_command(lambda argv: read_task(argv[0]) and 0, [str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"equipoise: {path}, line 1: there is no key 'nam'")


def test_no_class_can_be_named_like_a_column():
    free = {"agentic", "communal"}
    assert {column.casefold() for column in (*row_columns(()), *COLUMNS)} - free <= RESERVED
    assert all(name == name.casefold() for name in RESERVED)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({}, "where: the task has no name"),
        ([], "where: a task file is the list []"),
        ({"name": "x", 3: 4}, "where: a key of a task file is 3; expected text"),
        ({"name": 1.5, "occupations": ["a"], "classes": {"b": ["c"]}}, "where: the name is 1.5"),
        ({"name": True, "occupations": ["a"], "classes": {"b": ["c"]}}, "where: the name is True"),
        (
            {"name": "x", "occupations": ["a"], "classes": {"b": ["c"]}, "words": [True, 9]},
            "where: `words` is the list",
        ),
    ],
)
def test_a_document_made_in_python_is_checked_too(document, says):
    with pytest.raises(UserError) as error:
        task_from_document(document, "where")
    assert str(error.value).startswith(says)
