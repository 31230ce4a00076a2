"""Weights in 8 bits on a GPU: the bytes of the whole model's, and no more memory than one matrix besides."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from equipoise.policy.config import PolicyConfig
from equipoise.policy.int8 import to_eight_bits
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


def loaded(model: str, eight_bits: bool) -> nn.Module:
    torch.manual_seed(0)
    made = load_model(resolve(model), dtype=BFLOAT16, device="cuda", eight_bits=eight_bits)
    to_eight_bits(made)
    return made


def peak_of_loading(model: str) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = loaded(model, True)
    del kept
    return torch.cuda.max_memory_allocated() - before


def test_streamed_weights_are_those_of_the_whole_model(tmp_path: Path) -> None:
    load_model(resolve("shape:llama-3.1-8b:2"), dtype=BFLOAT16, device="cpu").save_pretrained(
        tmp_path, max_shard_size="300MB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for model in (str(tmp_path), "shape:llama-3.1-8b:2"):
        whole, streamed = (dict(loaded(model, eight).named_buffers()) for eight in (False, True))
        assert whole.keys() == streamed.keys() and sum(name.endswith(".q") for name in whole) == 14
        assert all(torch.equal(whole[name], streamed[name]) for name in whole)
    work = Work(4, 8, 30, 20)
    planned = need(PolicyConfig("shape:llama-3.1-8b:2", use_8bit=True), resolve("shape:llama-3.1-8b:2"), work).loading
    assert peak_of_loading(str(tmp_path)) <= 1.02 * planned


@pytest.mark.parametrize("model, most", [("shape:llama-3.1-8b", 12e9), ("shape:llama-3.1-70b:20", 26e9)])
def test_loading_takes_what_was_planned(model: str, most: float) -> None:
    planned = need(PolicyConfig(model, use_8bit=True), resolve(model), Work(4, 8, 30, 20)).loading
    assert peak_of_loading(model) <= min(1.02 * planned, most)
