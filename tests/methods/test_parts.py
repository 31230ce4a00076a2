"""A file in parts: dealt by whole batches, and joined to the bytes that one process writes, killed or not."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.cli import main
from equipoise.errors import UserError
from equipoise.methods.completions import Key, all_keys
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.generate import GenerateConfig, batches, generate
from equipoise.methods.parts import Part, join, read_part
from equipoise.methods.sample import SampleConfig, sample
from equipoise.protocol.task import PROTOCOL
from tests.killing import counted, killed_until_done
from tests.tiny import words_folder

OCCUPATIONS = PROTOCOL.names


def quiet(_line: str) -> None:
    pass


def config(model: Path, output: Path, **changes: Any) -> GenerateConfig:
    settings: dict[str, Any] = {"n": 6, "max_new_tokens": 8, "batch_size": 8, "dtype": "float32", "device": "cpu"}
    return GenerateConfig(model=str(model), output=output, **(settings | changes))


def record(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.with_name(path.name + ".json").read_text()))


def account(path: Path) -> dict[str, Any]:
    """What it cost, without what time decides."""
    document = json.loads(path.with_name(path.name + ".costs.json").read_text())
    return {name: value for name, value in document.items() if "seconds" not in name}


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "out.csv"
    assert generate(config(tiny_model, path), quiet).status == "done"
    return path


@pytest.fixture(scope="module")
def written(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three parts of `out.csv`."""
    folder = tmp_path_factory.mktemp("parts")
    for number in (2, 3, 1):
        assert generate(config(tiny_model, folder / "out.csv", part=f"{number}/3"), quiet).status == "done"
    return folder


@pytest.fixture
def parts(written: Path, tmp_path: Path) -> Path:
    """The name of the file whose parts are there, to be tampered with."""
    shutil.copytree(written, tmp_path / "parts")
    return tmp_path / "parts" / "out.csv"


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 12))
def test_every_key_is_in_one_part_and_a_part_is_computed_in_batches_of_the_whole(n: int, of: int, size: int) -> None:
    keys = all_keys(n, OCCUPATIONS[:3])
    whole = [tuple(batch) for batch in batches(keys, size)]
    dealt = [[tuple(batch) for batch in batches(Part(i, of).keys(keys, size), size)] for i in range(1, of + 1)]
    for i, mine in enumerate(dealt):
        assert mine == whole[i::of]
    assert sorted(key for mine in dealt for batch in mine for key in batch) == sorted(keys)


def test_the_joined_file_is_that_of_one_process_to_the_byte(parts: Path, uninterrupted: Path) -> None:
    before = everything(parts.parent)
    said: list[str] = []
    joined = join(parts, said.append)
    assert parts.read_bytes() == uninterrupted.read_bytes()
    assert record(parts)["settings"] == record(uninterrupted)["settings"] and "part" not in record(parts)
    assert list(record(parts)) == list(record(uninterrupted))
    assert len(joined.texts) == 120 and "120 rows from 3 parts" in said[0]
    assert before.items() <= everything(parts.parent).items()  # the parts are as they were


def test_the_record_of_the_joined_file_says_where_each_part_was_made(parts: Path) -> None:
    for number in (1, 2, 3):
        edit(lambda document, number=number: document["made_with"][0].update(gpu=f"GPU {number}"))(  # type: ignore[misc]
            Part(number, 3).path(parts)
        )
    join(parts, quiet)
    assert [entry["gpu"] for entry in record(parts)["made_with"]] == ["GPU 1", "GPU 2", "GPU 3"]


def test_joined_again_or_by_the_name_of_a_part_it_is_the_same(parts: Path, uninterrupted: Path) -> None:
    join(parts, quiet)
    after = everything(parts.parent)
    join(Part(2, 3).path(parts), quiet)
    assert everything(parts.parent) == after


def test_what_one_process_began_is_completed_from_the_parts(parts: Path, uninterrupted: Path, tiny_model: Path) -> None:
    data = uninterrupted.read_bytes()
    parts.write_bytes(data[: data.index(b"\r\n", 2000) + 9])  # half a row at the end
    shutil.copy(f"{uninterrupted}.json", f"{parts}.json")
    join(parts, quiet)
    assert parts.read_bytes() == data
    assert generate(config(tiny_model, parts), quiet).status == "done"  # and one process takes it for its own
    assert parts.read_bytes() == data


