"""What every test runs under: few threads, and no GPU tests without a GPU."""

import os
from pathlib import Path

# Before torch is imported, and for the processes that tests start: the models here are too small to share out.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton, whose own functions are defined one way or the other: compiled, or interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


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
