"""What is written of a task is read again, and whatever else is given is a task or an error of one line."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.protocol.task import Task, read_task, task_from_document
from tests.protocol.files import GOOD

WORD = st.text(st.sampled_from("abéßñ жあ-'0"), min_size=1, max_size=8)
LINE = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\ufffe\uffff"), max_size=30
)
SAID = LINE.filter(str.strip)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, object]:
    names = draw(st.lists(st.text(st.sampled_from("abcé_-1"), min_size=2, max_size=6), min_size=1, max_size=4))
    names = list({name.casefold(): name for name in names}.values())
    classes = {
        name: [
            f"{i}{word}{draw(st.sampled_from(['x', 'x*']))}" for word in draw(st.lists(WORD, min_size=1, max_size=4))
        ]
        for i, name in enumerate(names)
    }
    occupations = draw(st.lists(WORD.map(str.strip).filter(bool), min_size=1, max_size=4, unique_by=str.casefold))
    forms = st.just(None) | WORD | st.fixed_dictionaries({"frame": WORD, "prompt": WORD})
    return {
        "name": draw(SAID),
        "frame": draw(st.sampled_from(["The {occupation} was", "{occupation}:", "É {occupation}"])),
        "words": [draw(st.integers(0, 5)), draw(st.integers(20, 40))],
        "occupations": {name: draw(forms) or name for name in occupations},
        "held_out": occupations[1:],
        "classes": classes,
        "prompts": {"p": "{occupation} " + draw(LINE), "q": draw(LINE) + "\n\n {frame}"},
        "sources": draw(st.lists(SAID, max_size=2, unique_by=str.casefold)),
        "labels": {name: draw(SAID) for name in names},
        "openings": draw(st.sampled_from([[], [" ".join(f"{{{i + 1}}}" for i in range(len(names)))]])),
        "abbreviations": [
            f"{word}a" for word in draw(st.lists(WORD.filter(lambda word: word[0].isalnum()), max_size=1))
        ],
    }


@settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(documents())
def test_a_task_survives_its_document_and_its_yaml(tmp_path_factory, document):
    try:
        task = task_from_document(document, "x")
    except UserError as error:
        assert str(error).startswith("x: ") and "\n" not in str(error)
        return
    again = task_from_document(task.document(), "again")
    assert again == task and again.document() == task.document() and again.differences(task) == []
    path = tmp_path_factory.mktemp("task") / "task.yaml"
    path.write_text(task.to_yaml(), encoding="utf-8")
    assert read_task(path) == task


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | LINE | st.sampled_from(["{occupation}", "a*", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LINE, inner, max_size=3),
    max_leaves=8,
)


@given(st.fixed_dictionaries({}, optional={key: JSON for key in Task.__dataclass_fields__} | {"words": JSON}), JSON)
def test_whatever_is_given_is_a_task_or_a_one_line_error(changes, other):
    good = {"name": "mine", "occupations": ["nurse"], "classes": {"warm": ["kind"]}}
    for document in ({**good, **changes}, other):
        try:
            task_from_document(document, "x")
        except UserError as error:
            assert str(error).startswith("x: ") and len(str(error).splitlines()) == 1


PIECES = st.sampled_from(
    [
        *"\n\t:-?[]{},&*!|>'\"%@`#~=<",
        "- ",
        ": ",
        "&a",
        "*a",
        "<<: ",
        "!!",
        "---\n",
        "...\n",
        "\x00",
        "é",
        "\u2028",
        "  ",
        "{{",
    ]
)


@given(st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 3), PIECES), min_size=1, max_size=4))
def test_a_damaged_file_is_a_task_or_a_one_line_error_that_names_it(tmp_path_factory, damages):
    text = GOOD
    for place, gone, piece in damages:
        text = text[:place] + piece + text[place + gone :]
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        read_task(path)
    except UserError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
