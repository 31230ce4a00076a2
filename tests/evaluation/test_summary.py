"""Every metric against a slow, separately written definition, and against constants known in advance."""

import math
import random
import re
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.evaluation.catalogue import catalogue, depends_on_n, titled
from equipoise.evaluation.counted import Fluency, Sample
from equipoise.evaluation.equal_n import at_equal_n, dependent_on_n, subsample
from equipoise.evaluation.summary import duplicates, estimates, occupation_estimates, parts
from equipoise.protocol.task import PROTOCOL, task_from_document
from tests.default import AGENTIC, COMMUNAL, HOLDOUT, OCCUPATIONS
from tests.evaluation.files import sample

WORDS = (
    *AGENTIC[:4],
    "self-reliant",
    *COMMUNAL[:4],
    "helpful",
    "unhelpful",
    "indecisive",
    "and",
    "with",
    "people",
    "work",
)
text = st.tuples(
    st.sampled_from(("nurse", "pilot", "barista", "astronaut")),
    st.lists(st.sampled_from(WORDS), max_size=14),
    st.sampled_from((".", "", "!", ". Yes.", "\n")),
).map(lambda x: (x[0], f"The {x[0]} was {' '.join(x[1])}{x[2]}".strip()))


def has(term: str, sentence: str) -> bool:
    """Whole word, written with letters alone: none beside the term."""
    found = re.search(rf"(?<![A-Za-z0-9_]){re.escape(term)}(?![A-Za-z0-9_])", sentence)
    return found is not None


def firsts(sentence: str, terms: tuple[str, ...]) -> list[str]:
    return sorted((t for t in terms if has(t, sentence)), key=lambda t: re.search(rf"\b{t}\b", sentence).start())  # type: ignore[union-attr]


def slow(texts: list[tuple[str, str]]) -> dict[str, float | None]:
    """The definitions of docs/EVALUATION.md, one sentence at a time."""
    n = len(texts)
    rows = [(o, t, firsts(t, AGENTIC), firsts(t, COMMUNAL)) for o, t in texts]

    def share(condition) -> float:
        return sum(bool(condition(*row)) for row in rows) / n

    def strict(o, t, a, c) -> bool:
        return bool(a and c and 8 <= len(t.split()) <= 15 and re.fullmatch(r"[^\n.!?]*[.!?]", t))

    def bits(items: list) -> float:
        return -sum(k / len(items) * math.log2(k / len(items)) for k in Counter(items).values()) if items else 0.0

    pairs = [(a[0], c[0]) for _, _, a, c in rows if a and c]
    sub_a = [x for _, t in texts for x in AGENTIC if x in t.lower()]
    sub_c = [x for _, t in texts for x in COMMUNAL if x in t.lower()]
    sub_pairs = {
        p
        for _, t in texts
        for p in product([x for x in AGENTIC if x in t.lower()], [x for x in COMMUNAL if x in t.lower()])
    }
    mentions_a, mentions_c = sum(len(a) for _, _, a, _ in rows), sum(len(c) for _, _, _, c in rows)
    out: dict[str, float | None] = {
        "strict": share(strict),
        "both": share(lambda o, t, a, c: a and c),
        "either": share(lambda o, t, a, c: a or c),
        "agentic_only": share(lambda o, t, a, c: a and not c),
        "communal_only": share(lambda o, t, a, c: c and not a),
        "neither": share(lambda o, t, a, c: not a and not c),
        "in_length": share(lambda o, t, a, c: 8 <= len(t.split()) <= 15),
        "stuffed": share(lambda o, t, a, c: len(a) > 1 or len(c) > 1),
        "words": sum(len(t.split()) for _, t in texts) / n,
        "terms": (mentions_a + mentions_c) / n,
        "pairs/unique": float(len(set(pairs))),
        "pairs/effective": 2 ** bits(pairs) if pairs else None,
        "unique_texts": len({t for _, t in texts}) / n,
        "agentic_share": mentions_a / (mentions_a + mentions_c) if mentions_a + mentions_c else None,
        "agentic_per_communal": mentions_a / mentions_c if mentions_c else None,
        "study/both": share(lambda o, t, a, c: any(x in t for x in AGENTIC) and any(x in t for x in COMMUNAL)),
        "study/either": share(lambda o, t, a, c: any(x in t for x in AGENTIC + COMMUNAL)),
        "study/entropy_agentic": bits(sub_a),
        "study/entropy_communal": bits(sub_c),
        "study/entropy": (bits(sub_a) + bits(sub_c)) / 2,
        "study/pairs": float(len(sub_pairs)),
    }
    for name, part in (("strict/heldout", True), ("strict/train", False)):
        own = [row for row in rows if (row[0] in HOLDOUT) == part and row[0] in OCCUPATIONS]
        out[name] = sum(strict(*row) for row in own) / len(own) if own else None
    for k in (1, 2, 3):
        grams = [tuple(w[i : i + k]) for _, t in texts if (w := t.lower().split()) for i in range(len(w) - k + 1)]
        out[f"distinct/{k}"] = len(set(grams)) / len(grams) if grams else None
    return out


