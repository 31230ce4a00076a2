"""Layers cut over several processes, against the same model in one."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from equipoise import cli
from equipoise.errors import UserError
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.load import load_for_generation, load_policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.sample import sample_dealt
from equipoise.policy.score import score
from equipoise.policy.slices import SlicedLinear, check_cut
from equipoise.ppo.config import PPOConfig, TrainConfig
from equipoise.ppo.experience import Experience
from equipoise.ppo.train import train
from equipoise.ppo.training import new_optimizer
from equipoise.ppo.update import Update
from equipoise.runs.ranks import ALONE, Ranks, joined
from tests.default import PROMPTS
from tests.ranked import together, with_ranks

from .small import checkpoints, rows, small_config

ROWS = [[1, 2, 3], [4], [1, 2, 3], [2, 2], [4], [1, 2], [3], [1, 2, 3]]


def computed(model: Path, ranks: Ranks, packed: bool = True) -> dict[str, Tensor]:
    """Tokens, scores of policy and reference, and the adapters' gradients after one mini-batch."""
    config = PolicyConfig(str(model), device="cpu", dtype="float32", lora_rank=4, tensor_parallel=ranks.size)
    ranks = ranks.sharing_layers(ranks.size)
    torch.manual_seed(0)
    policy = load_policy(config, PROMPTS["raw"], ranks)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    optimizer = new_optimizer(TrainConfig(policy=config), policy, ranks)
    rollout = sample_dealt(policy, ROWS, SamplingConfig(max_new_tokens=6), torch.Generator().manual_seed(2), ranks)
    with torch.no_grad():
        own = score(policy, rollout, 1.0, packed=packed)
        reference = score(policy, rollout, 1.0, packed=packed, reference=True)
    old = torch.zeros(rollout.mask_BT.shape)
    old[rollout.mask_BT] = own.logprobs
    noise = torch.where(rollout.mask_BT, torch.randn(old.shape, generator=generator), 0.0)
    ppo = PPOConfig(batch_size=8, mini_batch_size=8, ppo_epochs=1)
    limit = RowLimit(5)  # two micro-batches
    experience = Experience(rollout, old, torch.zeros_like(old), noise, noise)
    update = Update(policy, optimizer, experience, [torch.arange(8)], ppo, 1.0, packed, limit, ranks)
    update.launch()
    gradients = {
        f"gradient.{kind}.{name}": x.clone()
        for kind, group in optimizer.groups.items()
        for name, x in group.split(group.total()).items()
    }
    scores = {"logprobs": own.logprobs, "values": own.values, "reference": reference.logprobs}
    return {"tokens": rollout.tokens_BT, "stats": update._launched[0][:5], **scores, **gradients}


@pytest.mark.parametrize("packed", [True, False])
def test_two_processes_with_half_of_each_layer_compute_what_one_does(
    model: Path, tmp_path: Path, packed: bool
) -> None:
    expected = computed(model, ALONE, packed)
    assert float(expected["gradient.value.value_head.weight"].norm()) > 0
    assert (expected["logprobs"] - expected["reference"]).abs().max() > 0.01  # the adapters do something

    def work(ranks: Ranks) -> None:
        found = computed(model, ranks, packed)
        save_file({name: x.contiguous() for name, x in found.items()}, tmp_path / f"{ranks.rank}.safetensors")

    with_ranks(2, work)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert torch.equal(first["tokens"], expected["tokens"])
    for name, x in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], x, atol=1e-5, rtol=1e-5, msg=name)
