"""GRPO, RLOO and REINFORCE++ as TRL's and verl's own code computes them, in an environment of their own."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from equipoise.policy.rollout import Rollout
from equipoise.ppo import maths
from equipoise.ppo.advantages import estimate
from equipoise.ppo.config import PPOConfig
from equipoise.ppo.experience import Experience, Scored
from equipoise.ppo.update import columns_of
from tests.tiny import tiny_folder

INTERPRETER = os.environ.get("EQUIPOISE_TRAINERS", "")
"""A Python with TRL and verl; `make test-slow` makes one."""
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not INTERPRETER, reason="needs EQUIPOISE_TRAINERS: make test-slow")]
BETA = 0.2


def run(script: str, *arguments: str) -> dict[str, Tensor]:
    """The tensors that the script leaves in the file of its last argument."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [INTERPRETER, str(ROOT / "tests/ppo" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return load_file(arguments[-1])


def rollout_of(mask_BT: Tensor) -> Rollout:
    lengths_B = mask_BT.sum(1)
    finished_B = torch.ones(len(mask_BT), dtype=torch.bool)
    return Rollout([[1]] * len(mask_BT), torch.ones_like(mask_BT, dtype=torch.long), lengths_B, finished_B)


def config_of(algorithm: Any, rows: int, group: int = 4, **changes: Any) -> PPOConfig:
    return PPOConfig(algorithm=algorithm, batch_size=rows, mini_batch_size=rows, num_generations=group, **changes)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_trls_trainers_have_the_same_advantages_and_losses(algorithm: str, tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model")
    found = run("with_trl.py", str(tmp_path / "model"), algorithm, str(tmp_path / "noted.safetensors"))
    mask, zeros = found["mask"].bool(), torch.zeros_like(found["old"])
    rollout, rows = rollout_of(mask), len(found["rewards"])
    scored = Scored(found["old"], zeros, zeros, zeros, found["reference"])
    ours = estimate(config_of(algorithm, rows), found["rewards"], scored, rollout, BETA).used_BT
    theirs = torch.where(mask, found["advantages"][:, None], 0.0)
    assert theirs.abs().max() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

    moved = []
    for number in range(4):
        given = {name.partition(".")[2]: x for name, x in found.items() if name.startswith(f"{number}.")}
        loss = loss_of(algorithm, given)
        assert float(loss) == pytest.approx(float(given["loss"]), abs=1e-5, rel=1e-4)
        moved.append(abs(float(loss)))
    assert max(moved) > 1e-3 or algorithm == "rloo"


def loss_of(algorithm: str, given: dict[str, Tensor]) -> Tensor:
    """Ours for the numbers of one of theirs."""
    mask = given["mask"].bool()
    old = given["old"]
    if old.dim() == 1:  # only the sum over a completion is on record, and only the sum counts
        old = torch.zeros(mask.shape).index_add(1, torch.tensor([0]), old[:, None])
    config = config_of(algorithm, len(mask))
    advantages = torch.where(mask, given["advantages"][:, None], 0.0)
    experience = Experience(rollout_of(mask), old, None, None, advantages, given.get("reference"), BETA)
    columns = {name: x[mask] for name, x in columns_of(experience, torch.arange(len(mask)), config.method).items()}
    new = given["new"][mask]
    row = torch.nonzero(mask)[:, 0] if "row" in columns else None
    loss = (maths.policy_loss(new, columns["old_logp"], columns["advantages"], 0.2, row).loss * columns["share"]).sum()
    if "reference" in columns:
        loss = loss + (maths.kl_k3(new, columns["reference"]) * columns["kl_weight"]).sum()
    return loss


def test_verls_functions_have_the_same_advantages(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (24,), generator=generator)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    kl = torch.where(mask, torch.randn(mask.shape, generator=generator), 0.0)
    paid = torch.tensor([-0.2, 0.3, 1.0])[torch.randint(3, (24,), generator=generator)]
    token_rewards = maths.token_rewards(paid, kl, mask, BETA)
    group = torch.arange(24) // 4
    scores = maths.token_rewards(paid, torch.zeros_like(kl), mask, 0.0)
    given = {"mask": mask.long(), "token_rewards": token_rewards, "scores": scores, "group": group}
    save_file(given, tmp_path / "given.safetensors")
    theirs = run("with_verl.py", str(tmp_path / "given.safetensors"), str(tmp_path / "found.safetensors"))
    rollout, zeros = rollout_of(mask), torch.zeros_like(kl)
    # Its deviation has n − 1, ours over all tokens of a batch, as PPO's, has n.
    tokens = int(mask.sum())
    bessel = (tokens / (tokens - 1)) ** 0.5
    scored = Scored(kl, zeros, zeros, zeros, zeros)
    for gamma in (1.0, 0.9):
        ours = estimate(config_of("reinforce++", 24, 0, gamma=gamma), paid, scored, rollout, BETA).used_BT
        torch.testing.assert_close(ours, theirs[f"reinforce++ {gamma}"] * bessel, atol=1e-5, rtol=1e-5)
    for algorithm in ("grpo", "rloo"):
        ours = estimate(config_of(algorithm, 24), paid, scored, rollout, 0.0).used_BT
        torch.testing.assert_close(ours, theirs[algorithm], atol=1e-5, rtol=1e-5)
