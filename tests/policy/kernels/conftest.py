"""The GPU kernels on the CPU, in Triton's interpreter, which has to be chosen before they are defined."""

import importlib.util
import os

import pytest
import torch

if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]  # tests/gpu runs the compiled kernels where there is a GPU
else:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> None:
    """NumPy warns of the infinities that the kernels work with on purpose."""
