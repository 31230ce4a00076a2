"""Whose folders a run is given. Light runs: the code that claims folders and logs rows, without a model."""

import errno
import fcntl
import json
import logging
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import cli
from equipoise.errors import UserError
from equipoise.methods.target import prepared
from equipoise.policy.eightbit import NAMES, ROTATED
from equipoise.ppo import claim
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.run import Run
from equipoise.runs import locks
from equipoise.runs.files import write_whole
from equipoise.runs.ownership import OWNER
from tests.killing import exit_code, in_child

from .light import light, refused, rows_of, work
from .small import changed


@pytest.mark.parametrize("moved", ["folder", "each", "named"])
def test_with_the_checkpoints_gone_nothing_is_cut(tmp_path: Path, moved: str) -> None:
    work(light(tmp_path), 5, saved=3)
    config = light(tmp_path)
    if moved == "folder":
        (tmp_path / "checkpoints").rename(tmp_path / "away")
    elif moved == "each":
        (tmp_path / "checkpoints" / "checkpoint-3").rename(tmp_path / "away")
    else:
        config = light(tmp_path, checkpoints="others")
    refused(config, tmp_path, r"run's records .*no checkpoint to continue from: name .*--checkpoint-dir.*--overwrite")
    work(config, 2, overwrite=True)
    assert [step for step, _ in rows_of(tmp_path / "out")] == [1, 2]


def test_killed_before_its_first_checkpoint_a_run_begins_again(tmp_path: Path) -> None:
    work(light(tmp_path), 5)
    work(light(tmp_path), 2)
    assert [step for step, _ in rows_of(tmp_path / "out")] == [1, 2]


