"""YAML and JSON from anyone: what would exhaust memory, a parser or a reader's attention is one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise import cli, documents
from equipoise.documents import parse_json, parse_yaml, read_json, read_yaml
from equipoise.errors import UserError
from equipoise.evaluation.reference import read_reference
from equipoise.evaluation.stored import from_json
from equipoise.options import read_file
from equipoise.ppo.sweep import read_plans
from equipoise.ppo.tool_config import SweepConfig
from equipoise.protocol.task import read_task

# Nine lines of which each repeats the one before nine times: 9⁹ values in less than 500 bytes.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
HOSTILE = {
    "aliases": (BOMB, "aliases"),
    "itself": ("a: &a [*a]\n", "aliases"),
    "merges": ("a: &a {x: 1}\n" + f"b: [{', '.join(['{<<: *a}'] * 2000)}]\n", "aliases"),
    "depth": ("a: " + "[" * 5000 + "]" * 5000 + "\n", "nested more than 16 deep"),
    "tag": ("a: !!python/object/apply:os.system [true]\n", "the tag"),
    "own tag": ("a: !own x\n", "the tag"),
    "binary": ("a: !!binary aGk=\n", "the tag"),
    "twice": ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' stands on line 1 already"),
    "twice below": ("s:\n  x: {k: 1}\n  y: {k: 1, k: 2}\n", "line 3: the key 'k' stands on line 3 already"),
    "size": ("# " + "x" * (1 << 20) + "\na: 1\n", "more than 1,048,576 bytes"),
    "long number": ("a: " + "1:" * 400_000 + "1\n", "no plain way to write a whole number"),
    "two documents": ("a: 1\n---\nb: 2\n", "second document"),
}


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


READERS: dict[str, Callable[[Path], Any]] = {
    "task": lambda path: read_task(str(path)),
    "configuration": read_file,
    "sweep": lambda path: read_plans(SweepConfig(path, str(path.parent / "out"))),
    "reference": read_reference,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", HOSTILE)
def test_every_reader_of_yaml_refuses_what_is_hostile_in_one_line(tmp_path: Path, reader: str, kind: str) -> None:
    text, says = HOSTILE[kind]
    path = tmp_path / "given.yaml"
    path.write_text(text)
    assert len(BOMB) < 500
    with pytest.raises(UserError) as error:
        READERS[reader](path)
    if (reader, kind) != ("task", "long number"):  # a task's are text with a remark
        assert says in one_line(error) and "given.yaml" in str(error.value)


def test_a_bomb_on_the_command_line_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bomb.yaml").write_text(BOMB)
    for argv in (["train", "--config"], ["sweep"], ["task"], ["train", "--task"]):
        assert cli.main([*argv, str(tmp_path / "bomb.yaml")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("depth", [101, 900, 150_000])
@pytest.mark.parametrize("brackets", ["[]", ('{"a":', "}")])
def test_deep_json_is_one_line(tmp_path: Path, depth: int, brackets: tuple[str, str]) -> None:
    opening, closing = brackets
    text = opening * depth + ("1" if opening != "[" else "") + closing * depth
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        parse_json(text)
    with pytest.raises(UserError):
        from_json(text)
    (tmp_path / "reference.json").write_text(text)
    with pytest.raises(UserError, match="nested more than 100 deep") as error:
        read_reference(tmp_path / "reference.json")
    one_line(error)


def test_json_that_is_large_or_has_a_key_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": "x" * 1000}))
    assert read_json(tmp_path / "x.json") == {"a": "x" * 1000}
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read_json(tmp_path / "x.json", largest=1000)
    with pytest.raises(ValueError, match="'a' stands twice"):
        parse_json('{"a": 1, "a": 2}', unique=True)
    assert parse_json("[" * 100 + "]" * 100) is not None


SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=8)
KEYS = st.text(max_size=5)
DATA = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4))


@settings(max_examples=200, deadline=None)
@given(DATA)
def test_whatever_a_yaml_or_json_library_wrote_is_read_back_as_it_was(data: Any) -> None:
    assert parse_json(json.dumps(data)) == data
    assert parse_yaml(yaml.safe_dump(data, allow_unicode=False), "x.yaml") == data


def test_merges_and_a_few_aliases_are_read_as_yaml_has_them() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [{x: 5}, *a], z: 1}\nd: *a\nday: 2024-01-31\nyes: [on, No]\n"
    expected = yaml.safe_load(text) | {"day": "2024-01-31"}
    assert parse_yaml(text, "x.yaml") == expected


@pytest.mark.parametrize("text", ["1.5", "-2.", ".5", "1.0e-3", "6.02e+23", ".inf", "-.Inf", "1_000", "-7", "0", "~"])
def test_numbers_are_those_that_the_library_reads(text: str) -> None:
    assert parse_yaml(f"a: {text}", "x.yaml") == yaml.safe_load(f"a: {text}")


def test_a_packaged_file_is_read_as_the_library_reads_it() -> None:
    frontier = Path(documents.__file__).parents[1] / "benchmarks" / "frontier.yaml"
    assert read_yaml(frontier, "the sweep") == yaml.safe_load(frontier.read_text())


def test_json_is_read_in_one_place_alone() -> None:
    """A copy of the program's own values by way of JSON reads nothing that anybody wrote."""
    package = Path(documents.__file__).parent
    reads = re.compile(r"\bjson\.loads?\((?!json\.dumps)")
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if reads.search(p.read_text(encoding="utf-8"))}
    assert found <= {"documents.py", "ppo/config.py", "ppo/run.py"}, found
