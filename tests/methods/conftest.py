"""A tiny random model in the Hugging Face format, as training leaves one."""

from pathlib import Path

import pytest

from tests.tiny import words_folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "tiny")
