"""The completions file survives being cut anywhere, and touches nothing that is not its own."""

import csv
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.methods.completions import COLUMNS, Completions, Key, all_keys
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.rows import parse
from tests.tasks import foreign_task

OCCUPATIONS = PROTOCOL.names
SETTINGS = {"Model": "tiny", "Label": "RLHF", "weights": "sha256 1", "seed": 0}
HOSTILE = (
    'said "so", and left',
    '"',
    "two\nlines",
    "a\rb\r\nc",
    "🙂 naïve",
    "nul\x00byte",
    '=HYPERLINK("http://x","y")',
    "-1+1",
    "\u2028 \x85 \x0b",
    "<script>alert(1)</script>",
)


def text_of(key: Key) -> str:
    """Some text for a key, hostile ones among them."""
    number = OCCUPATIONS.index(key.occupation) + key.run_id
    return f"The {key.occupation} was {HOSTILE[number % len(HOSTILE)]}"


def write(path: Path, n: int, **changes: object) -> None:
    """Add what the file lacks, seven rows at a time."""
    with Completions(path, SETTINGS | changes, PROTOCOL, n) as file:
        file.start({})
        missing = [key for key in all_keys(n, OCCUPATIONS) if key not in file.texts]
        for i in range(0, len(missing), 7):
            file.append({key: text_of(key) for key in missing[i : i + 7]})
        file.finish()


def read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def rows_of(texts: Mapping[Key, str]) -> list[list[str]]:
    return [["tiny", o, str(i), text, str(len(text.split())), "RLHF"] for (o, i), text in texts.items()]


def test_a_finished_file_has_the_columns_and_every_row_by_occupation_then_run(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write(path, 3)
    keys = [Key(occupation, i) for occupation in OCCUPATIONS for i in (1, 2, 3)]
    assert read(path) == [list(COLUMNS), *rows_of({key: text_of(key) for key in keys})]
    assert path.read_bytes().startswith(b"Model,Occupation,RunID,Text,WordCount,Label\r\n")


def test_an_unfinished_file_is_balanced_over_the_occupations() -> None:
    assert [key.occupation for key in all_keys(2, OCCUPATIONS)] == [*OCCUPATIONS, *OCCUPATIONS]
    assert [key.run_id for key in all_keys(2, OCCUPATIONS)] == [1] * 20 + [2] * 20


def test_cut_at_any_byte_and_continued_the_file_is_as_if_never_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them would take most of the time
    whole = tmp_path / "whole.csv"
    write(whole, 1)
    data, record = whole.read_bytes(), (tmp_path / "whole.csv.json").read_bytes()
    path = tmp_path / "cut.csv"
    for size in (*range(150), *range(len(data) - 250, len(data))):  # the header and some rows, the last rows
        path.write_bytes(data[:size])
        (tmp_path / "cut.csv.json").write_bytes(record)
        write(path, 1)
        assert path.read_bytes() == data, f"cut after {size} bytes"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=20), st.data())
