"""FP8 kernels against their plain twin in `policy.eightbit`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.policy import eightbit
from equipoise.policy.eightbit import FP8
from equipoise.policy.kernels import elementwise, fp8


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5), width=st.sampled_from([1, 16, 70, 256]), power=st.integers(-40, 36),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), by=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_are_rounded_to_the_bytes_of_the_plain_twin(
    rows: int, width: int, power: int, dtype: torch.dtype, by: bool, seed: int
) -> None:
    x = (matrix(rows, width, seed) * 2.0**power).to(dtype)
    each = matrix(1, width, seed + 1)[0].abs() if by else None
    expected = eightbit.quantise(x if each is None else x * each, FP8)
    q, scale = fp8.quantise(x, each)
    assert torch.equal(scale, expected.scale)
    assert torch.equal(q.view(torch.uint8), expected.q.view(torch.uint8))


def test_rows_of_zeros_of_one_huge_value_and_of_tiny_ones_are_rounded_as_the_plain_twin_does() -> None:
    x = matrix(4, 64, 0)
    x[0] = 0
    x[1, 5], x[2, 7] = 3e38, -1e-3 * 448
    x[3] *= 1e-36
    q, scale = fp8.quantise(x)
    expected = eightbit.quantise(x, FP8)
    assert torch.equal(scale, expected.scale) and torch.equal(q.float(), expected.q.float())
    assert not q[0].float().any() and q[1].float().count_nonzero() == 1


@pytest.mark.parametrize(("rows", "inner", "outputs"), [(1, 5, 3), (16, 128, 32), (17, 140, 40), (65, 5, 32)])
def test_products_and_the_way_back_are_the_plain_twins(rows: int, inner: int, outputs: int) -> None:
    weight, x, upstream = matrix(outputs, inner, 1), matrix(rows, inner, 2), matrix(rows, outputs, 3)
    w = eightbit.quantise(weight, FP8)
    torch.testing.assert_close(fp8.product(x, *w), eightbit.product(x, *w), rtol=1e-5, atol=1e-5)
    found, expected = fp8.product_back(upstream, *w), eightbit.product_back(upstream, *w)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_not_lost_on_the_way(bad: float) -> None:
    x, w = matrix(3, 64, 0), eightbit.quantise(matrix(32, 64, 1), FP8)
    x[1, 5] = bad
    for found in (fp8.product(x, *w), eightbit.product(x, *w)):
        assert not found[1].isfinite().any() and found[[0, 2]].isfinite().all()
    grad = matrix(3, 32, 2)
    grad[2, 0] = bad
    for found in (fp8.product_back(grad, *w), eightbit.product_back(grad, *w)):
        assert not found[2].isfinite().any() and found[:2].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (130, 70), (256, 260)])
def test_a_transposed_matrix_is_that_to_the_byte(shape: tuple[int, int]) -> None:
    q = eightbit.quantise(matrix(*shape, 0), FP8).q
    found = fp8.transposed(q)
    assert found.is_contiguous() and torch.equal(found.view(torch.uint8), q.view(torch.uint8).T)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.sampled_from([1, 16, 33, 65]), width=st.sampled_from([5, 128, 260]), rank=st.sampled_from([1, 12, 48]),
    columns=st.booleans(), more=st.booleans(),
)  # fmt: skip
def test_what_a_product_is_to_be_multiplied_by_goes_into_the_next_pass(
    rows: int, width: int, rank: int, columns: bool, more: bool
) -> None:
    out, added = matrix(rows, width, 1), matrix(rows, width, 2) if more else None
    by = fp8.By(matrix(1, rows, 3)[0], matrix(1, width, 4)[0] if columns else None)
    scaled = out * by.rows[:, None] * (1 if by.columns is None else by.columns)
    found = fp8.finish(out.clone(), by, added)
    torch.testing.assert_close(found, scaled if added is None else scaled + added, rtol=1e-6, atol=1e-6)
    low, a = matrix(rows, rank, 5), matrix(rank, width, 6)
    found = fp8.add_low(out.clone(), fp8.By(by.rows, None), low, a)
    torch.testing.assert_close(found, out * by.rows[:, None] + low @ a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 70])
def test_the_adapters_pass_multiplies_the_base_product_first(rows: int) -> None:
    out, more, low, b = matrix(rows, 128, 0), matrix(rows, 128, 1), matrix(rows, 6, 2), matrix(128, 3, 3)
    by = (matrix(1, rows, 4)[0], matrix(1, 128, 5)[0])
    parts = [low[:, 3 * i : 3 * i + 3] @ b[64 * i : 64 * i + 64].T for i in (0, 1)]
    expected = out * by[0][:, None] * by[1] + 0.5 * torch.cat(parts, 1) + more
    found = elementwise.add_adapters(out.clone(), low, b, (64, 64), 0.5, more, by)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
