"""The trie against its definition: one node for each distinct prefix, attention exactly to a node's own prefixes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.policy import trie

# Three tokens, so that prompts and completions often begin alike, repeat, or are prefixes of each other.
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=4)
batches = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=7)


def prefixes(packed: trie.Trie) -> list[tuple[int, ...]]:
    """The token sequence that each node stands for. Depth first, a node's parent is the last one before it that is one
    step nearer to the root."""
    out: list[tuple[int, ...]] = []
    at_depth: dict[int, tuple[int, ...]] = {-1: ()}
    for token, depth in zip(packed.tokens_M.tolist(), packed.depths_M.tolist(), strict=True):
        at_depth[depth] = (*at_depth[depth - 1], token)
        out.append(at_depth[depth])
    return out


@settings(max_examples=150, deadline=None)
@given(batches)
def test_it_holds_every_prefix_once_and_a_node_attends_to_its_own_prefixes_only(batch):
    packed = trie.build([p for p, _ in batch], [c for _, c in batch])
    nodes = prefixes(packed)
    rows = [tuple(p + c[:-1]) for p, c in batch]
    assert sorted(nodes) == sorted({row[:n] for row in rows for n in range(1, len(row) + 1)})
    ancestors = [[node[: len(other)] == other for other in nodes] for node in nodes]
    assert trie.attends(packed.ends_M).tolist() == ancestors


@settings(max_examples=150, deadline=None)
@given(batches)
def test_each_completion_token_is_predicted_by_the_node_of_all_tokens_before_it(batch):
    packed = trie.build([p for p, _ in batch], [c for _, c in batch])
    nodes = prefixes(packed)
    before = [tuple(p + c[:t]) for p, c in batch for t in range(len(c))]
    assert [nodes[i] for i in packed.predictors_N.tolist()] == before


@settings(max_examples=150, deadline=None)
@given(batches)
def test_paths_spell_the_rows_and_places_find_every_node_in_them(batch):
    packed = trie.build([p for p, _ in batch], [c for _, c in batch])
    nodes = prefixes(packed)
    for path, (prompt, completion) in zip(packed.paths_RL.tolist(), batch, strict=True):
        row = (*prompt, *completion[:-1])
        assert [nodes[i] for i in path[: len(row)]] == [row[:n] for n in range(1, len(row) + 1)]
        assert set(path[len(row) :]) <= {0}
    assert packed.paths_RL.reshape(-1)[packed.places_M].tolist() == list(range(len(nodes)))
    # A node's place must lie at its own depth of a row: attention there sees the node's ancestors and nothing else.
    assert (packed.places_M % packed.paths_RL.shape[1]).tolist() == packed.depths_M.tolist()


def test_a_shared_header_is_stored_once():
    header = [7, 8, 9, 7, 8, 9]
    packed = trie.build([[*header, 1], [*header, 2], [*header, 1]], [[5, 0], [5, 0], [6, 0]])
    assert len(packed.tokens_M) == 6 + 2 + 3


@pytest.mark.parametrize(("prompts", "completions"), [([[1], []], [[1], [1]]), ([[1], [1]], [[1], []])])
def test_a_row_without_prompt_or_completion_is_refused(prompts, completions):
    with pytest.raises(ValueError, match="at least one prompt token and one completion token"):
        trie.build(prompts, completions)
