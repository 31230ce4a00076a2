"""Slices of a vector on several ranks, against the whole vector on one."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from equipoise.errors import NonFiniteError
from equipoise.learning import shards as sharding
from equipoise.learning.optimizer import MasterAdam
from equipoise.learning.shards import ALIGNED, Shards
from equipoise.runs.checkpoint import newest, save_checkpoint
from equipoise.runs.pieces import PieceSum
from equipoise.runs.ranks import ALONE, Ranks
from equipoise.runs.tensors import Deferred
from tests.ranked import with_ranks

SHAPES = {"a": (7, 11), "b": (5,), "c": (3, 40), "value_head.weight": (1, 19), "value_head.bias": (1,)}
BLOCK = 64  # so that the 202 numbers of the policy are several blocks, the last of which is padded


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "BLOCK", BLOCK)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 7), st.data())
def test_every_number_has_one_owner_and_parts_begin_where_vector_units_do(
    count: int, size: int, data: st.DataObject
) -> None:
    members = [Shards(count, Ranks(rank, size)) for rank in range(size)]
    numbers = torch.arange(count, dtype=torch.float32)
    padded = torch.cat([numbers, torch.full((members[0].padded - count,), -1.0)])
    slices = [member.slice_of(padded) for member in members]
    assert torch.cat(slices).sort().values.tolist() == numbers.tolist()
    assert [member.own for member in members] == [len(own) for own in slices]
    for member, own in zip(members, slices, strict=True):
        assert member.padded == members[0].padded < count + size * ALIGNED
        if size > 1:  # whole runs of 16 numbers, but for the end of the vector
            starts = [block.start + member.ranks.rank * block.part for block in member.blocks]
            assert all(start % ALIGNED == 0 for start in starts) and all(b.place % ALIGNED == 0 for b in member.blocks)
        assert max(own.tolist(), default=-1) < count
    start = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(start + 1, count))
    found = [slices[s.rank][s.place : s.place + s.end - s.start] for s in members[-1].segments(start, end)]
    assert torch.cat(found).tolist() == numbers[start:end].tolist()


def test_alone_the_slice_is_the_vector() -> None:
    assert (shards := Shards(1000, ALONE)).padded == shards.own == 1000
    assert [tuple(segment) for segment in shards.segments(3, 1000)] == [(0, 3, 1000, 3)]


def made(ranks: Ranks, dtype: torch.dtype, average: float = 0.9, seed: int = 0) -> MasterAdam:
    generator = torch.Generator().manual_seed(seed + ranks.rank)  # rank 0's weights are all ranks'
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()
    }
    for name in ("value_head.weight", "value_head.bias"):
        parameters[name] = nn.Parameter(parameters[name].detach().float())
    adam = MasterAdam(parameters, betas=(0.9, 0.999), eps=1e-5, average=average, ranks=ranks, sharded=True)
    adam.set_learning_rates(0.01, 0.1)
    return adam


def step(adam: MasterAdam, number: int, ranks: Ranks, micro: int) -> float:
    """Gradients of every piece in so many micro-batches, added up, clipped and stepped with."""
    pieces = PieceSum(ranks)
    for piece in ranks.mine:
        generator = torch.Generator().manual_seed(1000 * number + piece)
        for _ in range(micro):
            for group in adam.groups.values():
                for gradient in group.split(group.grads).values():
                    gradient.add_(torch.randn(gradient.shape, generator=generator))
            if micro > 1:
                adam.accumulate()
        adam.set_aside(pieces)
    adam.add_up(pieces)
    norm = adam.step(2.0)
    adam.update_average(number)
    return norm


def everything(adam: MasterAdam) -> dict[str, Tensor]:
    """All states, gathered, and the weights in use."""
    found: dict[str, Tensor] = {}

    def gather(ask: Callable[[Any], Any]) -> None:
        for part in adam.state(ask=ask):
            for name, held in part.items():
                found[name] = held.read().view(held.shape) if isinstance(held, Deferred) else held.clone()

    adam.ranks.first_asks(gather, adam.reply)
    used = {name: x.clone() for group in adam.groups.values() for name, x in group.split(group.buffer).items()}
    with adam.averaged():
        shown = {name: x.clone() for group in adam.groups.values() for name, x in group.split(group.buffer).items()}
    return found | {f"used.{n}": x for n, x in used.items()} | {f"averaged.{n}": x for n, x in shown.items()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, x in found.items():
        assert x.dtype == expected[name].dtype and torch.equal(x, expected[name]), name


def trained(
    ranks: Ranks, pieces: int, dtype: torch.dtype, micro: int, steps: int = 3
) -> tuple[MasterAdam, list[float]]:
    ranks = ranks.cut_into(pieces)
    adam = made(ranks, dtype)
    return adam, [step(adam, number, ranks, micro) for number in range(steps)]


@pytest.mark.parametrize(
    ("size", "pieces", "dtype", "micro"),
    [
        (2, 2, torch.bfloat16, 1),
        (2, 4, torch.float32, 2),
        (2, 6, torch.bfloat16, 2),
        (3, 3, torch.bfloat16, 2),
        (4, 4, torch.float32, 1),
    ],
)
def test_sharded_states_are_those_of_one_process_to_the_last_bit(
    size: int, pieces: int, dtype: torch.dtype, micro: int
) -> None:
    alone, norms = trained(ALONE, pieces, dtype, micro)
    assert not alone.sharded and min(norms) > 2  # clipped: the norm counts
    expected = everything(alone)

    def work(ranks: Ranks) -> None:
        adam, found = trained(ranks, pieces, dtype, micro)
        assert found == norms
        held = everything(adam)
        assert_same(held, expected)
        assert len(held) == len(expected) if ranks.first else set(held) < set(expected)
        count = sum(math.prod(shape) for name, shape in SHAPES.items() if "head" not in name)
        for vector in (group.master for group in adam.groups.values()):
            assert vector.untyped_storage().nbytes() <= 4 * (count // size + ALIGNED * (1 + count // BLOCK))
        digests = [int(x) for x in ranks.gather(torch.tensor(adam.digest()))]
        assert len(set(digests)) == 1
        if ranks.first:
            adam.groups["policy"].buffer.view(torch.int16)[9] ^= 1
        assert (adam.digest() == digests[0]) != ranks.first

    with_ranks(size, work)


def test_a_checkpoint_is_the_one_of_one_process_and_any_number_goes_on_from_it(tmp_path: Path) -> None:
    alone, _ = trained(ALONE, 4, torch.bfloat16, 1)
    saved = dict(zip(("weights", "optimizer"), alone.state(), strict=True))
    save_checkpoint(tmp_path / "1", 3, saved, {})

    def save(ranks: Ranks) -> None:
        adam, _ = trained(ranks, 4, torch.bfloat16, 1)

        def write(ask: Callable[[Any], Any]) -> None:
            found = dict(zip(("weights", "optimizer"), adam.state(ask=ask), strict=True))
            save_checkpoint(tmp_path / "2", 3, found, {})

        ranks.first_asks(write, adam.reply)

    with_ranks(2, save)
    for name in ("weights", "optimizer"):
        file = f"checkpoint-3/{name}.safetensors"
        assert (tmp_path / "2" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()
    for number in (3, 4):
        step(alone, number, ALONE.cut_into(4), 1)
    expected = everything(alone)

    def go_on(ranks: Ranks) -> None:
        ranks = ranks.cut_into(4)
        adam = made(ranks, torch.bfloat16, seed=5)
        step(adam, 9, ranks, 1)  # it has moved before, as in a roll-back
        checkpoint = newest(tmp_path / "2") if ranks.first else None
        held = [checkpoint.tensors(name) for name in ("weights", "optimizer")] if checkpoint else [{}, {}]
        adam.load_state(*held)
        for number in (3, 4):
            step(adam, number, ranks, 1)
        assert_same(everything(adam), expected)
        missing = {name: x for name, x in held[0].items() if name != "c"}
        with pytest.raises(KeyError, match="c"):
            adam.load_state(missing, held[1])

    for size in (2, 4):
        with_ranks(size, go_on)
    go_on(ALONE)


def test_a_slice_that_is_not_finite_is_told_by_all(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> None:
        adam, _ = trained(ranks, 2, torch.bfloat16, 1, steps=1)
        ranks.each(adam.check_finite)
        if ranks.rank == 1:
            adam.adam.state[adam.groups["value"].master]["exp_avg_sq"][0] = torch.inf
        with pytest.raises(NonFiniteError, match="the exp_avg_sq of the value hold a NaN or an infinity"):
            ranks.each(adam.check_finite)

    with_ranks(2, work)


def test_what_fails_while_states_are_gathered_ends_the_work_of_all() -> None:
    def work(ranks: Ranks) -> None:
        adam, _ = trained(ranks, 2, torch.bfloat16, 1, steps=1)

        def write(ask: Callable[[Any], Any]) -> None:
            held = adam.state(ask=ask)[0]["a"]
            assert isinstance(held, Deferred) and len(held.read()) == 77
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            ranks.first_asks(write, adam.reply)
        assert ranks.first_asks(lambda ask: 7, adam.reply) == 7  # and they are still in step

    with_ranks(2, work)


def test_released_states_are_gone_and_another_optimizer_takes_over_the_weights() -> None:
    adam, _ = trained(ALONE, 2, torch.float32, 1)
    group = adam.groups["policy"]
    before = group.split(group.buffer.clone())
    parameters = {name: nn.Parameter(x) for name, x in group.split(group.buffer).items()}
    adam.release()
    assert not adam.groups and not adam.adam.state and adam.average is None
    weights, moments = MasterAdam(parameters, betas=(0.9, 0.999), eps=1e-5).state()
    assert_same(weights, before)
    assert moments == {}
