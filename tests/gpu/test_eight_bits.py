"""Weights in 8 bits on a GPU: the bytes of the whole model's, and no more memory than one matrix besides."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from equipoise.policy import eightbit
from equipoise.policy.config import PolicyConfig
from equipoise.policy.eightbit import to_eight_bits
from equipoise.policy.source import resolve
from equipoise.policy.weights import load_model
from equipoise.ppo.machine import Work, need

pytestmark = pytest.mark.gpu
BFLOAT16 = torch.bfloat16


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def loaded(model: str, streamed: bool, into: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    made = load_model(resolve(model), dtype=BFLOAT16, device="cuda", eight_bits=into if streamed else None)
    to_eight_bits(made, into)
    return made


def peak_of_loading(model: str) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = loaded(model, True, eightbit.FP8)
    del kept
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("into", [torch.int8, eightbit.FP8])
def test_streamed_weights_are_those_of_the_whole_model(tmp_path: Path, into: torch.dtype) -> None:
    load_model(resolve("shape:llama-3.1-8b:2"), dtype=BFLOAT16, device="cpu").save_pretrained(
        tmp_path, max_shard_size="300MB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for model in (str(tmp_path), "shape:llama-3.1-8b:2"):
        whole, streamed = (dict(loaded(model, streamed, into).named_buffers()) for streamed in (False, True))
        assert whole.keys() == streamed.keys() and sum(name.endswith(".q") for name in whole) == 14
        assert all(torch.equal(whole[n].view(torch.uint8), streamed[n].view(torch.uint8)) for n in whole)
    work = Work(4, 8, 30, 20)
    planned = need(PolicyConfig("shape:llama-3.1-8b:2", use_8bit=True), resolve("shape:llama-3.1-8b:2"), work).loading
    assert peak_of_loading(str(tmp_path)) <= 1.02 * planned


@pytest.mark.parametrize("model, most", [("shape:llama-3.1-8b", 12e9), ("shape:llama-3.1-70b:20", 26e9)])
def test_loading_takes_what_was_planned(model: str, most: float) -> None:
    planned = need(PolicyConfig(model, use_8bit=True), resolve(model), Work(4, 8, 30, 20)).loading
    assert peak_of_loading(model) <= min(1.02 * planned, most)
