import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm, silu

from equipoise.policy.eightbit import EightBitLinear
from equipoise.policy.kernels import activations, elementwise, embedding, int8
from equipoise.policy.kernels.adam import adam
from equipoise.policy.kernels.elementwise import Norm


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["rms", "offset", "layer"])
def test_the_norm_and_its_gradients_are_pytorchs(kind: str) -> None:
    torch.manual_seed(0)
    x, delta, more, upstream = torch.randn(4, 7, 96)
    h = (x + delta).requires_grad_()
    weight, bias = (torch.randn(96, requires_grad=True) for _ in range(2))
    if kind == "layer":
        expected = layer_norm(h, (96,), weight, bias, 1e-5)
        by = Norm(weight.detach(), 1e-5, bias=bias.detach())
    else:
        offset = float(kind == "offset")
        expected = rms_norm(h, (96,), weight + offset, 1e-5)
        by = Norm(weight.detach(), 1e-5, offset)
    found_h, found, rstd = elementwise.norm(x, by, delta)
    close(found, expected.detach())
    close(found_h, h.detach())
    close(elementwise.norm(h.detach(), by)[1], expected.detach())
    (expected * upstream).sum().backward()
    assert h.grad is not None and weight.grad is not None
    totals = (torch.ones(96), torch.ones(96))[: 2 if kind == "layer" else 1]
    found, sums = elementwise.norm_backward(upstream, found_h, by, rstd, more, True)
    for total, rows in zip(totals, sums, strict=True):
        elementwise.add_rows(total, rows)
    close(found, h.grad + more)
    close(totals[0], 1 + weight.grad)
    if bias.grad is not None:
        close(totals[1], 1 + bias.grad)
    found, none = elementwise.norm_backward(upstream, found_h, by, rstd, None, False)
    assert none == ()
    close(found, h.grad)


@pytest.mark.parametrize("then", [False, True])
def test_a_norm_before_the_sum_and_one_after_it_are_pytorchs(then: bool) -> None:
    torch.manual_seed(0)
    x, delta = torch.randn(2, 5, 40)
    first, second = torch.randn(2, 40)
    h, rstd, y, rstd_next = elementwise.add_normed(
        x, delta, Norm(first, 1e-3, 1.0), Norm(second, 1e-5, 1.0) if then else None
    )
    expected = x + rms_norm(delta, (40,), 1 + first, 1e-3)
    close(h, expected)
    close(rstd, torch.rsqrt(delta.square().mean(1) + 1e-3))
    close(y, rms_norm(expected, (40,), 1 + second, 1e-5) if then else expected)
    assert (rstd_next is not None) is then


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_activations_and_their_gradients_are_pytorchs(name: str, gated: bool) -> None:
    torch.manual_seed(0)
    x, upstream = torch.randn(5, 140 if gated else 70, requires_grad=True), torch.randn(5, 70)
    activated = silu(x[:, :70]) if name == "silu" else gelu(x[:, :70], approximate="tanh")
    expected = activated * x[:, 70:] if gated else activated
    number = activations.ACTIVATIONS[name]
    close(activations.activate(x.detach(), number, gated), expected.detach())
    (expected * upstream).sum().backward()
    assert x.grad is not None
    close(activations.activate_backward(x.detach(), upstream, number, gated)[0], x.grad)


@pytest.mark.parametrize("rank", [3, 16, 20])
@pytest.mark.parametrize("sizes", [(128,), (64, 64), (64, 32, 32)])
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_adapters_side_by_side_are_each_ones_product(rank: int, sizes: tuple[int, ...], rows: int) -> None:
    torch.manual_seed(0)
    out, more = torch.randn(2, rows, 128)
    low, b = torch.randn(rows, len(sizes) * rank), torch.randn(128, rank)
    parts = [low[:, i * rank : (i + 1) * rank] @ part.T for i, part in enumerate(b.split(sizes))]
    expected = out + 0.5 * torch.cat(parts, 1)
    torch.testing.assert_close(
        elementwise.add_adapters(out.clone(), low, b, sizes, 0.5, None), expected, rtol=1e-5, atol=1e-5
    )
    found = elementwise.add_adapters(out.clone(), low, b, sizes, 0.5, more)
    torch.testing.assert_close(found, expected + more, rtol=1e-5, atol=1e-5)
    gradient = torch.randn(128, rank)
    each = [g.T @ low[:, i * rank : (i + 1) * rank] for i, g in enumerate(out.split(sizes, 1))]
    expected = gradient + 0.5 * torch.cat(each)
    elementwise.add_adapter_gradient(gradient, out, low, sizes, 0.5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [None, 2])
