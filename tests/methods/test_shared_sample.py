"""The files and the accounts of every method, written by several processes: those of one."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipoise import cli
from equipoise.commands import sample as commands
from equipoise.errors import UserError
from equipoise.methods import kl, prompted
from equipoise.methods.ctrlg import distil
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.gen_filter import Draws, Wanted, raw_path
from equipoise.methods.sample import SampleConfig, sample
from equipoise.protocol.task import PROTOCOL
from tests.ranked import rank, together
from tests.tiny import words_folder

from .test_sample import config, costs, quiet, read

SMALL = CtrlGConfig(hidden_states=8, distil_sentences=220, em_passes=2)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "words", prompt=None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "base", seed=5)


def wanted(method: str, models: dict[str, Path], where: Path) -> SampleConfig:
    """A run of the method whose every part has more batches than there are processes."""
    if method == "ctrlg":
        more: dict[str, Any] = {"prompt": "raw", "ctrlg": SMALL, "max_new_tokens": 32, "batch_size": 8, "n": 2}
        return config(models["words"], where / "out.csv", method, kl_sentences=60, **more)
    if method == "gen-filter":
        return config(models["tiny"], where / "out.csv", method, max_new_tokens=16)
    return config(models["tiny"], where / "out.csv", method, base_model=str(models["base"]), kl_sentences=40)


def writing(asked: SampleConfig, cache: Path) -> Callable[[], int]:
    def work() -> int:
        os.environ["EQUIPOISE_CACHE"] = str(cache / str(rank()))
        return cli.run_command(lambda _: sample(asked, quiet).exit_code, [])

    return work


def files(where: Path) -> dict[str, Any]:
    """Everything that the run leaves, but for what time decides."""
    found: dict[str, Any] = {"costs": costs(where / "out.csv")}
    found |= {p.name: p.read_bytes() for p in (where / "out.csv", raw_path(where / "out.csv")) if p.exists()}
    found |= {p.name: p.read_bytes() for p in (where / "0").glob("ctrlg-*")}
    return found


METHODS = ["prompt-only", "gen-filter", "ctrlg"]


@pytest.fixture(scope="module")
def alone(
    tiny_model: Path, words: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, Any], dict[str, Path]]]:
    """What one process writes, and the models."""
    models, made = {"tiny": tiny_model, "words": words, "base": base}, dict[str, Any]()

    def of(method: str) -> tuple[dict[str, Any], dict[str, Path]]:
        if method not in made:
            where = tmp_path_factory.mktemp("alone")
            assert together(1, writing(wanted(method, models, where), where)) == [0]
            made[method] = files(where)
        return made[method], models

    return of


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_processes_changes_no_byte_of_rows_account_and_hidden_markov_model(
    alone: Any, tmp_path: Path, method: str, size: int
) -> None:
    expected, models = alone(method)
    assert together(size, writing(wanted(method, models, tmp_path), tmp_path)) == [0] * size
    found = files(tmp_path)
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name
    assert "kl" in found["costs"] and found["costs"]["kl"]["value"] != 0
    assert len(found) == {"prompt-only": 2, "gen-filter": 3, "ctrlg": 3}[method]
    assert os.listdir(tmp_path / "1") == [] if (tmp_path / "1").exists() else True  # rank 0's disk is enough