def test_moved_together_the_folders_are_still_one_run(tmp_path: Path) -> None:
    work(light(tmp_path), 5, saved=5)
    (tmp_path / "out").rename(tmp_path / "o")
    (tmp_path / "checkpoints").rename(tmp_path / "c")
    work(light(tmp_path, "o", "c"), 2)
    assert [step for step, _ in rows_of(tmp_path / "o")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_targets_sentences_may_lie_elsewhere_and_no_others_may_take_their_place(tmp_path: Path) -> None:
    def on(target: str, file: str) -> TrainConfig:
        return light(tmp_path, warm_start_target=target, warm_start_file=file)

    work(on("near", "/cache/near-00ff.csv"), 3, saved=2)
    work(on("near", "/moved/near-11aa.csv"), 1)
    assert claim.as_begun(on("near", "")) == on("near", "")  # they are gone
    for other in (on("even", "/cache/even-00ff.csv"), on("near", "/cache/mine.csv"), on("off", "/cache/near-00ff.csv")):
        refused(other, tmp_path, r"holds a run with other settings \(.*warm-start-")
    with pytest.raises(UserError, match=r"holds a run with other settings \(seed: 0 → 1\)"):
        claim.as_begun(light(tmp_path, warm_start_target="near", seed=1))


def test_a_run_goes_on_with_the_targets_sentences_that_it_began_with_where_they_are_still_there(tmp_path: Path) -> None:
    """Another version may name them otherwise, and would write them again, in minutes, though they are learnt."""
    file, rates = tmp_path / "even-00ff.csv", tmp_path / "even-00ff.csv.json"
    config = light(tmp_path, warm_start_target="even")
    assert claim.as_begun(config) == config
    work(light(tmp_path, warm_start_target="even", warm_start_file=str(file)), 3, saved=2)
    for path in (file, rates):
        assert claim.as_begun(config) == config
        path.write_text("")
    made = claim.as_begun(config)
    assert made.warm_start.warm_start_file == str(file)
    assert prepared(made).evaluation.pair_rates == str(rates)
    assert prepared(changed(made, pair_rates="mine.json")).evaluation.pair_rates == "mine.json"


def test_another_output_folder_does_not_take_a_runs_checkpoints(tmp_path: Path) -> None:
    work(light(tmp_path), 5, saved=5)
    refused(light(tmp_path, out="other"), tmp_path, r"checkpoints of the run in .*out: name that --output-dir")


@pytest.mark.parametrize("shared", ["out", "checkpoints"])
def test_two_runs_at_a_time_do_not_share_a_folder(tmp_path: Path, shared: str) -> None:
    other = light(tmp_path, **({"checkpoints": "c2"} if shared == "out" else {"out": "o2"}), seed=1)
    with Run.open(light(tmp_path), overwrite=False), pytest.raises(UserError, match=f"training in .*{shared}: wait"):
        Run.open(other, overwrite=True)
    work(light(tmp_path), 1)


def test_a_run_of_before_runs_had_names_goes_on(tmp_path: Path) -> None:
    work(light(tmp_path), 5, saved=5)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    del record["written_by"], record["run"]
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    (tmp_path / "checkpoints" / OWNER).unlink()
    work(light(tmp_path), 2)
    assert len(rows_of(tmp_path / "out")) == 7
    (tmp_path / "out" / "run.json").write_text(json.dumps({"config": record["config"]}))  # not the exact shape
    (tmp_path / "checkpoints" / OWNER).unlink()
    refused(light(tmp_path), tmp_path, "no run of equipoise wrote", overwrite=True)


@pytest.mark.parametrize("damage", [b"", b"{", b"[" * 100_000, b'{"mine": 1}', b"\xff\x00"])
def test_a_damaged_record_does_not_keep_a_run_from_going_on(tmp_path: Path, damage: bytes) -> None:
    work(light(tmp_path), 5, saved=5)
    (tmp_path / "out" / "run.json").write_bytes(damage)
    work(light(tmp_path), 2)
    assert len(rows_of(tmp_path / "out")) == 7
    assert (tmp_path / "out" / "run.json.damaged-1").read_bytes() == damage
    (tmp_path / "out" / "run.json").write_bytes(damage)
    shutil.rmtree(tmp_path / "checkpoints")  # now nothing says whose it is
    refused(light(tmp_path), tmp_path, r"no run of equipoise wrote \(its run.json is damaged", overwrite=True)


@pytest.mark.parametrize("name", ["README.md", "task.yaml", "tokenizer.model", "run.json", "export.json"])
def test_users_files_are_not_replaced_with_overwrite_either(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"files": ["README.md"]}')
    for overwrite in (False, True):
        refused(light(tmp_path), tmp_path, r"no run of equipoise wrote|did not write it", overwrite)
    assert os.listdir(tmp_path / "out") == [name]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "tokenizer.json"])
