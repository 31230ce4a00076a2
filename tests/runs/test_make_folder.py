"""The check that a folder can be written leaves nothing behind and touches nothing."""

from pathlib import Path

import pytest

from equipoise.errors import UserError
from equipoise.runs.files import make_folder


def test_a_file_of_the_users_is_never_taken_for_the_probe(tmp_path: Path) -> None:
    (tmp_path / ".equipoise-write-test").write_text("mine")
    make_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".equipoise-write-test"]
    assert (tmp_path / ".equipoise-write-test").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*: choose another --output-dir"):
        make_folder(tmp_path / "file" / "below", "--output-dir")
