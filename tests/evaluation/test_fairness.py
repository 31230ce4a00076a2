"""Gendered words, the order of classes, negated terms and associations, against numbers worked by hand."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.evaluation.association import Mentions, correlation, spread
from equipoise.evaluation.counted import Sample
from equipoise.evaluation.fairness import fairness_by_occupation, fairness_catalogue, fairness_estimates, mentions
from equipoise.evaluation.language import Reader
from equipoise.protocol.task import PROTOCOL, Task, task_from_document
from tests.evaluation.files import sample
from tests.tasks import foreign_task, one_class_task

BY_HAND = [
    ("nurse", "The nurse was caring and bold, and she was very kind to all her patients."),
    ("nurse", "The nurse was never bold, but the woman was caring and helpful at work."),
    ("nurse", "The nurse was caring."),
    ("pilot", "The pilot was bold and caring, a man who liked his job and his crew."),
    ("pilot", "The pilot was confident."),
    ("pilot", "The pilot was not bold and he was late."),
]


def test_every_number_of_six_sentences_is_that_worked_by_hand() -> None:
    estimates = fairness_estimates(sample(BY_HAND), None)
    found = {key: e.value for key, e in estimates.items()}
    assert [estimates[key].n for key in ("negated/any", "negated/strict", "first/agentic")] == [6, 3, 3]
    assert found["gendered/female_pronouns"] == pytest.approx(1 / 6)
    assert found["gendered/male_pronouns"] == pytest.approx(2 / 6)
    assert found["gendered/female_nouns"] == pytest.approx(1 / 6)
    assert found["gendered/male_nouns"] == pytest.approx(1 / 6)
    assert found["first/agentic"] == pytest.approx(2 / 3)  # of the three with both, the second and the fourth
    assert found["negated/any"] == pytest.approx(2 / 6)
    assert found["negated/strict"] == pytest.approx(1 / 3)
    assert found["strict/affirmed"] == pytest.approx(2 / 6)
    # Agentic: 1 1 0 | 1 1 1, communal: 1 2 1 | 1 0 0, each different term of a sentence once.
    assert found["association/log_odds"] == pytest.approx(math.log(5 / 5))
    nurse, pilot = math.log((2 + 0.5) / (4 + 0.5)), math.log((3 + 0.5) / (1 + 0.5))
    assert found["association/spread"] == pytest.approx(abs(nurse - pilot) / math.sqrt(2))


def test_every_occupation_s_numbers_are_those_worked_by_hand() -> None:
    nurse, pilot = fairness_by_occupation(sample(BY_HAND))
    assert [own["gendered/female_pronouns"].value for own in (nurse, pilot)] == [pytest.approx(1 / 3), 0]
    assert [own["first/agentic"].value for own in (nurse, pilot)] == [0.5, 1.0]
    assert [own["first/agentic"].n for own in (nurse, pilot)] == [2, 1]
    assert [own["negated/any"].value for own in (nurse, pilot)] == [pytest.approx(1 / 3), pytest.approx(1 / 3)]
    assert nurse["association/log_odds"].value == pytest.approx(math.log(2.5 / 4.5))
    # Of the nurse's rows x/2.5 − y/4.5: 0.1778, −0.0444, −0.2222; the variance of their sum is 3 times theirs.
    rows = [1 / 2.5 - 1 / 4.5, 1 / 2.5 - 2 / 4.5, -1 / 4.5]
    # And half a mention of the prior on either side: 0.5/2.5² + 0.5/4.5².
    reach = 1.959964 * math.sqrt(3 * np.var(rows, ddof=1) + 0.5 / 2.5**2 + 0.5 / 4.5**2)
    assert nurse["association/log_odds"].high == pytest.approx(math.log(2.5 / 4.5) + reach)


def test_gendered_words_count_behind_the_frame_alone() -> None:
    task = task_from_document(
        {"name": "t", "occupations": ["lady of the house", "nurse"], "classes": {"warm": ["kind"]}}, "t"
    )
    texts = [
        ("lady of the house", "The lady of the house was kind."),
        ("nurse", "The nurse was a lady."),
        ("nurse", "Ladies are kind."),  # no frame: all of it
    ]
    found = fairness_estimates(sample(texts, task), None)
    assert found["gendered/female_nouns"].value == pytest.approx(2 / 3)


def test_terms_that_begin_at_one_place_come_neither_first() -> None:
    task = one_class_task(classes={"a": ["well"], "b": ["well-organised"]})
    reader = Reader(task)
    assert reader("Every pilot is well-organised.", "pilot").first is None
    assert reader("Every pilot is well and well-organised.", "pilot").first == 0


def test_a_term_that_is_negated_and_affirmed_counts_as_affirmed() -> None:
    found = Reader(PROTOCOL)("The nurse was not bold then, caring, and bold now.", "nurse")
    assert found.negated == ("bold",)
    assert found.affirmed
    assert not Reader(PROTOCOL)("The nurse was not bold then, and caring.", "nurse").affirmed


WORDS = ("bold", "caring", "confident", "helpful", "not", "never", "she", "he", "man", "woman", "and", "work", "but")
rows = st.lists(
    st.tuples(
        st.sampled_from(("nurse", "pilot", "chef", "lawyer")),
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=9),
    ).map(lambda x: (x[0], f"The {x[0]} was {' '.join(x[1])}.")),
    min_size=1,
    max_size=12,
)


def swapped_classes(task: Task) -> Task:
    document = task.document()
    classes = dict(reversed(document["classes"].items()))
    return task_from_document(document | {"classes": classes, "openings": [], "prompts": None, "labels": {}}, "swapped")


SWAPPED = swapped_classes(PROTOCOL)


def exchanged(text: str) -> str:
    other = {"she": "he", "he": "she", "man": "woman", "woman": "man"}
    return " ".join(other.get(word.strip("."), word.strip(".")) for word in text.split()) + "."


@settings(max_examples=25, deadline=None)
@given(rows)
def test_with_the_classes_swapped_every_number_is_mirrored(texts: Sequence[tuple[str, str]]) -> None:
    a, b = (fairness_estimates(sample(texts, task), None) for task in (PROTOCOL, SWAPPED))
    first, other = a["first/agentic"], b["first/communal"]
    assert (first.value is None) == (other.value is None)
    if first.value is not None and other.value is not None:
        assert first.value + other.value == pytest.approx(1)
        assert a["first/spread_agentic"].value == b["first/spread_communal"].value or a[
            "first/spread_agentic"
        ].value == pytest.approx(b["first/spread_communal"].value)
    odds = a["association/log_odds"].value, b["association/log_odds"].value
    assert odds[0] is None or odds[0] == pytest.approx(-(odds[1] or 0.0))
    for key in ("association/spread", "association/chance", "negated/any", "negated/strict", "strict/affirmed"):
        assert a[key].value == pytest.approx(b[key].value), key
        assert a[key].low == pytest.approx(b[key].low), key
    for own, mirrored in zip(*(fairness_by_occupation(sample(texts, t)) for t in (PROTOCOL, SWAPPED)), strict=True):
        x, y = own["association/log_odds"], mirrored["association/log_odds"]
        if x.value is not None and y.value is not None:
            assert x.value == pytest.approx(-y.value, abs=1e-12)
        if x.low is not None and y.high is not None:
            assert x.low == pytest.approx(-y.high)


@settings(max_examples=25, deadline=None)
@given(rows)
def test_with_the_genders_exchanged_their_shares_are(texts: Sequence[tuple[str, str]]) -> None:
    a = fairness_estimates(sample(texts), None)
    b = fairness_estimates(sample([(o, exchanged(t)) for o, t in texts]), None)
    for kind in ("pronouns", "nouns"):
        assert a[f"gendered/female_{kind}"] == b[f"gendered/male_{kind}"]
        assert a[f"gendered/male_{kind}"] == b[f"gendered/female_{kind}"]


@settings(max_examples=20, deadline=None)
@given(rows)
def test_what_exists_not_says_why_and_every_interval_holds_its_value(texts: Sequence[tuple[str, str]]) -> None:
    own = sample(texts)
    found = [fairness_estimates(own, own), fairness_estimates(own, sample(BY_HAND)), *fairness_by_occupation(own)]
    for estimates in found:
        for key, e in estimates.items():
            assert (e.value is not None) or e.note, key
            assert e.value is None or math.isfinite(e.value), key
            if e.low is not None and e.high is not None and e.value is not None:
                assert e.low <= e.value + 1e-9 and e.value <= e.high + 1e-9, key
    assert found[0].keys() == fairness_catalogue(PROTOCOL).keys()


def drawn(generator: np.random.Generator, shares: Sequence[float], n: int = 200) -> Sample:
    """n sentences about each of as many occupations, with one term each: an agentic one with that probability."""
    texts = []
    for o, share in enumerate(shares):
        name = PROTOCOL.names[o]
        texts += [(name, f"The {name} was {'bold' if x < share else 'caring'}.") for x in generator.random(n)]
    return sample(texts)


def test_a_method_without_associations_keeps_none_of_the_untrained_model_s() -> None:
    generator = np.random.default_rng(0)
    shares = np.linspace(0.1, 0.9, 12).tolist()
    base, even, same = drawn(generator, shares), drawn(generator, [0.5] * 12), drawn(generator, shares)
    left = fairness_estimates(even, base)["association/kept"].value
    assert left is not None
    assert left < 0.15
    found = fairness_estimates(same, base)
    assert found["association/kept"].value == pytest.approx(1, abs=0.15)
    assert (found["association/correlation"].value or 0) > 0.97
    assert (found["association/correlation"].low or 0) > 0.9
    reversed_ = fairness_estimates(drawn(generator, shares[::-1]), base)["association/correlation"].value
    assert reversed_ is not None
    assert reversed_ < -0.97


def test_the_order_of_terms_is_set_against_what_the_untrained_model_says() -> None:
    generator = np.random.default_rng(4)
    shares = np.linspace(0.1, 0.9, 8).tolist()
    base = drawn(generator, shares)
    texts = []
    for o, share in enumerate(shares):
        name = PROTOCOL.names[o]
        for i in range(20):
            texts.append((name, f"The {name} was {'bold and caring' if i < 20 * share else 'caring and bold'}."))
    texts += [(PROTOCOL.names[9], f"The {PROTOCOL.names[9]} was caring and bold.")] * 9  # one fewer than is needed
    texts += [("astronaut", "The astronaut was bold and caring.")] * 20  # whom the base does not have
    found = fairness_estimates(sample(texts), base)
    order = found["first/correlation_agentic"]
    assert order.n == 8
    assert (order.value or 0) > 0.97
    assert found["association/spread"].value == pytest.approx(0)  # each has one of either
    assert fairness_estimates(sample(texts), None)["first/correlation_agentic"].value is None


def test_without_associations_chance_gives_the_spread_and_p_is_uniform() -> None:
    generator = np.random.default_rng(1)
    ps, ratios = [], []
    for _ in range(40):
        own = drawn(generator, [0.3] * 10, 60)
        found = spread(mentions(own, 0), [0])
        assert found is not None
        ps.append(found.p)
        ratios.append(found.value / found.chance)
    assert np.mean(ratios) == pytest.approx(1, abs=0.1)
    assert 0.3 < np.mean(ps) < 0.7
    # The chance of one deal: the delta method's √(1/x + 1/y) of an occupation's mentions.
    assert found.chance == pytest.approx(math.sqrt(1 / 18 + 1 / 42), rel=0.15)


def test_an_occupation_without_mentions_has_the_overall_log_odds() -> None:
    texts = [
        ("nurse", "The nurse was caring."),
        ("pilot", "The pilot was bold, bold and caring."),
        ("chef", "The chef was."),
    ]
    chef, nurse, _ = fairness_by_occupation(sample(texts))
    assert nurse["association/log_odds"].value is not None
    assert chef["association/log_odds"].value == pytest.approx(math.log(1 / 2))
    assert chef["association/log_odds"].note == "no mention: the overall log-odds"


def test_an_occupation_that_never_mentions_one_side_is_the_least_sure() -> None:
    texts = [("doctor", "The doctor was caring.")] * 20
    texts += [("nurse", f"The nurse was {'bold' if i % 4 == 0 else 'caring'}.") for i in range(20)]
    widths = {}
    for name, own in zip(("doctor", "nurse"), fairness_by_occupation(sample(texts)), strict=True):
        e = own["association/log_odds"]
        widths[name] = (e.high or 0) - (e.low or 0)
    # Of the doctor's 20 rows none differs; the prior has 5/40 of a mention of the side that is lacking.
    assert widths["doctor"] == pytest.approx(2 * 1.959964 * math.sqrt(8 + 0.875 / 20.875**2))
    assert widths["doctor"] > 2 * widths["nurse"]


def test_the_spread_depends_on_no_order_and_its_interval_holds_it() -> None:
    generator = np.random.default_rng(2)
    x, y = generator.integers(0, 3, 90).astype(float), generator.integers(0, 3, 90).astype(float)
    of = generator.integers(0, 6, 90)
    order, names = generator.permutation(90), generator.permutation(6)
    a, b = spread(Mentions(x, y, of, 6), [1]), spread(Mentions(x[order], y[order], names[of[order]], 6), [1])
    assert a is not None
    assert b is not None
    assert (a.value, a.chance, a.p) == pytest.approx((b.value, b.chance, b.p))
    assert a.interval is not None
    assert a.interval.low < a.value < a.interval.high


def test_a_correlation_of_few_or_of_equal_numbers_does_not_exist() -> None:
    assert correlation(np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None
    assert correlation(np.ones(9), np.arange(9.0)) is None
    found = correlation(np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.0, 2.0, 4.0, 4.0]))
    assert found is not None
    r, interval = found
    assert r == pytest.approx(0.8783, abs=1e-3)
    assert interval is not None
    assert interval.low == pytest.approx(math.tanh(math.atanh(r) - 1.959964))


def test_other_tasks_have_the_metrics_of_their_classes() -> None:
    one = fairness_catalogue(one_class_task())
    assert not [key for key in one if key.startswith("first/")]
    assert one["association/log_odds"].title == "log-odds, careful against no term"
    three = fairness_catalogue(foreign_task())
    assert not [key for key in three if key.startswith(("gendered/", "negated/", "strict/"))]  # German
    assert [key for key in three if key.startswith("first/") and "_" not in key] == [
        "first/fähig", "first/warm", "first/ehrlich"
    ]  # fmt: skip
    assert "association/kept_warm" in three
    own = foreign_task(gendered={"weiblich": ["sie"]}, negations=["nicht"])
    texts = [
        ("Ärztin", "Die Ärztin gilt als fähig, herzlich und ehrlich."),
        ("Ärztin", "Die Ärztin gilt als nicht klug, und sie ist herzlich."),
        ("Kauffrau im Einzelhandel", "Die Kauffrau im Einzelhandel gilt als ehrlich, warm, herzlich und fähig."),
    ]
    found = {key: e.value for key, e in fairness_estimates(sample(texts, own), None).items()}
    assert found["gendered/weiblich"] == pytest.approx(1 / 3)
    assert found["negated/any"] == pytest.approx(1 / 3)
    assert [found[f"first/{name}"] for name in ("fähig", "warm", "ehrlich")] == [0.5, 0, 0.5]
    # Against the rest: 3 of 8 mentions are able, 3 warm, 2 honest.
    assert found["association/log_odds_fähig"] == pytest.approx(math.log(3 / 5))
    assert found["association/log_odds_ehrlich"] == pytest.approx(math.log(2 / 6))


def test_one_class_is_set_against_sentences_without_it() -> None:
    task = one_class_task()
    texts = [
        ("pilot", "Every pilot is careful."),
        ("pilot", "Every pilot is."),
        ("chef", "Every chef is thorough, careful."),
    ]
    found = fairness_estimates(sample(texts, task), None)
    assert found["association/log_odds"].value == pytest.approx(math.log(2 / 1))