def test_a_models_file_that_its_user_changed_is_not_replaced(tmp_path: Path, name: str, overwrite: bool) -> None:
    work(light(tmp_path), 3, saved=3)
    as_exported = [sha256(b"as exported").hexdigest()]
    files = {each: as_exported for each in ("README.md", "model.safetensors", "tokenizer.json")}
    (tmp_path / "out" / "export.json").write_text(json.dumps({"written_by": "equipoise", "files": files}))
    for each in files:
        (tmp_path / "out" / each).write_bytes(b"mine" if each == name else b"as exported")
    refused(light(tmp_path, steps=2000), tmp_path, f"{name} was changed since equipoise wrote it", overwrite)
    (tmp_path / "out" / name).rename(tmp_path / "out" / "mine.txt")
    work(light(tmp_path, steps=2000), 1, overwrite=overwrite)
    assert (tmp_path / "out" / "mine.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("place", ["checkpoint-2", "checkpoint-2/below", "nonfinite", "./x/../checkpoint-10"])
@pytest.mark.parametrize("option", ["output_dir", "tensorboard_dir"])
def test_no_folder_lies_where_a_checkpoint_will(tmp_path: Path, place: str, option: str) -> None:
    config = light(tmp_path, **{option: f"{tmp_path}/checkpoints/{place}"})
    refused(config, tmp_path, "where training keeps its (checkpoint-|nonfinite).*choose another --" + option[:6])
    assert not any(tmp_path.iterdir())
    work(light(tmp_path), 1, saved=1)  # and not among another run's, which are known by their record
    refused(light(tmp_path, out=f"checkpoints/{place}", checkpoints="others"), tmp_path, "where training keeps its")
    refused(light(tmp_path, out="new", checkpoints=f"checkpoints/{place}"), tmp_path, "choose another --checkpoint-dir")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_refused_start_leaves_nothing_behind(tmp_path: Path, overwrite: bool) -> None:
    """Neither folders, where the start is refused before it begins, nor records, where it is refused later."""
    work(light(tmp_path), 3, saved=3)
    before = sorted(tmp_path.rglob("*"))

    def no_prompts() -> dict[str, str]:
        raise UserError("no prompts")

    for made in (light(tmp_path, out="a/b", checkpoints="c/d"), light(tmp_path, out="out", checkpoints="c/d")):
        with pytest.raises(UserError):
            Run.open(made, overwrite=overwrite, prompts=no_prompts)
        assert sorted(tmp_path.rglob("*")) == before
    with (
        pytest.raises(UserError, match="later"),
        Run.open(light(tmp_path, out="a/b", checkpoints="c/d"), overwrite=overwrite),
    ):
        raise UserError("later")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("mine")
    with pytest.raises(UserError, match="later"), Run.open(light(tmp_path, out="a", checkpoints="c"), overwrite=False):
        raise UserError("later")
    assert os.listdir(tmp_path / "a") == ["mine"]


@pytest.mark.parametrize("rows", [0, 1])
def test_a_refusal_removes_nothing_that_an_earlier_start_or_a_step_left(tmp_path: Path, rows: int) -> None:
    if not rows:
        work(light(tmp_path), 0)
    with pytest.raises(UserError, match="later"), Run.open(light(tmp_path), overwrite=False) as run:
        if rows:
            run.log.step(1, {"reward/mean": 0.0, "compliance/both": 0.0, "kl/ref": 0.0}, {})
        raise UserError("later")
    assert {"run.json", "events.jsonl", "training_metrics.csv"} <= set(os.listdir(tmp_path / "out"))


def test_overwrite_deletes_no_checkpoint_that_holds_anything_else(tmp_path: Path) -> None:
    work(light(tmp_path), 3, saved=3)
    notes = tmp_path / "checkpoints" / "checkpoint-3" / "notes.txt"
    notes.write_text("mine")
    theirs = tmp_path / "checkpoints" / "checkpoint-9"
    theirs.mkdir()
    (theirs / "manifest.json").write_text('{"mine": true}')
    (tmp_path / "far").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-8").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "manifest.json").write_text("{}")
    (tmp_path / "checkpoints" / "nonfinite").mkdir()
    (tmp_path / "checkpoints" / "nonfinite" / "mine").write_text("mine")
    work(light(tmp_path), 1, overwrite=True)
    texts = sorted(p.read_text() for p in tmp_path.rglob("*") if p.name in ("notes.txt", "mine", "manifest.json"))
    ours = next(tmp_path.rglob("notes.txt")).with_name("manifest.json").read_text()
    assert texts == sorted(['{"mine": true}', "mine", "mine", ours, "{}"])


@pytest.mark.parametrize(
    "name", ["out/training_metrics.csv", "out/events.jsonl", "out/run.json", "checkpoints/records.json"]
)
def test_nothing_is_written_through_a_planted_link(tmp_path: Path, name: str) -> None:
    work(light(tmp_path), 1)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "mine")
    for overwrite in (False, True):
        with pytest.raises(UserError):
            Run.open(light(tmp_path), overwrite=overwrite)
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / name).is_symlink()


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl", "samples.jsonl", "training_metrics.csv"])
@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"{}\n", b"null\n"])
def test_a_damaged_log_is_set_aside_and_goes_on_with_its_good_lines(
    tmp_path: Path, name: str, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    work(light(tmp_path), 3, saved=3)
    path = tmp_path / "out" / name
    good = path.read_bytes()
    path.write_bytes(good + damage)
    work(light(tmp_path), 0)
    assert f"{name} was damaged" in capsys.readouterr().out
    assert path.read_bytes().startswith(good) and damage not in path.read_bytes()
    assert path.with_name(f"{name}.damaged-1").read_bytes() == good + damage


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_works_with_a_word(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING):
        work(light(tmp_path), 3, saved=3)
        work(light(tmp_path), 1)
    told = [r.getMessage() for r in caplog.records if "no locks" in r.getMessage()]
    assert len(told) == len(set(told)) and any(str(tmp_path / "out") in line for line in told)


def test_a_lock_leaves_nothing_behind_and_the_dead_hold_none(tmp_path: Path) -> None:
    with locks.FolderLock(tmp_path, "busy"):
        assert os.listdir(tmp_path) == [locks.LOCK]
        with pytest.raises(UserError, match="another process is busy"):
            locks.FolderLock(tmp_path, "busy")
    assert os.listdir(tmp_path) == []
    (tmp_path / locks.LOCK).write_text("")  # of a killed process
    with locks.FolderLock(tmp_path, "busy"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_disk_or_a_lost_right_is_one_line_at_every_file(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th file that is opened for writing fails, for every n until none does."""
    plain = os.open
    left = 0

    def failing(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        nonlocal left
        if flags & (os.O_WRONLY | os.O_RDWR) and str(tmp_path) in str(path):
            left -= 1
            if left == 0:
                raise OSError(number, os.strerror(number), str(path))
        return plain(path, flags, *args, **kwargs)

    for n in range(1, 40):
        left = n
        monkeypatch.setattr(os, "open", failing)
        try:
            work(light(tmp_path / str(n)), 1)
        except UserError as error:
            assert os.strerror(number) in str(error) and "\n" not in str(error)
        monkeypatch.setattr(os, "open", plain)
        if left > 0:
            assert n > 5
            return
        work(light(tmp_path / str(n)), 1)  # and it goes on once there is room
    pytest.fail("it never got through")


def test_with_no_room_for_a_file_a_real_process_says_so(tmp_path: Path) -> None:
    def with_little_room() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        with open(os.devnull, "w") as nowhere:
            sys.stderr = nowhere
            return cli.run_command(lambda _: work(light(tmp_path), 3) or 0, [])

    assert exit_code(in_child(with_little_room)) == 2
    work(light(tmp_path), 3)
    assert len(rows_of(tmp_path / "out")) == 3


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="File name too long"):
        write_whole(tmp_path / ("n" * 250), "new")
    assert os.listdir(tmp_path) == ["a"]


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its writers take most of the time."""
    from equipoise.ppo.log import RunLog

    monkeypatch.setattr(RunLog, "_open_tensorboard", lambda *_: None)
    yield


def test_the_format_of_the_frozen_weights_is_on_record_and_a_change_of_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, record = light(tmp_path, use_8bit=True), tmp_path / "out" / "run.json"
    for into, line in [(torch.int8, ""), (ROTATED, "rounded to int8 so far, and are to rotated int8"), (ROTATED, "")]:
        monkeypatch.setattr(claim, "eight_bits", lambda *_, into=into: into)
        capsys.readouterr()
        work(config, 2, saved=1)
        assert json.loads(record.read_text())["base_weights"] == NAMES[into]
        told = [said for said in capsys.readouterr().out.splitlines() if "frozen weights" in said]
        assert len(told) == bool(line) and line in "".join(told)
    monkeypatch.setattr(claim, "eight_bits", lambda *_: None)
    work(light(tmp_path / "other"), 1)
    assert "base_weights" not in json.loads((tmp_path / "other" / "out" / "run.json").read_text())