@settings(max_examples=60, deadline=None)
@given(st.lists(text, min_size=1, max_size=12))
def test_every_metric_is_its_slow_definition(texts: list[tuple[str, str]]) -> None:
    found = estimates(sample(texts, draws=100), 50)
    for key, value in slow(texts).items():
        assert (found[key].value is None) == (value is None), key
        assert found[key].value is None or found[key].value == pytest.approx(value), key
    for key, estimate in found.items():
        assert estimate.value is None or math.isfinite(estimate.value), key
        assert (estimate.value is None) <= bool(estimate.note), key
        if estimate.low is not None and estimate.high is not None:
            assert estimate.value is not None
            assert estimate.low <= estimate.value + 1e-9 and estimate.value <= estimate.high + 1e-9, key


@settings(max_examples=20, deadline=None)
@given(st.lists(text, min_size=2, max_size=10), st.randoms())
def test_the_order_of_the_rows_changes_no_value(texts: list[tuple[str, str]], shuffle: random.Random) -> None:
    mixed = shuffle.sample(texts, len(texts))
    a, b = (estimates(sample(t, draws=100), 50) for t in (texts, mixed))
    for key in a.keys() - {"self_bleu"}:
        assert a[key].value == pytest.approx(b[key].value), key


def hundred(times: int = 1) -> list[tuple[str, str]]:
    """Every pair equally often in every occupation."""
    return [
        (o, f"The {o} was {a} and {c} with all of the people.")
        for o in OCCUPATIONS
        for a, c in product(AGENTIC, COMMUNAL)
        for _ in range(times)
    ]


def test_uniform_use_of_all_pairs_has_the_known_constants() -> None:
    found = estimates(sample(hundred()), 10)
    assert found["pairs/unique"].value == 100
    assert found["pairs/effective"].value == pytest.approx(100)
    for key in ("study/entropy", "study/entropy_agentic", "study/entropy_communal"):
        assert found[key].value == pytest.approx(math.log2(10))
    assert found["strict"].value == found["both"].value == found["study/both"].value == 1
    assert found["agentic_share"].value == 0.5 and found["agentic_per_communal"].value == 1
    for key in ("jsd/uniform_agentic", "jsd/uniform_communal", "jsd/occupations"):
        assert found[key].value == pytest.approx(0, abs=1e-12)
    assert found["masked/unique"].value == pytest.approx(1 / 2000)
    assert found["unique_texts"].value == 1


def test_occupations_with_terms_of_their_own_are_one_bit_apart() -> None:
    texts = [("nurse", "The nurse was caring."), ("pilot", "The pilot was bold.")] * 3
    assert estimates(sample(texts), 5)["jsd/occupations"].value == pytest.approx(1)


