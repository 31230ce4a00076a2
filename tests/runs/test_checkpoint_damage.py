"""Checkpoints against real damage and a real full disk: refused in one line, and nothing untrue is ever loaded."""

import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from equipoise.errors import UserError
from equipoise.runs.checkpoint import newest, save_checkpoint
from tests.runs.checkpoints import assert_of_one_step, content, save, visible_and_hidden

# Damage


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def rewrite(**fields: object) -> Callable[[Path], object]:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# What is wrong: (the file, how it is damaged, what the message says of it)
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": ("model.safetensors", lambda file: os.truncate(file, 1000), "1000 bytes, 20072 were written"),
    "emptied": ("optimizer.safetensors", lambda file: os.truncate(file, 0), "0 bytes, 20072 were written"),
    "bit flipped in the middle": ("model.safetensors", lambda file: flip_bit(file, 8 * 2000 + 3), "its sha256 is not"),
    "last bit flipped": ("optimizer.safetensors", lambda file: flip_bit(file, 8 * 20072 - 1), "its sha256 is not"),
    "document edited": ("loop.json", lambda file: file.write_text('{"step": 101}'), "its sha256 is not"),
    "file missing": ("loop.json", lambda file: file.unlink(), "is missing"),
    "link in its place": ("loop.json", lambda file: os.symlink(file.rename(file.parent / "x"), file), "is missing"),
    "manifest empty": ("manifest.json", lambda file: file.write_bytes(b""), "Expecting value"),
    "manifest garbage": ("manifest.json", lambda file: file.write_bytes(b"\xff" * 99), "codec can't decode"),
    "manifest nested": ("manifest.json", lambda file: file.write_text("[" * 100_000), "nested more than 100 deep"),
    "manifest of another kind": ("manifest.json", rewrite(files=[]), "not a checkpoint's manifest"),
    "manifest without sizes": ("manifest.json", rewrite(files={"loop.json": 1}), "no size and sha256 for loop.json"),
    "manifest of the future": ("manifest.json", rewrite(format=2), "format 2, this version of equipoise reads 1"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_in_one_line_that_names_file_and_remedy(tmp_path: Path, name: str) -> None:
    victim, damage, fault = DAMAGES[name]
    for step in (40, 50, 100):
        save(tmp_path, step)
    damage(tmp_path / "checkpoint-100" / victim)
    before = content(tmp_path)
    with pytest.raises(UserError) as caught:
        newest(tmp_path)
    message = str(caught.value)
    assert f"checkpoint-100/{victim} is " in message and fault in message and "\n" not in message
    assert message.endswith(f"move {tmp_path}/checkpoint-100 away and rerun to continue from checkpoint-50")
    assert content(tmp_path) == before
    (tmp_path / "checkpoint-100").rename(tmp_path / "away")
    assert assert_of_one_step(tmp_path) == 50


def test_the_remedy_skips_older_damaged_checkpoints_and_is_a_new_start_where_none_is_intact(tmp_path: Path) -> None:
    for step in (40, 50, 100):
        save(tmp_path, step)
    for step, remedy in ((50, "continue from checkpoint-40"), (40, "start anew, or restore it from a backup")):
        flip_bit(tmp_path / f"checkpoint-{step}" / "model.safetensors", 5000)
        os.truncate(tmp_path / "checkpoint-100" / "model.safetensors", 10)
        with pytest.raises(UserError, match=f"rerun to {remedy}$"):
            newest(tmp_path)


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "sub/file.json", "..", "", ".hidden", "a\nb"])
def test_a_manifest_that_names_a_path_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    manifest = save(tmp_path, 100) / "manifest.json"
    data = json.loads(manifest.read_text())
    (tmp_path / "secret.json").write_text("{}")
    data["files"][name] = {"size": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}
    manifest.write_text(json.dumps(data))
    with pytest.raises(
        UserError, match=r"manifest\.json is damaged or of another version \(it names .* not a file of this folder\)"
    ):
        newest(tmp_path)


def test_a_checkpoint_copied_to_another_step_is_refused(tmp_path: Path) -> None:
    shutil.copytree(save(tmp_path, 50), tmp_path / "checkpoint-60")
    with pytest.raises(
        UserError, match=r"checkpoint-60/manifest\.json is .* \(it belongs to step 50\).*checkpoint-50$"
    ):
        newest(tmp_path)


def test_no_single_flipped_bit_in_any_file_loads_as_something_else(tmp_path: Path) -> None:
    path, dice, refused = save(tmp_path, 100, size=30), random.Random(1), 0
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for position in dice.sample(range(len(whole) * 8), 40):
            flip_bit(file, position)
            try:
                assert assert_of_one_step(tmp_path) == 100, (file, position)
                assert file.name == "manifest.json"  # the version of torch, which nothing is decided by
            except UserError:
                refused += 1
            file.write_bytes(whole)
    assert refused >= 150


# A disk that refuses


@pytest.mark.parametrize(
    ("number", "remedy", "call"),
    [
        *((errno.ENOSPC, "free some disk space", call) for call in range(1, 7)),
        (errno.EDQUOT, "free some disk space", 1),
        (errno.EROFS, "get the right to read and write", 1),
        (errno.EACCES, "get the right to read and write", 1),
        (errno.EIO, "check .* and its disk", 1),
    ],
)
def test_a_write_that_fails_at_any_sync_leaves_the_old_checkpoints_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str, call: int
) -> None:
    save(tmp_path, 50)
    save(tmp_path, 100)
    before, calls = content(tmp_path), iter(range(1, 100))

    def fail(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=f"cannot save .*/checkpoint-100 .*{os.strerror(number)}.*{remedy}"):
        save_checkpoint(tmp_path, 100, {"a": {"w": torch.ones(3)}, "b": {"w": torch.ones(3)}}, {"c": {}})
    if call < 6:  # the sixth follows the rename: then the new one is there, whole
        assert content(tmp_path) == before
    assert visible_and_hidden(tmp_path) == ({"checkpoint-50", "checkpoint-100"}, set())
    assert newest(tmp_path) is not None


def test_a_full_disk_is_reported_with_sizes_and_the_older_checkpoint_survives(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        save(tmp_path, 1, size=50_000)
        before = content(tmp_path)
        with pytest.raises(UserError, match=r"checkpoint-2 \(No space left on device\): it needs 2\.4 MB; free some"):
            save(tmp_path, 2, size=300_000)
        assert content(tmp_path) == before
        assert assert_of_one_step(tmp_path) == 1
        save(tmp_path, 2, size=50_000)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_where_the_folder_should_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for act in (
        lambda: save(tmp_path / "file", 1),
        lambda: newest(tmp_path / "file"),
        lambda: save(tmp_path / "file" / "sub", 1),
    ):
        with pytest.raises(UserError, match="Not a directory"):
            act()
    assert (tmp_path / "file").read_text() == "mine"