def test_the_gradient_of_an_embedding_is_pytorchs(padding: int | None) -> None:
    torch.manual_seed(0)
    words = torch.nn.Embedding(9, 300, padding_idx=padding)
    tokens, upstream = torch.randint(0, 5, (70,)), torch.randn(70, 300)
    words(tokens).backward(upstream)
    found, before = torch.randn(2, 9, 300)
    found.copy_(before)
    embedding.add_embedding_gradient(found, tokens, upstream, padding)
    assert words.weight.grad is not None
    torch.testing.assert_close(found, before + words.weight.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[5:], before[5:])


def test_no_tile_reaches_into_two_projections() -> None:
    assert elementwise.tile((4096, 1024, 1024)) == 128
    assert elementwise.tile((576, 192, 192)) == 64
    assert elementwise.tile((24,)) == 8


def test_adam_in_one_pass_is_pytorchs_adam() -> None:
    torch.manual_seed(0)
    master = torch.randn(5000)
    plain = torch.nn.Parameter(master.clone())
    optimizer = torch.optim.Adam([plain], lr=1e-3, eps=1e-5)
    first, second, used = torch.zeros(5000), torch.zeros(5000), torch.zeros(5000, dtype=torch.bfloat16)
    for step in range(1, 4):
        gradient = torch.randn(5000)
        plain.grad = gradient * 0.3
        optimizer.step()
        options = {"step": step, "rate": 1e-3, "betas": (0.9, 0.999), "eps": 1e-5}
        before, dropped = [x.clone() for x in (master, first, second, used)], torch.full((5000,), math.nan)
        adam(master, first, second, dropped, used, clip=torch.tensor(-1.0), **options)
        assert all(map(torch.equal, (master, first, second, used), before)) and not dropped.any()
        adam(master, first, second, gradient, used, clip=torch.tensor(0.3), **options)
        close(master, plain.detach())
        torch.testing.assert_close(used.float(), master, rtol=2**-7, atol=0)  # the interpreter cuts off, a GPU rounds
        assert not gradient.any()


@settings(max_examples=15, deadline=None)
@given(rows=st.sampled_from([1, 16, 17, 65, 130]), inner=st.sampled_from([5, 128, 140]), outputs=st.integers(1, 40))
def test_eight_bit_products_are_those_of_the_weights_written_out(rows: int, inner: int, outputs: int) -> None:
    torch.manual_seed(rows)
    linear = torch.nn.Linear(inner, outputs, bias=False)
    layer, x = EightBitLinear(linear), torch.randn(rows, inner)
    weights = layer.q.float() * layer.scale[:, None]
    step = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    assert ((weights - linear.weight).abs() <= 0.5001 * step).all()  # to the nearest of 255 steps
    close(int8.matrix(layer.q, layer.scale, torch.float32), weights)
    for product in (int8.product(x, layer.q, layer.scale), layer(x)):
        torch.testing.assert_close(product, x @ weights.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, elementwise.FEW + 1])
@pytest.mark.parametrize(("width", "rank"), [(70, 5), (4096, 16), (4099, 3)])
def test_a_thin_product_is_pytorchs(rows: int, width: int, rank: int) -> None:
    x, a = torch.randn(rows, width), torch.randn(rank, width) / width
    close(elementwise.low_product(x, a), (x.double() @ a.double().T).float())