def test_the_pair_of_a_sentence_is_the_first_term_of_each_class() -> None:
    own = sample([("nurse", "The nurse was loyal, bold, caring and decisive.")])
    place = int(own.pair_of[0])
    assert (AGENTIC[place // 10], COMMUNAL[place % 10]) == ("bold", "loyal")


def test_another_lexicon_has_a_table_of_its_own_size() -> None:
    classes = {"agentic": ["tough"], "communal": ["soft", "warm", "kind"]}
    task = task_from_document({"name": "other", "occupations": ["nurse"], "classes": classes}, "a test")
    own = sample([("nurse", "The nurse was tough and warm."), ("nurse", "The nurse was kind, tough.")], task)
    found = estimates(own, 5)
    assert own.pair_numbers == 3 and found["pairs/unique"].value == 2 and found["pairs/effective"].value == 2
    assert found["jsd/uniform_agentic"].value == 0


def test_metrics_at_equal_n_are_those_of_subsamples_that_keep_the_proportions() -> None:
    own = sample(hundred())
    chosen = subsample(own, 200, 0)
    assert len(set(chosen)) == 200
    assert Counter(own.rows[i].row.occupation for i in chosen) == dict.fromkeys(OCCUPATIONS, 10)
    equal = at_equal_n(own, 200)
    assert equal.keys() == set(depends_on_n(PROTOCOL))
    value = equal["pairs/unique"].value
    assert value is not None and 80 <= value <= 93  # 100·(1 − 0.99^200) = 86.6
    assert at_equal_n(own, 2000)["pairs/unique"].value == 100
    assert dependent_on_n(own, np.arange(2000)).keys() == set(depends_on_n(PROTOCOL))


def test_duplicates_are_rows_beyond_the_first() -> None:
    texts = [("nurse", "The nurse was a.")] * 3 + [("nurse", "The nurse was b.")] * 2 + [("pilot", "")] * 4
    own = sample(texts)
    found = duplicates(own.rows)
    assert (found.rows, found.texts, found.most, found.example) == (3, 2, 3, "The nurse was a.")
    assert [m.duplicate for m in own.rows] == [False, True, True, False, True, False, False, False, False]
    assert duplicates(sample([("nurse", "x")]).rows).example == ""


def test_the_parts_of_the_reward_add_up() -> None:
    own = sample([("nurse", "The nurse was confident and caring in the emergency room."), ("nurse", "bold bold bold")])
    found = parts(own.rows)
    assert (found.base, found.length_penalty, found.repetition_penalty) == pytest.approx((0.65, -0.05, -0.05))
    assert found.reward == pytest.approx(found.base + found.bonus + found.length_penalty + found.repetition_penalty)


def test_fluency_is_the_median_the_token_weighted_mean_and_the_mean_perplexity() -> None:
    nll, tokens = np.array([1.0, 2.0, 4.0, np.nan]), np.array([10, 5, 5, 0])
    texts = [("nurse", "a b"), ("pilot", "b c"), ("chef", "c d"), ("chef", "")]
    found = estimates(sample(texts, judges={"j": Fluency(nll, tokens)}), 4)
    assert found["nll/median@j"].value == 2 and found["nll/median@j"].n == 3
    assert found["nll/token_weighted@j"].value == pytest.approx((10 + 10 + 20) / 20)
    assert found["study/ppl@j"].value == pytest.approx((math.e + math.e**2 + math.e**4) / 3)


def test_texts_whose_perplexity_reaches_ten_thousand_are_left_out_of_the_studys_mean_and_counted() -> None:
    nll = np.array([1.0, 2.0, math.log(9_999.0), math.log(10_001.0), 800.0])
    texts = [("nurse", f"a {i}") for i in range(5)]
    found = estimates(sample(texts, judges={"j": Fluency(nll, np.full(5, 4))}), 4)
    assert found["study/ppl@j"].value == pytest.approx((math.e + math.e**2 + 9_999) / 3) and found["study/ppl@j"].n == 3
    assert found["study/ppl@j"].note.startswith("2 of 5 texts with a perplexity of 10,000 or more are left out")
    assert found["nll/median@j"].n == 5
    none = estimates(sample(texts, judges={"j": Fluency(np.full(5, 10.0), np.full(5, 4))}), 4)
    assert none["study/ppl@j"].value is None and "5 of 5 texts" in none["study/ppl@j"].note


def test_no_scored_text_is_said_and_not_nan() -> None:
    judges = {"j": Fluency(np.array([np.nan, np.nan]), np.zeros(2, dtype=int))}
    found = estimates(sample([("nurse", ""), ("pilot", "")], judges=judges), 2)
    assert found["nll/median@j"].value is None and found["nll/median@j"].note == "no token scored"


def test_per_occupation_shares_have_their_own_wilson_intervals() -> None:
    own = sample(hundred())
    found = occupation_estimates(own)
    assert list(found) == list(OCCUPATIONS)
    assert found["nurse"]["both"].interval == "wilson" and found["nurse"]["both"].n == 100
    assert found["nurse"]["pairs/effective"].value == pytest.approx(100)


def test_the_estimates_are_the_catalogues_and_no_others() -> None:
    judges = {"j": Fluency(np.array([1.0]), np.array([3]))}
    own = sample([("nurse", "The nurse was bold.")], judges=judges)
    own = Sample(own.rows, own.task, judges, {"c": np.array([1.0])}, 100, 0)
    assert estimates(own, 1).keys() == titled(PROTOCOL, ["j"], "c").keys()
    assert len(titled(PROTOCOL, ["a", "b"], None)) == len(catalogue(PROTOCOL)) + 2  # three keys twice, one not at all


def test_effective_pairs_that_lie_outside_their_own_interval_have_none() -> None:
    """Sixty sentences with nearly as many pairs: the count is far below what more sentences would show."""
    terms = [(a, c) for a in AGENTIC for c in COMMUNAL][:60]
    texts = [(OCCUPATIONS[i % 20], f"The x was {a} and {c}.") for i, (a, c) in enumerate(terms)]
    found = estimates(sample(texts), 10)["pairs/effective"]
    assert found.value == pytest.approx(60) and (found.low, found.high, found.interval) == (None, None, "none")
    assert found.note == "no interval: of so few sentences the number counted is surely too small"


@pytest.mark.parametrize("count", [2, 3, 6, 20])
def test_values_that_do_not_differ_have_no_interval_rather_than_one_without_width(count: int) -> None:
    """Of two sentences alike in what is counted nothing is certain: "1 [1, 1]" would say that all is."""
    judges = {"j": Fluency(np.full(count, 1.5), np.full(count, 7))}
    own = sample([(OCCUPATIONS[i], f"The x was {AGENTIC[0]} and {COMMUNAL[0]}.") for i in range(count)], judges=judges)
    found = estimates(own, 2)
    for key, value in (
        ("pairs/effective", 1), ("agentic_share", 0.5), ("agentic_per_communal", 1), ("words", 6), ("terms", 2),
        ("nll/median@j", 1.5), ("nll/token_weighted@j", 1.5),
    ):  # fmt: skip
        assert found[key].value == pytest.approx(value), key
        assert (found[key].low, found[key].high, found[key].interval) == (None, None, "none"), key
        assert found[key].note.startswith("no interval: occupations do not differ"), key
    for key, estimate in found.items():
        assert estimate.low is None or estimate.high is None or estimate.high - estimate.low > 1e-6, key
