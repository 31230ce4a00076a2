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
from equipoise.policy.hadamard import group_of
from equipoise.policy.hosted import keep_embedding_on_host
from equipoise.policy.kernels import rotated, rounding
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
    kept = loaded(model, True, eightbit.ROTATED)
    del kept
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("into", [torch.int8, eightbit.ROTATED])
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
    """To bfloat16's rounding, and to that of sums of up to 28,672 products, of which the tensor cores keep 14 bits."""
    assert (found.float().cpu() - expected.float()).norm() <= 7e-3 * expected.float().norm()


@pytest.mark.parametrize("rows", [1, 3, 64, 200, 1280])
@pytest.mark.parametrize(("outputs", "inner"), [(1024, 4096), (96, 14336), (28672, 256), (40, 72)])
def test_rotated_products_are_those_of_the_plain_twin(rows: int, outputs: int, inner: int) -> None:
    weight, x, upstream = numbers(outputs, inner, 0), numbers(rows, inner, 1), numbers(rows, outputs, 2)
    w = eightbit.quantise(weight, eightbit.ROTATED)
    on_gpu = eightbit.Rounded(w.q.cuda(), w.scale.cuda())
    rotated.prepare(on_gpu.q.device)
    found, expected = rounding.quantise(x.cuda(), group_of(inner)), eightbit._quantised(x, eightbit.ROTATED)
    torch.testing.assert_close(found.scale.cpu(), expected.scale, rtol=1e-6, atol=0)
    # A value between two integers may fall to either side by the last bit of the scale.
    assert (found.q.cpu() != expected.q).float().mean() < 3e-3
    near(rotated.product(x.cuda(), *on_gpu), eightbit.product(x, *w, eightbit.ROTATED))
    near(rotated.product_back(upstream.cuda(), *on_gpu), eightbit.product_back(upstream, *w, eightbit.ROTATED))


@pytest.mark.parametrize(("outputs", "inner"), [(6144, 4096), (4096, 14336)])
def test_a_row_is_the_same_whatever_is_computed_beside_it(outputs: int, inner: int) -> None:
    x, w = numbers(1280, inner, 1).cuda(), eightbit.quantise(numbers(outputs, inner, 0).cuda(), eightbit.ROTATED)
    rotated.prepare(x.device)
    whole = rotated.product(x, *w)
    assert all(torch.equal(rotated.product(x[:rows], *w), whole[:rows]) for rows in (1, 16, 40, 64, 65, 200, 768))


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
    qs = [eightbit.quantise(numbers(*size, i), eightbit.ROTATED).q.cuda() for i, size in enumerate(sizes)]
    rotated.prepare(qs[0].device)

    def turned() -> list[torch.Tensor]:
        following = [*qs[1:], None]
        return [rotated.transposed(q, after).clone() for q, after in zip(qs, following, strict=True)]

    rotated.transposed(qs[2], qs[0])  # a pass that failed half way has left this
    found = turned()
    if recorded:
        rotated.transposed(qs[2], qs[0])
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            found = turned()
        for each in found:
            each.view(torch.uint8).zero_()
        graph.replay()
    torch.cuda.synchronize()
    expected = [q.float().to(torch.float8_e4m3fn).float().t() for q in qs]
    assert all(torch.equal(f.float(), e) for f, e in zip(found, expected, strict=True))
    assert not rotated._ahead


def test_an_embedding_of_its_own_is_read_from_the_hosts_memory() -> None:
    model = loaded("shape:llama-3.1-8b:1", True, eightbit.ROTATED)
    assert not keep_embedding_on_host(model)  # it may be trained yet
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    weight, tokens = embedding.weight.detach().cpu(), torch.randint(128256, (3, 700), device="cuda")
    before, expected = torch.cuda.memory_allocated(), embedding(tokens)
    assert keep_embedding_on_host(model)
    assert torch.cuda.memory_allocated() < before - 1e9
    assert embedding.weight.is_cuda and torch.equal(embedding.weight.cpu(), weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = embedding(tokens)
    graph.replay()
    assert torch.equal(found, expected)
    # A head that shares the weights reads all of them.
    model.get_output_embeddings().weight = embedding.weight
    assert not keep_embedding_on_host(model)
