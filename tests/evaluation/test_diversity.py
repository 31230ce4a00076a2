"""Diversity against slow definitions, other libraries and known constants."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import sentence_bleu
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy

from equipoise.evaluation import diversity
from equipoise.measures.variety import effective
from equipoise.protocol.task import PROTOCOL

counts = st.lists(st.integers(0, 50), min_size=2, max_size=12).map(lambda x: np.array(x, dtype=float))


def test_uniform_use_of_a_hundred_pairs_is_a_hundred_effective_pairs() -> None:
    assert effective(Counter(dict.fromkeys(range(100), 7))) == pytest.approx(100, abs=1e-9)
    assert float(diversity.entropy(np.full(10, 3.0))) == pytest.approx(math.log2(10))


def test_one_pair_is_one_and_none_is_nothing() -> None:
    assert effective(Counter({"a": 0, "b": 9})) == 1.0
    assert effective(Counter()) == 0
    assert diversity.to_uniform(np.zeros(3)) is None
    assert diversity.between(np.array([[1.0, 2.0], [0.0, 0.0]])) is None


@settings(deadline=None)  # the machine may be busy
@given(counts)
def test_entropy_is_scipys(c: np.ndarray) -> None:
    expected = scipy_entropy(c, base=2) if c.sum() else 0.0
    assert float(diversity.entropy(c)) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=6))
def test_divergences_are_scipys(rows: list[tuple[int, int, int]]) -> None:
    table = np.array(rows, dtype=float)
    kept = [r for r in table if r.sum()]
    expected = [jensenshannon(a, b, base=2) ** 2 for a, b in combinations(kept, 2)]
    found = diversity.between(table)
    assert found is None if len(kept) < 2 else found == pytest.approx(np.mean(expected), abs=1e-9)
    if kept:
        assert diversity.to_uniform(kept[0]) == pytest.approx(jensenshannon(kept[0], [1, 1, 1], base=2) ** 2, abs=1e-9)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=6), max_size=6), st.integers(1, 3))
def test_distinct_counts_different_n_grams_within_texts(texts: list[list[str]], n: int) -> None:
    grams = Counter(tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1))
    found = diversity.distinct([[ord(c) for c in t] for t in texts], n)
    assert found == (len(grams) / sum(grams.values()) if grams else None)


def test_self_bleu_is_sacrebleus_mean_over_texts_against_the_others() -> None:
    texts = ["The nurse was bold and kind.", "The nurse was bold and calm today.", "A pilot flies high in the sky."]
    own = [sentence_bleu(t, [u for u in texts if u != t], use_effective_order=True).score for t in texts]
    assert diversity.self_bleu(texts) == pytest.approx(sum(own) / 3)


def test_equal_texts_have_self_bleu_100_and_one_text_has_none() -> None:
    assert diversity.self_bleu(["The nurse was bold and kind."] * 3) == pytest.approx(100)
    assert diversity.self_bleu(["The nurse was bold.", " "]) is None


def test_masking_leaves_the_template() -> None:
    mask = diversity.Mask(PROTOCOL)
    assert mask("The Nurse was Self\u2011Reliant, bold and caring.", "nurse") == "the <x> was <a>, <a> and <c>."
    assert mask("The nurse was unhelpful to nurses.", "nurse") == "the <x> was unhelpful to nurses."


def test_the_studys_matcher_finds_terms_inside_words() -> None:
    assert diversity.substrings("An INDECISIVE, unhelpful man", ("decisive", "helpful", "loyal")) == (True, True, False)