@settings(deadline=None, max_examples=60)
def test_any_text_comes_back_as_it_was_also_after_a_cut(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("any") / "out.csv"
    written = dict(zip(all_keys(1, OCCUPATIONS), texts, strict=False))
    with Completions(path, SETTINGS, PROTOCOL, 1) as file:
        file.start({})
        for key, text in written.items():
            file.append({key: text})
    assert read(path)[1:] == rows_of(written)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    with Completions(path, SETTINGS, PROTOCOL, 1) as file:
        kept = file.texts
    assert list(kept.items()) == list(written.items())[: len(kept)]
    # Exactly the rows are kept whose last byte is there.
    ends = [i + 2 for i in range(len(whole)) if whole[i : i + 2] == b"\r\n" and whole[:i].count(b'"') % 2 == 0]
    assert len(kept) == max(0, sum(end <= cut for end in ends) - 1)


@given(st.binary(max_size=200))
def test_parsing_any_bytes_gives_rows_or_value_error(data: bytes) -> None:
    try:
        rows, size, lines = parse(data)
    except ValueError:
        return
    assert 0 <= size <= len(data) and len(rows) == len(lines)
    assert parse(data[:size]) == (rows, size, lines)


def test_missing_rows_are_added_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write(path, 2)
    whole = path.read_bytes()
    header, *rows = whole.split(b"\r\ntiny,")
    path.write_bytes(b"\r\ntiny,".join([header, *(row for i, row in enumerate(rows) if i % 3)]))
    if not path.read_bytes().endswith(b"\r\n"):
        path.write_bytes(path.read_bytes() + b"\r\n")
    write(path, 2)
    assert path.read_bytes() == whole


def test_a_finished_file_can_be_extended_but_not_shortened(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write(path, 1)
    write(path, 2)
    assert len(read(path)) == 41
    with pytest.raises(UserError, match="runs beyond --n 1"):
        Completions(path, SETTINGS, PROTOCOL, 1)


@pytest.mark.parametrize(
    "content",
    [
        b"name,age\r\nAda,36\r\n",
        b"Model,Occupation,RunID,Text,WordCount\r\n",
        b"my notes",
        b"Model,Occ",
        b"\xff\xfe\r\n",
        b'a"b"c,"d"e\n',
        b"\n",
        b"\x00" * 50,
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_with_other_contents_is_refused_and_left_alone(tmp_path: Path, content: bytes, overwrite: bool) -> None:
    path = tmp_path / "out.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not a completions file.*choose another --output"):
        Completions(path, SETTINGS, PROTOCOL, 1, overwrite)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["out.csv"]


def test_other_settings_are_refused_with_the_differences(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write(path, 1)
    before = path.read_bytes(), (tmp_path / "out.csv.json").read_bytes()
    with pytest.raises(UserError, match=r"other settings \(seed: 0 → 1\).*--overwrite"):
        Completions(path, SETTINGS | {"seed": 1}, PROTOCOL, 1)
    assert (path.read_bytes(), (tmp_path / "out.csv.json").read_bytes()) == before


def test_a_file_is_of_its_tasks_occupations_and_in_their_order(tmp_path: Path) -> None:
    task, path = foreign_task(), tmp_path / "out.csv"
    keys = all_keys(2, task.names)
    with Completions(path, SETTINGS, task, 2) as file:
        file.start({})
        for key in reversed(keys):
            file.append({key: f"{task.prefix(key.occupation)} klug"})
        file.finish()
    assert [(row[1], row[2]) for row in read(path)[1:]] == [(o, i) for o in task.names for i in ("1", "2")]
    assert json.loads((tmp_path / "out.csv.json").read_text())["settings"]["task"] == task.document()
    with Completions(path, SETTINGS, foreign_task(), 2) as file:
        assert set(file.texts) == set(keys)
    with pytest.raises(UserError, match=r"other settings \(seed: 0 → 1; words: \[5, 12\] → \[5, 9\]\)"):
        Completions(path, SETTINGS | {"seed": 1}, foreign_task(words=[5, 9]), 2)
    path.write_bytes(path.read_bytes() + b"tiny,nurse,1,x,1,RLHF\r\n")
    with pytest.raises(UserError, match=r"line 8 .*'nurse' '1' is no occupation with a number"):
        Completions(path, SETTINGS, task, 2)


def test_overwrite_starts_anew_but_not_before_start(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write(path, 1)
    before = path.read_bytes()
    with Completions(path, SETTINGS | {"seed": 1}, PROTOCOL, 1, overwrite=True) as file:
        assert path.read_bytes() == before and file.texts == {}
        file.start({})
    assert read(path) == [list(COLUMNS)]
    assert json.loads((tmp_path / "out.csv.json").read_text())["settings"]["seed"] == 1


def test_rows_never_stand_beside_a_record_of_other_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.csv"
    write(path, 1)
    file = Completions(path, SETTINGS | {"seed": 1}, PROTOCOL, 1, overwrite=True)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with file, pytest.raises(KeyboardInterrupt):
        file.start({})  # as if killed just before the new record appears
    assert json.loads((tmp_path / "out.csv.json").read_text())["settings"]["seed"] == 0
    assert path.read_bytes() == b""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"settings": 1, "made_with": []}', b'{"mine": true}', b"[" * 100_000, None]
)
def test_rows_without_a_record_of_ours_are_kept_also_with_overwrite(
    tmp_path: Path, damage: bytes | None, overwrite: bool
) -> None:
    path, record = tmp_path / "out.csv", tmp_path / "out.csv.json"
    write(path, 1)
    record.unlink()
    if damage is not None:
        record.write_bytes(damage)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"out\.csv\.json.*also with --overwrite"):
        Completions(path, SETTINGS, PROTOCOL, 1, overwrite)
    assert path.read_bytes() == before
    assert (record.read_bytes() if record.exists() else None) == damage


def test_a_record_of_before_records_were_marked_is_known_by_its_shape(tmp_path: Path) -> None:
    path, record = tmp_path / "out.csv", tmp_path / "out.csv.json"
    write(path, 1)
    old = json.loads(record.read_text())
    assert old.pop("written_by") == "equipoise"
    record.write_text(json.dumps(old))
    with Completions(path, SETTINGS, PROTOCOL, 1) as file:
        assert len(file.texts) == 20
    record.write_text(json.dumps(old | {"mine": 1}))
    with pytest.raises(UserError, match="somebody else's"):
        Completions(path, SETTINGS, PROTOCOL, 1, overwrite=True)


def test_somebody_elses_file_in_the_place_of_the_record_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.csv.json").write_text('{"mine": true}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match="somebody else's"):
            Completions(tmp_path / "out.csv", SETTINGS, PROTOCOL, 1, overwrite)
    assert os.listdir(tmp_path) == ["out.csv.json"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"tiny,chef,1,", b"tiny,chef,one,", "line 5 .*no occupation with a number"),
        (b"tiny,chef,1,", b"tiny,cook,1,", "line 5 .*no occupation with a number"),
        (b"tiny,chef,1,", b"large,chef,1,", "line 5 .*another Model or Label"),
        (b"tiny,chef,1,", b"tiny,artist,1,", "lines 3 and 5 .* are both artist 1"),
        (b"tiny,chef,1,The chef was", b"tiny,chef,1,The good chef was", "line 5 .*WordCount is 4, .* has 5 words"),
        (b"tiny,chef,1,The chef", b"tiny,chef,1,The chef,", "line 5 .*it has 7 fields, not 6"),
    ],
)
def test_a_row_changed_by_hand_is_named_by_its_line(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    path = tmp_path / "out.csv"
    with Completions(path, SETTINGS, PROTOCOL, 1) as file:
        file.start({})
        file.append({key: f"The {key.occupation} was kind." for key in all_keys(1, OCCUPATIONS)})
    changed = path.read_bytes().replace(old, new)
    path.write_bytes(changed)
    with pytest.raises(UserError, match=message):
        Completions(path, SETTINGS, PROTOCOL, 1)
    assert path.read_bytes() == changed


def test_two_processes_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with Completions(path, SETTINGS, PROTOCOL, 1) as first, Completions(path, SETTINGS, PROTOCOL, 1) as second:
        first.start({})
        with pytest.raises(UserError, match="another process"):
            second.start({})
        with pytest.raises(UserError, match="another process"):
            Completions(path, SETTINGS, PROTOCOL, 1)


def test_a_full_disk_leaves_whole_rows_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.csv"
    with Completions(path, SETTINGS, PROTOCOL, 2) as file:
        file.start({})
        file.append({key: text_of(key) for key in all_keys(2, OCCUPATIONS)[:25]})
        before = path.read_bytes()

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left.*25 rows.*the same command continues"):
            file.append({key: text_of(key) for key in all_keys(2, OCCUPATIONS)[25:]})
        assert path.read_bytes() == before
        with pytest.raises(UserError, match="No space left"):
            file.finish()
    assert sorted(os.listdir(tmp_path)) == ["out.csv", "out.csv.json"]
    monkeypatch.undo()
    write(path, 2)
    assert len(read(path)) == 41


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a writable folder"):
        Completions(tmp_path / "file" / "out.csv", SETTINGS, PROTOCOL, 1)
    with pytest.raises(UserError, match="is not a file"):
        Completions(tmp_path, SETTINGS, PROTOCOL, 1)
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(UserError, match="not a writable folder"):
            Completions(tmp_path / "locked" / "out.csv", SETTINGS, PROTOCOL, 1)


def test_the_record_lists_each_environment_once(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    for made_with in ({"torch": "2.11"}, {"torch": "2.11"}, {"torch": "2.12"}):
        with Completions(path, SETTINGS, PROTOCOL, 1) as file:
            file.start(made_with)
            file.append({next(key for key in all_keys(1, OCCUPATIONS) if key not in file.texts): "The chef was kind."})
    record = json.loads((tmp_path / "out.csv.json").read_text())
    assert record == {
        "written_by": "equipoise",
        "settings": SETTINGS | {"task": PROTOCOL.document()},
        "made_with": [{"torch": "2.11"}, {"torch": "2.12"}],
    }


@pytest.mark.parametrize("name", ["out.csv", "out.csv.json", ".out.csv.equipoise-partial"])
def test_nothing_is_written_through_a_planted_link(tmp_path: Path, name: str) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "mine").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "far" / "mine")
    if name.startswith("."):
        write(tmp_path / "out.csv", 1)
        assert len(read(tmp_path / "out.csv")) == 21
    else:
        with pytest.raises(UserError, match=r"is a link|somebody else's"):
            write(tmp_path / "out.csv", 1)
    assert (tmp_path / "far" / "mine").read_text() == "mine" and os.listdir(tmp_path / "far") == ["mine"]


def test_pandas_reads_every_text_as_it_is(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "out.csv"
    write(path, 2)
    frame = pandas.read_csv(path)
    assert tuple(frame.columns) == COLUMNS and len(frame) == 40
    keys = [Key(occupation, i) for occupation in OCCUPATIONS for i in (1, 2)]
    assert list(frame.Text) == [text_of(key) for key in keys]
    assert list(frame.WordCount) == [len(text_of(key).split()) for key in keys]
