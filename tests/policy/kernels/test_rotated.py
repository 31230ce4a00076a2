"""Kernels of rotated int8 against their plain twin in `policy.eightbit`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as scipy_hadamard
from torch import Tensor

from equipoise.policy import eightbit
from equipoise.policy.eightbit import FP8, ROTATED
from equipoise.policy.hadamard import group_of
from equipoise.policy.kernels import activations, rotated, rounding
from equipoise.policy.kernels.rounding import AS_FP8, quantise


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def same_rows(found: rounding.Rows, expected: rounding.Rows | eightbit.Rounded) -> None:
    """Sums of a group may be added up in another order: the last bit of a scale, and a value between two integers."""
    torch.testing.assert_close(found.scale, expected.scale, rtol=3e-7, atol=0.0)
    differ = (found.q.float() - expected.q.float()).abs()
    assert found.q.dtype == expected.q.dtype and differ.max() <= 1 and (differ > 0).float().mean() < 0.01


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5), width=st.sampled_from([1, 16, 70, 256]), power=st.integers(-40, 36),
    dtype=st.sampled_from([torch.float32]), by=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_are_rounded_to_the_numbers_of_the_plain_twin(
    rows: int, width: int, power: int, dtype: torch.dtype, by: bool, seed: int
) -> None:
    x = (matrix(rows, width, seed) * 2.0**power).to(dtype)
    each = matrix(1, width, seed + 1)[0].abs() if by else None
    multiplied = x if each is None else x * each
    same_rows(quantise(x, AS_FP8, each), eightbit._quantised(multiplied, FP8))
    if not by:  # activations are never multiplied
        same_rows(quantise(x, group_of(width)), eightbit._quantised(x, ROTATED))


def test_rows_of_zeros_of_one_huge_value_and_of_tiny_ones_are_rounded_as_the_plain_twin_does() -> None:
    x = matrix(4, 64, 0)
    x[0] = 0
    x[1, 5], x[2, 7] = 3e38, -1e-3 * 448
    x[3] *= 1e-36
    q, scale = quantise(x, AS_FP8)
    same_rows(rounding.Rows(q, scale), eightbit._quantised(x, FP8))
    assert not q[0].float().any() and q[1].float().count_nonzero() == 1
    same_rows(quantise(x, 1), eightbit._quantised(x, ROTATED))


@pytest.mark.parametrize(("rows", "inner", "outputs"), [(1, 5, 3), (16, 256, 32), (17, 140, 40), (65, 5, 32)])
def test_products_and_the_way_back_are_the_plain_twins(rows: int, inner: int, outputs: int) -> None:
    weight, x, upstream = matrix(outputs, inner, 1), matrix(rows, inner, 2), matrix(rows, outputs, 3)
    w = eightbit.quantise(weight, ROTATED)
    torch.testing.assert_close(rotated.product(x, *w), eightbit.product(x, *w, ROTATED), rtol=1e-5, atol=1e-5)
    found, expected = rotated.product_back(upstream, *w), eightbit.product_back(upstream, *w, ROTATED)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_not_lost_on_the_way(bad: float) -> None:
    x, w = matrix(3, 64, 0), eightbit.quantise(matrix(32, 64, 1), ROTATED)
    x[1, 5] = bad
    for found in (rotated.product(x, *w), eightbit.product(x, *w, ROTATED)):
        assert not found[1].isfinite().any() and found[[0, 2]].isfinite().all()
    grad = matrix(3, 32, 2)
    grad[2, 0] = bad
    for found in (rotated.product_back(grad, *w), eightbit.product_back(grad, *w, ROTATED)):
        assert not found[2].isfinite().any() and found[:2].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (130, 70), (256, 260)])
def test_a_transposed_matrix_holds_the_nearest_numbers_of_fp8(shape: tuple[int, int]) -> None:
    q = eightbit.quantise(matrix(*shape, 0), ROTATED).q
    found = rotated.transposed(q)
    assert found.is_contiguous() and torch.equal(found.float(), q.float().to(FP8).float().T)


@settings(max_examples=8, deadline=None)
@given(
    rows=st.sampled_from([1, 16, 33, 65]), sizes=st.sampled_from([(40,), (64, 16), (64, 32, 32)]),
    inner=st.sampled_from([5, 128, 272]), rank=st.sampled_from([0, 1, 12]), more=st.booleans(),
)  # fmt: skip
def test_a_product_takes_what_adapters_add_along(
    rows: int, sizes: tuple[int, ...], inner: int, rank: int, more: bool
) -> None:
    outputs, x = sum(sizes), matrix(rows, inner, 1)
    w = eightbit.quantise(matrix(outputs, inner, 2), ROTATED)
    low, b = matrix(rows, len(sizes) * rank, 3), matrix(outputs, rank, 4)
    added = matrix(rows, outputs, 5) if more else torch.zeros(rows, outputs)
    expected = eightbit.product(x, *w, ROTATED) + added
    if rank:
        parts = zip(low.split(rank, 1), b.split(sizes), strict=True)
        expected += 0.5 * torch.cat([own @ part.T for own, part in parts], 1)
    adapters = rotated.Adapters(low, b, sizes, 0.5) if rank else None
    rounded = quantise(x, group_of(inner))
    out = torch.empty(rows, outputs) if more else None
    found = rotated.multiply(rounded, *w, torch.float32, adapters, added if more else None, out)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert out is None or found is out


@pytest.mark.parametrize("width", [70, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_rounded_where_it_is_made_as_by_a_pass_of_its_own(width: int, dtype: torch.dtype) -> None:
    for gated in (True, False):
        pair, dout = matrix(3, (1 + gated) * width, 5).to(dtype), matrix(3, width, 6).to(dtype)
        f = activations.activate(pair, activations.SILU, gated)
        each = matrix(1, pair.shape[1], 7)[0].abs()
        back = activations.activate_backward(pair, dout, activations.SILU, gated, each, True)
        assert torch.equal(back.dx, activations.activate_backward(pair, dout, activations.SILU, gated).dx)
        assert back.rounded is not None and back.f is not None and torch.equal(back.f, f)
        same_rows(back.rounded, quantise(back.dx, AS_FP8, each))


def test_a_value_that_is_not_finite_is_not_lost_where_the_activation_rounds_it() -> None:
    pair, dout, each = matrix(3, 2 * 2100, 0), matrix(3, 2100, 1), torch.ones(4200)
    pair[0, 5], pair[1, 4000], dout[2, 7] = math.nan, math.inf, math.nan
    forward = quantise(activations.activate(pair, activations.SILU, True), 1)
    back = activations.activate_backward(pair, dout, activations.SILU, True, each).rounded
    assert back is not None
    assert not forward.scale[:2].isfinite().any() and forward.scale[2].isfinite()
    assert not (back.q.float() * back.scale[:, None]).isfinite().all(1).any()


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize(("width", "group"), [(256, 16), (72, 1)])
def test_sums_of_the_way_back_are_multiplied_and_rotated_back(rows: int, width: int, group: int) -> None:
    out, low, a = matrix(rows, width, 1), matrix(rows, 4, 2), matrix(4, width, 3)
    by = rotated.By(matrix(1, rows, 4)[0], group)
    turned = torch.cat([part @ torch.tensor(scipy_hadamard(group)).float() for part in out.split(group, 1)], 1)
    expected = turned * by.rows[:, None]
    torch.testing.assert_close(rotated.finish(out.clone(), by), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotated.finish(out.clone(), by, low, a), expected + low @ a, rtol=1e-5, atol=1e-5)
