"""Shapes that packs are padded to: few of them, never too small, and those that come often exactly."""

import random

import pytest
import torch

from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.rollout import rollout_of
from equipoise.policy.rooms import COST, MOST, MOST_PASSES, Room, Rooms, bucket
from equipoise.policy.score import score
from tests.tiny import bare_policy, perturb, pretend_graphs


def test_a_number_is_rounded_up_by_a_quarter_at_most_beyond_the_smallest_bucket() -> None:
    assert [bucket(n) for n in (1, 64, 65, 512, 513, 1025)] == [64, 64, 128, 512, 640, 1280]
    assert all(n <= bucket(n) <= max(n + 63, 1.25 * n) for n in range(1, 5000))


def test_the_first_shape_leaves_some_to_spare_unless_no_row_can_be_longer() -> None:
    assert Rooms(1e9).take(4, Room(128, 64, 40), 1000) == Room(192, 128, 40)
    assert Rooms(1e9).take(4, Room(128, 64, 40), 64) == Room(128, 64, 40)


@pytest.mark.parametrize(("weights", "often"), [(8e9, 50), (8e8, 500), (1e8, 2000)])
def test_a_shape_is_done_without_until_that_has_cost_as_much_as_recording_it(weights: float, often: int) -> None:
    """A fifth of each pass of 640 nodes is in vain: 10 passes of 8 billion weights, never more than 400 of any."""
    rooms, large, small = Rooms(weights), Room(640, 320, 48), Room(512, 256, 40)
    assert rooms.patience == min(COST / weights, MOST_PASSES)
    assert rooms.take(16, large, 320) == large
    taken = [rooms.take(16, small, 320) for _ in range(often + 2)]
    assert taken[: often - 1] == [large] * (often - 1) and taken[-1] == small


def test_other_numbers_of_rows_have_shapes_of_their_own() -> None:
    rooms, large, small = Rooms(1e15), Room(640, 320, 48), Room(512, 256, 40)
    assert rooms.take(16, large, 320) == large
    assert rooms.take(16, small, 320) == small == rooms.take(16, small, 320)
    assert rooms.take(8, small, 256) == small
    assert rooms.take(16, Room(640, 320, 56), 320) == Room(640, 320, 56)  # wider than any
    assert rooms.take(16, Room(384, 64, 40), 64) == Room(384, 64, 40)  # far smaller
    rooms.clear()
    assert rooms.take(16, small, 256) == small


def test_mini_batches_of_a_run_take_few_shapes_and_waste_little() -> None:
    rooms, chance, recorded, late, waste = Rooms(8e9), random.Random(0), set(), 0, []
    for step in range(200):
        for _ in range(16):
            tokens = sum(min(32, max(4, round(chance.gauss(20, 6)))) for _ in range(16))
            need = Room(bucket(tokens + 150), bucket(tokens), 72)
            room = rooms.take(16, need, 16 * 32)
            assert room.holds(need) and room.nodes <= MOST * need.nodes
            late += room not in recorded and step >= 1
            recorded.add(room)
            waste.append(room.nodes / need.nodes)
    assert len(recorded) <= 8 and late <= 6
    assert sum(waste[1600:]) / 1600 < 1.05


@pytest.mark.parametrize("reference", [False, True])
def test_a_pack_in_a_larger_shape_scores_the_same(reference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = perturb(bare_policy(attention=TRIE_ATTENTION, lora=True))
    fast = pretend_graphs(perturb(bare_policy(attention=TRIE_ATTENTION, lora=True)), monkeypatch)
    long = rollout_of([[1, 2, 3, 4, 1, 2, 3, 4, 1], [1, 2]], [[1] * 70, [2] * 70])
    short = rollout_of([[1, 2, 3], [1, 2]], [[4, 1, *[3] * 50], [2] * 44])
    for rollout in (long, short):
        with torch.no_grad():
            expected = score(plain, rollout, 0.7, packed=True, reference=reference)
            found = score(fast, rollout, 0.7, packed=True, reference=reference)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert len(fast.graphs.seen) == 1  # type: ignore[attr-defined]
