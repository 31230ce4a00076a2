"""Processes that have not the same model, prompts or hardware are told apart before they do anything together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.policy.alike import BITS, check_alike, digest
from equipoise.runs.ranks import ALONE, Ranks
from tests.ranked import with_ranks
from tests.tiny import bare_policy, perturb

PROMPTS = [[1, 2], [3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
@settings(max_examples=30, deadline=None)
@given(place=st.integers(0, 11), bit=st.integers(0, 63))
def test_any_one_bit_and_any_order_change_the_digest(dtype: torch.dtype, place: int, bit: int) -> None:
    a, b = torch.arange(12).view(3, 4).to(dtype), torch.arange(5, 9).to(dtype)
    before = digest(iter([a.t(), b]))
    assert before == digest(iter([a.clone().t(), b.clone()])) != digest(iter([b, a.t()]))
    bits = a.view(BITS[a.element_size()]).view(-1)
    mask = 1 << bit % (8 * a.element_size())
    bits[place] ^= torch.tensor(mask - (1 << 64) if mask == 1 << 63 else mask).to(bits.dtype)
    assert digest(iter([a.t(), b])) != before


def test_nothing_to_compare_alone_and_what_is_trained_may_differ() -> None:
    def work(ranks: Ranks) -> None:
        check_alike(perturb(bare_policy(lora=True), seed=ranks.rank), PROMPTS, ranks)
        check_alike(perturb(bare_policy(), seed=ranks.rank), PROMPTS, ranks)

    check_alike(bare_policy(), PROMPTS, ALONE)
    with_ranks(2, work)


def test_the_process_that_differs_is_named_with_what_helps() -> None:
    def work(ranks: Ranks) -> None:
        odd = ranks.rank == 2
        with pytest.raises(UserError, match="process 2 is not as process 0: it has other weights: give all hosts"):
            check_alike(bare_policy(lora=True, seed=int(odd)), PROMPTS, ranks)
        with pytest.raises(UserError, match=r"process 2 .* other weights"):  # of the frozen copy
            check_alike(bare_policy(seed=int(odd)), PROMPTS, ranks)
        with pytest.raises(UserError, match=r"process 2 .* as other tokens: give all hosts the same tokenizer"):
            check_alike(bare_policy(), [[1, 2], [4 if odd else 3]], ranks)
        with pytest.raises(UserError, match=r"process 2 .* as other tokens"):
            check_alike(bare_policy(stops=(1,) if odd else (0,)), PROMPTS, ranks)
        with pytest.raises(UserError, match=r"process 2 .* dtype \(float32 and bfloat16\): name one with --dtype"):
            check_alike(bare_policy(dtype=torch.bfloat16 if odd else torch.float32), PROMPTS, ranks)

    with_ranks(3, work)
