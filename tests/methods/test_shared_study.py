"""A study by several processes: the files of one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipoise import cli
from equipoise.methods.study import METHODS, StudyConfig, study
from tests.ranked import only_first_has_disk, rank, together
from tests.tiny import words_folder

from .test_study import config, contents, quiet, trained


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    base = words_folder(folder / "base", prompt=None)
    return base, trained(base, folder / "ppo")


def making(asked: StudyConfig, cache: Path) -> Callable[[], int]:
    def work() -> int:
        only_first_has_disk(cache)
        os.environ["EQUIPOISE_CACHE"] = str(cache / f"cache-{rank()}")
        return cli.run_command(lambda _: study(asked, quiet).exit_code, [])

    return work


def asked(models: tuple[Path, Path], where: Path, **changes: Any) -> StudyConfig:
    return config(models[0], where / "study", trained=str(models[1]), **changes)


def record(where: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((where / "study" / "study.json").read_text())
    del document["provenance"], document["settings"]["output_dir"]
    return document


@pytest.mark.parametrize(
    ("size", "methods"),
    [(2, "gen-filter"), *(pytest.param(size, "", marks=pytest.mark.slow) for size in (2, 4))],
)
def test_the_number_of_processes_changes_no_byte_of_a_study(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, methods: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for processes in (1, size):
        where = tmp_path / f"of {processes}"
        where.mkdir()
        wanted = asked(models, where, methods=methods, pieces=4)
        assert together(processes, making(wanted, where)) == [0] * processes
        found.append((contents(where / "study"), record(where)))
    assert found[0] == found[1]
    assert {name.removesuffix(".csv") for name in found[1][0] if name.endswith(".csv")} >= set(
        methods.split(",") if methods else METHODS
    )
