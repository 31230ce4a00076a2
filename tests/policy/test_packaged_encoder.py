"""An encoder that packages carry as a zip in parts, by a stand-in of a few bytes."""

import hashlib
import io
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.errors import UserError
from equipoise.policy import bundled
from equipoise.policy.packaged import MPNET, Packaged
from equipoise.policy.source import resolve

HELD = {name: f"what is in {name}".encode() for name in MPNET.zipped}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """Five installed packages with the parts of a zip, which holds more than is wanted."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, content in {**HELD, "all-mpnet-base-v2/modules.json": b"[]", "all-mpnet-base-v2/x.bin": b"0"}.items():
            archive.writestr(name, content)
    data = whole.getvalue()
    step = -(-len(data) // len(MPNET.parts))
    for i, part in enumerate(MPNET.parts):
        path = tmp_path / "site" / part
        path.parent.mkdir(parents=True)
        (tmp_path / "site" / part.partition("/")[0] / "__init__.py").write_text("raise ImportError('imported')")
        path.write_bytes(data[i * step : (i + 1) * step])
    monkeypatch.syspath_prepend(tmp_path / "site")
    return replace(MPNET, file_bytes=len(data), file_sha256=hashlib.sha256(data).hexdigest())


def test_what_is_wanted_is_taken_out_of_the_joined_parts_and_kept(
    stand_in: Packaged, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = bundled.folder(stand_in)
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != bundled.RECORD}
    assert found == {Path(name).name: content for name, content in HELD.items()}
    (folder / "config.json").write_bytes(b"{}")  # a damaged copy is made anew
    capsys.readouterr()
    assert (bundled.folder(stand_in) / "config.json").read_bytes() == HELD["all-mpnet-base-v2/config.json"]
    assert "damaged" in capsys.readouterr().err


def test_another_file_is_refused_and_nothing_is_kept(stand_in: Packaged) -> None:
    with pytest.raises(UserError, match="not the published all-mpnet-base-v2"):
        bundled.folder(replace(stand_in, parts=stand_in.parts[::-1]))
    assert [path.name for path in bundled.cache_folder().iterdir()] == ["bundled.lock"]


def test_it_is_no_model_to_train_or_judge_with() -> None:
    with pytest.raises(UserError, match="there is no model 'all-mpnet-base-v2'"):
        resolve("all-mpnet-base-v2")
