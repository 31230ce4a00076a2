"""Two GPUs against one, at the shape of the 8B model cut to four layers."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
ROOT = Path(__file__).parents[2]


def members(count: int, work: str, folder: Path, shape: str = "llama-3.1-8b", layers: int = 4) -> None:
    """Have so many processes do the work in bfloat16."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.gpu.members", work, str(folder), shape, str(layers), "bfloat16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


Load = Callable[[str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Gradients of one recorded mini-batch, by dtype, pieces, processes and rank, and masters after steps."""
    folder = tmp_path_factory.mktemp("lora")
    members(1, "gradients+cut", folder)
    members(2, "gradients+cut+steps", folder)
    return lambda name: load_file(folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def gradients(lora: Load) -> Callable[[str], Tensor]:
    return lambda name: lora(name)["gradient"].double()


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# What differs between two runs of the same pieces is the order in which kernels add.
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_gradients_of_recorded_rollouts_are_those_of_one_gpu(
    gradients: Callable[[str], Tensor], dtype: str, most: float
) -> None:
    one, two, other = (gradients(f"{dtype}-2-{name}") for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(two, other) and one.norm() > 0
    print(f"{dtype}: two processes from one {apart(two, one):.2e}")
    assert apart(two, one) <= most, f"{apart(two, one):.2e}"


def test_two_processes_round_no_worse_than_one_piece(gradients: Callable[[str], Tensor]) -> None:
    exact, one, two = (gradients(name) for name in ("float32-1-1-0", "bfloat16-1-1-0", "bfloat16-2-2-0"))
    pieces = apart(gradients("float32-2-1-0"), exact)
    found = f"from float32: one piece {apart(one, exact):.2e}, two processes {apart(two, exact):.2e}; two pieces in "
    found += f"float32 {pieces:.2e}; two processes from one piece {apart(two, one):.2e}"
    print(found)
    assert apart(two, exact) <= 1.5 * apart(one, exact) and pieces <= 1e-4, found


def test_after_twenty_steps_with_graphs_both_ranks_hold_the_same_bits(lora: Load) -> None:
    first, second = lora("steps-2-0"), lora("steps-2-1")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_two_gpus_with_half_of_each_layer_compute_the_gradients_of_one(gradients: Callable[[str], Tensor]) -> None:
    one, two, other = (gradients(f"cut-float32-1-{name}") for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(two, other) and one.norm() > 0
    assert apart(two, one) <= 1e-4, f"{apart(two, one):.2e}"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """States of SmolLM2, all of whose weights are trained, by what was done, processes and rank."""
    folder = tmp_path_factory.mktemp("full")
    members(1, "given", folder, "bundled")
    members(2, "given+full", folder, "bundled")
    return lambda name: load_file(folder / f"{name}.safetensors")


def test_sharded_states_of_two_gpus_are_those_of_one_to_the_last_bit(full: Load) -> None:
    one, two, other = (full(f"given-{name}") for name in ("1-0", "2-0", "2-1"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert other and all(torch.equal(one[name], other[name]) for name in other)


def test_full_fine_tuning_on_two_gpus_holds_one_model_and_is_restored_from_rank_0(
    full: Load,
) -> None:
    first, second, restored, again = map(full, ("full-2-0", "full-2-1", "restored-2-0", "restored-2-1"))
    used = [name for name in first if name.startswith("used.")]
    assert all(torch.equal(first[name], second[name]) for name in used)
    assert all(torch.equal(first[name], first[name.removeprefix("used.")].to(first[name].dtype)) for name in used)
    assert all(torch.equal(first[name], restored[name]) for name in first)
    assert all(torch.equal(first[name], again[name]) for name in used)