def test_parts_that_are_killed_continue_and_join_to_the_same_file(
    tiny_model: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    path, draw = tmp_path / "out.csv", random.Random(3)
    for number in (1, 2):
        wanted = config(tiny_model, path, part=f"{number}/2")
        other = config(tiny_model, tmp_path / "counted.csv", part=f"{number}/2")
        whole = counted(lambda other=other: generate(other, quiet).exit_code)  # type: ignore[misc]
        assert killed_until_done(lambda wanted=wanted: generate(wanted, quiet).exit_code, whole, draw, 4) >= 1  # type: ignore[misc]

    def joined(path: Path) -> int:
        join(path, quiet)
        return 0

    shutil.copytree(tmp_path, tmp_path / "again")
    whole = counted(lambda: joined(tmp_path / "again" / "out.csv"))
    assert killed_until_done(lambda: joined(path), whole, draw) >= 1
    assert path.read_bytes() == uninterrupted.read_bytes()


def test_more_sentences_extend_each_part(tiny_model: Path, tmp_path: Path, uninterrupted: Path) -> None:
    path = tmp_path / "out.csv"
    for n in (4, 6):
        for number in (1, 2):
            assert generate(config(tiny_model, path, n=n, part=f"{number}/2"), quiet).status == "done"
    join(path, quiet)
    keys = {tuple(line.split(",")[1:3]) for line in path.read_text().splitlines()[1:]}
    assert keys == {(o, str(i)) for o in OCCUPATIONS for i in range(1, 7)}
    assert set(path.read_bytes().splitlines()) == set(uninterrupted.read_bytes().splitlines())


def test_a_part_beyond_the_last_batch_is_empty_and_no_obstacle(tiny_model: Path, tmp_path: Path) -> None:
    path, said = tmp_path / "out.csv", []
    for number in (1, 2, 3):
        outcome = generate(config(tiny_model, path, n=1, batch_size=10, part=f"{number}/3"), said.append)
        assert outcome.status == "done"
    assert any("gets no rows" in line and "smaller --batch-size" in line for line in said)
    whole = tmp_path / "whole.csv"
    generate(config(tiny_model, whole, n=1, batch_size=10), quiet)
    join(path, quiet)
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("given", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/3/3", " 1/3", "1/99999999", "²/3", ""])
def test_what_is_no_part_is_refused_in_one_line(given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="as in 3/8"):
        read_part(given)
    assert main(["generate", "--model", str(tmp_path), f"--part={given}"]) == 2
    error = capsys.readouterr().err
    assert "as in 3/8" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def drop(path: Path) -> None:
    path.unlink()
    path.with_name(path.name + ".json").unlink()


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edited(path: Path) -> None:
        document = record(path)
        change(document)
        path.with_name(path.name + ".json").write_text(json.dumps(document))

    return edited


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def rename(path: Path) -> None:
    first = Part(1, 3).path(path.with_name("out.csv"))
    for end in ("", ".json"):
        shutil.copy(f"{first}{end}", f"{path}{end}")


def reword(path: Path) -> None:
    path.write_text(path.read_text().replace(" was", " was not", 1))


def swap_row(path: Path) -> None:
    """A row of another part in place of an own one."""
    lines = path.read_bytes().splitlines(keepends=True)
    other = Part(1, 3).path(path.with_name("out.csv")).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-1], other[-1]]))


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (drop, r"1 part of .* is missing \(2/3\): run the command .* --part 2/3"),
    "without a record": (lambda path: path.with_name(path.name + ".json").unlink(), "is no part that --part wrote"),
    "a damaged record": (lambda path: path.with_name(path.name + ".json").write_text("{"), "damaged or somebody"),
    "a whole file": (edit(lambda document: document.pop("part")), "is no part that --part wrote"),
    "nonsense": (edit(lambda document: document.update(part=[1])), "is no part that --part wrote"),
    "other settings": (edit(lambda d: d["settings"].update(seed=5)), "other settings than .*seed: 0 → 5"),
    "another task": (edit(lambda d: d["settings"]["task"].update(name="x")), "other settings than"),
    "other batches": (edit(lambda d: d["part"].update(batch_size=4)), "--batch-size: 8 → 4"),
    "another number": (edit(lambda d: d["part"].update(n=7)), "--n: 6 → 7"),
    "another name": (rename, "was written as part 1/3: give it that name again"),
    "cut short": (cut, r"lacks \d+ of its 40 rows: the same command with --part 2/3 continues"),
    "edited": (reword, "is not as it was written"),
    "a row of another": (swap_row, "holds rows of another part"),
    "parts of two kinds": (lambda path: path.with_name("out.part-1-of-2.csv").touch(), "parts of 2 and parts of 3"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_missing_or_foreign_parts_are_one_line_and_nothing_is_lost(
    parts: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper, message = TAMPERED[how]
    tamper(Part(2, 3).path(parts))
    before = everything(parts.parent)
    with pytest.raises(UserError, match=message):
        join(parts, quiet)
    assert main(["join", str(parts)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("equipoise: ")
    assert everything(parts.parent) == before


def test_without_any_part_the_line_says_what_was_looked_for(tmp_path: Path) -> None:
    for name in (tmp_path / "out.csv", tmp_path / "nowhere" / "out.csv"):
        with pytest.raises(UserError, match=r"no parts beside it, such as out\.part-1-of-2\.csv"):
            join(name, quiet)


def test_a_file_with_other_sentences_is_left_alone(parts: Path, tiny_model: Path) -> None:
    generate(config(tiny_model, parts, n=1), quiet)
    text = parts.read_text()
    words = text.splitlines()[1].split(",")[3].split()
    parts.write_text(text.replace(words[-1], "otherwise", 1))
    before = everything(parts.parent)
    with pytest.raises(UserError, match="is there with another sentence for architect 1"):
        join(parts, quiet)
    assert everything(parts.parent) == before
    drop(parts)
    generate(config(tiny_model, parts, n=1, seed=4), quiet)
    with pytest.raises(UserError, match="made with other settings"):
        join(parts, quiet)


def test_a_part_is_not_continued_as_another_or_in_other_batches_or_as_the_whole(parts: Path, tiny_model: Path) -> None:
    before = everything(parts.parent)
    with pytest.raises(UserError, match="was written as part 1/3 with --batch-size 8"):
        generate(config(tiny_model, parts, part="1/3", batch_size=16), quiet)
    with pytest.raises(UserError, match="was written as part 1/3"):
        generate(config(tiny_model, Part(1, 3).path(parts)), quiet)
    generate(config(tiny_model, parts, n=1), quiet)
    shutil.copy(parts, Part(1, 2).path(parts))
    shutil.copy(f"{parts}.json", f"{Part(1, 2).path(parts)}.json")
    with pytest.raises(UserError, match="was written as whole"):
        generate(config(tiny_model, parts, part="1/2"), quiet)
    assert before.items() <= everything(parts.parent).items()


@pytest.mark.parametrize("method", ["prompt-only", pytest.param("ctrlg", marks=pytest.mark.slow)])
def test_a_method_in_parts_has_the_rows_and_the_account_of_one_process(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = words_folder(tmp_path / "words", prompt=None)

    def wanted(name: str, **changes: Any) -> SampleConfig:
        settings: dict[str, Any] = {
            "n": 4, "max_new_tokens": 32, "batch_size": 16, "dtype": "float32", "device": "cpu",
            "prompt": "raw", "kl_sentences": 40,
            "ctrlg": CtrlGConfig(hidden_states=8, distil_sentences=200, em_passes=2, candidates=2),
        }  # fmt: skip
        return SampleConfig(method=method, model=str(model), output=tmp_path / name, **(settings | changes))  # type: ignore[arg-type]

    whole, path = tmp_path / "whole.csv", tmp_path / "out.csv"
    assert sample(wanted("whole.csv"), quiet).status == "done"
    for number in (1, 2):
        assert sample(wanted("out.csv", part=f"{number}/2"), quiet).status == "done"
    join(path, quiet)
    assert path.read_bytes() == whole.read_bytes()
    known = account(path)
    assert known["generations"] == account(whole)["generations"] and known["accepted"] == account(whole)["accepted"]
    assert sample(wanted("out.csv"), quiet).status == "done"  # adds what only the whole file tells
    assert account(path) == account(whole) and "kl" in account(path)
    assert path.read_bytes() == whole.read_bytes()
    join(path, quiet)
    assert account(path) == account(whole)  # which is not forgotten
    Path(f"{Part(1, 2).path(path)}.costs.json").unlink()
    with pytest.raises(UserError, match=r"does not say what all rows .* cost: the same command with --part 1/2"):
        join(path, quiet)


def test_gen_filter_has_no_parts_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", "--method", "gen-filter", "--part", "1/2", "--output", str(tmp_path / "out.csv")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "--part does not go with --method gen-filter" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_commands_write_parts_and_join_them(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], uninterrupted: Path
) -> None:
    path = tmp_path / "out.csv"
    options = ["--model", str(tiny_model), "--n", "6", "--max-new-tokens", "8", "--batch-size", "8"]
    options += ["--dtype", "float32", "--device", "cpu", "--output", str(path)]
    for number in (1, 2):
        assert main(["generate", *options, "--part", f"{number}/2"]) == 0
        assert f"out.part-{number}-of-2.csv is complete: {64 if number == 1 else 56} rows" in capsys.readouterr().out
    assert main(["join", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "120 rows from 2 parts" in printed and "occupation" in printed
    assert path.read_bytes() == uninterrupted.read_bytes()
    assert Key("chef", 6) in join(path, quiet).texts
