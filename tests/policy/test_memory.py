"""Going on in smaller parts: the same results, whatever memory there is."""

from collections.abc import Sequence

import pytest
import torch

from equipoise.errors import UserError
from equipoise.policy.memory import RowLimit

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_does_not_fit_is_done_again_in_halves_and_stays_so(error: RuntimeError) -> None:
    sizes: list[int] = []
    said: list[str] = []

    def work(part: Sequence[int]) -> list[int]:
        sizes.append(len(part))
        if len(part) > 3:
            raise error
        return [2 * x for x in part]

    limit = RowLimit(8)
    assert limit.over(range(11), work, CPU, said.append) == [2 * x for x in range(11)]
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1] and limit.rows == 2
    assert said == [f"not enough memory for {n} sentences at a time: going on with {n // 2}" for n in (8, 4)]
    assert limit.over([], work, CPU, said.append) == [] and len(sizes) == 8


def test_where_nothing_fits_or_something_else_is_wrong_it_ends() -> None:
    def too_much(part: Sequence[int]) -> list[int]:
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="not even one sentence fits into the memory of cpu"):
        RowLimit(4).over([1, 2], too_much, CPU, lambda line: None)

    def wrong(part: Sequence[int]) -> list[int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        RowLimit(4).over([1, 2], wrong, CPU, lambda line: None)
