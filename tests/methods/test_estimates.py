"""Yields, means and first looks: hand-worked numbers and the definitions."""

import math

import pytest

from equipoise.errors import UserError
from equipoise.measures.shares import wilson
from equipoise.methods.completions import Key
from equipoise.methods.estimates import first_look, mean_over_occupations, yields
from equipoise.protocol.task import PROTOCOL
from tests.tasks import foreign_task, one_class_task

OCCUPATIONS = PROTOCOL.names
BOTH = "was bold and loyal."
NONE = "was there."


def test_yields_count_every_draw_but_p0_every_occupation_alike() -> None:
    # Four draws for the nurse, of which 1 and 4 pass; two for everyone else, of which the pilot's second passes.
    texts = {Key(o, i): NONE for o in OCCUPATIONS for i in (1, 2)} | {Key("nurse", 3): NONE}
    texts |= {Key("nurse", 1): BOTH, Key("nurse", 4): BOTH, Key("pilot", 2): BOTH}
    known = yields(texts, PROTOCOL, "both")
    assert (known["yield"]["accepted"], known["yield"]["drawn"]) == (3, 42)
    assert known["yields"]["nurse"]["value"] == 0.5 and known["yields"]["chef"]["accepted"] == 0
    assert known["p0"]["value"] == 2 / 40 and known["p0"]["n"] == 40  # the first two draws of each
    assert (known["p0"]["low"], known["p0"]["high"]) == wilson(2, 40)
    assert yields(texts, PROTOCOL, "strict")["yield"]["accepted"] == 0


def test_without_a_draw_of_each_occupation_there_is_no_p0() -> None:
    known = yields({Key("nurse", 1): BOTH}, PROTOCOL, "both")
    assert known["p0"] is None and known["yields"]["chef"]["value"] is None


def test_a_mean_over_occupations_has_the_error_of_the_values_within_them() -> None:
    # Means 0 and 10 by turns; values one apart from each: variance 2 within each occupation, two values each.
    values = {Key(o, r): 10.0 * (i % 2) + (-1) ** r for i, o in enumerate(OCCUPATIONS) for r in (1, 2)}
    found = mean_over_occupations(values)
    half = 1.959964 * math.sqrt(20 * (2 / 2)) / 20
    assert found["value"] == pytest.approx(5.0)
    assert (found["low"], found["high"]) == pytest.approx((5 - half, 5 + half), abs=1e-6)


def test_uniform_terms_have_the_studys_greatest_entropy() -> None:
    agentic, communal = (each.terms for each in PROTOCOL.classes)
    texts = [f"The nurse was {a} and {c}." for a, c in zip(agentic, communal, strict=True)]
    shown = first_look([*texts, "The nurse was there."], PROTOCOL)
    # log2 10 = 3.322; ten of eleven.
    assert "90.91 % both classes, entropy 3.322 bits, 10 pairs" in shown and "n 11" in shown
    assert "99.87 ± 0.15" in shown and "3.284" in shown and "67.8" in shown


def test_yields_are_by_the_tasks_occupations_and_every_one_of_its_classes() -> None:
    task = foreign_task()
    texts = {
        Key("Ärztin", 1): "Die Ärztin gilt als klug, herzlich und ehrlich.",
        Key("Ärztin", 2): "Die Ärztin gilt als klüger, herzlich und ehrlich.",  # the stem is klug*
        Key("Maschinenbauingenieur", 1): "Der Maschinenbauingenieur gilt als KLUGER, fürsorglicher, aufrichtig",
        Key("Kauffrau im Einzelhandel", 1): "Die Kauffrau im Einzelhandel gilt als herzlich und ehrlich.",
    }
    both, strict = yields(texts, task, "both"), yields(texts, task, "strict")
    assert list(both["yields"]) == list(task.names)
    assert [part["accepted"] for part in both["yields"].values()] == [1, 1, 0]
    assert (both["p0"]["n"], both["p0"]["value"]) == (3, 2 / 3) and "of each of 3 occupations" in both["p0"]["how"]
    assert [part["accepted"] for part in strict["yields"].values()] == [1, 0, 0]  # the second does not end


def test_a_mean_is_over_the_occupations_that_there_are_and_one_value_has_no_interval() -> None:
    values = {Key("a b", 1): 1.0, Key("a b", 2): 3.0, Key("c", 1): 5.0, Key("c", 2): 5.0}
    half = 1.959964 * math.sqrt((2.0 / 2 + 0.0) / 4)
    found = mean_over_occupations(values)
    assert (found["low"], found["value"], found["high"]) == pytest.approx((3.5 - half, 3.5, 3.5 + half))
    with pytest.raises(UserError, match="--kl-sentences"):
        mean_over_occupations({Key("a b", 1): 1.0})


def test_a_first_look_at_another_task_has_its_classes_and_nothing_of_the_study() -> None:
    three = foreign_task()
    texts = [
        "Die Ärztin gilt als klug, herzlich und ehrlich.",
        "Die Ärztin gilt als fähig, herzlich und aufrichtig.",
        "Die Ärztin gilt als fähig und klug.",
    ]
    # fähig 2, klug* 2: 1 bit; herzlich alone: 0; ehrlich and aufrichtig: 1.
    shown = first_look(texts, three)
    assert "66.67 % all 3 classes, entropy 0.667 bits, 2 combinations" in shown and "n 3" in shown
    assert "\n" not in shown and "study" not in shown
    one = one_class_task()
    shown = first_look(["Every real estate agent is careful.", "Every real estate agent is late."], one)
    assert "50.00 % the class, entropy 0.000 bits, 1 terms" in shown
