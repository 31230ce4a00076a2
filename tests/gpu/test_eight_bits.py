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
from equipoise.policy.kernels import fp8
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


def numbers(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To bfloat16's rounding, and to that of sums of which the tensor cores keep 14 bits."""
    assert (found.float().cpu() - expected.float()).norm() <= 5e-3 * expected.float().norm()


@pytest.mark.parametrize("rows", [1, 3, 64, 200, 1280])
@pytest.mark.parametrize(("outputs", "inner"), [(1024, 4096), (96, 14336), (28672, 256), (40, 72)])
def test_fp8_products_are_those_of_the_plain_twin(rows: int, outputs: int, inner: int) -> None:
    weight, x, upstream = numbers(outputs, inner, 0), numbers(rows, inner, 1), numbers(rows, outputs, 2)
    w = eightbit.quantise(weight, eightbit.FP8)
    on_gpu = eightbit.Rounded(w.q.cuda(), w.scale.cuda())
    fp8.prepare(on_gpu.q.device)
    rounded, scale = fp8.quantise(x.cuda())
    expected = eightbit.quantise(x, eightbit.FP8)
    torch.testing.assert_close(scale.cpu(), expected.scale, rtol=2e-7, atol=0)
    # A value between two of FP8's may fall to either side by the last bit of the scale.
    assert (rounded.cpu().float() != expected.q.float()).float().mean() < 1e-3
    near(fp8.product(x.cuda(), *on_gpu), eightbit.product(x, *w))
    near(fp8.product_back(upstream.cuda(), *on_gpu), eightbit.product_back(upstream, *w))


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("rows", [1, 3, 64, 200])
@pytest.mark.parametrize(("outputs", "inner"), [(1024, 4096), (96, 1433), (40, 72)])
def test_int8_products_are_those_of_the_plain_twin(rows: int, outputs: int, inner: int, dtype: torch.dtype) -> None:
    weight, x, upstream = numbers(outputs, inner, 0), numbers(rows, inner, 1), numbers(rows, outputs, 2)
    x, upstream, w = x.to(dtype), upstream.to(dtype), eightbit.quantise(weight)
    most = 5e-3 if dtype == BFLOAT16 else 1e-5
    for product, of in ((eightbit.product, x), (eightbit.product_back, upstream)):
        found, expected = product(of.cuda(), w.q.cuda(), w.scale.cuda()).cpu().double(), product(of, *w).double()
        assert (found - expected).norm() <= most * expected.norm(), float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("recorded", [False, True])
def test_matrices_that_are_transposed_ahead_are_those_of_their_own_turn(recorded: bool) -> None:
    sizes = [(4096, 1024), (1024, 4096), (512, 512), (2048, 8192), (256, 48)]
    qs = [eightbit.quantise(numbers(*size, i), eightbit.FP8).q.cuda() for i, size in enumerate(sizes)]
    fp8.prepare(qs[0].device)

    def turned() -> list[torch.Tensor]:
        following = [*qs[1:], None]
        return [fp8.transposed(q, after).clone() for q, after in zip(qs, following, strict=True)]

    fp8.transposed(qs[2], qs[0])  # a pass that failed half way has left this
    found = turned()
    if recorded:
        fp8.transposed(qs[2], qs[0])
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = turned()
        for each in found:
            each.view(torch.uint8).zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(f.view(torch.uint8), q.view(torch.uint8).t()) for f, q in zip(found, qs, strict=True))
    assert not fp8._ahead
