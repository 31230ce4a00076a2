"""What every test runs under: few threads, little for the garbage collector, and no GPU tests without a GPU."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

# Before torch is imported, and for the processes that tests start: the models here are too small to share out.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Libraries and test modules make a million objects that stay: the collector is kept from them while they are made, and
# for good once all are there. Without this it goes through all of them again and again, in forks too, where looking at
# an object copies its page: a fifth of all the seconds.
gc.disable()

if not torch.cuda.is_available():
    # Before anything imports Triton, whose own functions are defined one way or the other: compiled, or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


IN_MEMORY = Path("/dev/shm")
ROOM = 4e9
"""Bytes that have to be free there."""
FOLDERS = "PYTEST_DEBUG_TEMPROOT"
"""pytest's own variable: where it makes the folders of the tests."""
MADE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """The folders of the tests in memory, where it has room: on a slow disk tests that train wait for a quarter of
    their time until files are flushed and removed. Workers take over what the process that starts them has. To look
    into the files of a failure, give --basetemp."""
    if FOLDERS not in os.environ and IN_MEMORY.is_dir() and shutil.disk_usage(IN_MEMORY).free > ROOM:
        os.environ[FOLDERS] = config.stash[MADE] = tempfile.mkdtemp(prefix="equipoise-tests-", dir=IN_MEMORY)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Memory is given back, whatever the outcome: what failing runs left would add up there."""
    if made := config.stash.get(MADE, None):
        del os.environ[FOLDERS]
        shutil.rmtree(made, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model over whole words to train, in the Hugging Face format."""
    from tests.tiny import words_folder

    return words_folder(tmp_path_factory.mktemp("models") / "words", prompt=None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as training leaves one."""
    from tests.tiny import words_folder

    return words_folder(tmp_path_factory.mktemp("models") / "tiny")
