"""A tiny model to train, read-only and shared by all tests."""

from pathlib import Path

import pytest

from tests.tiny import words_folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "words", prompt=None)
