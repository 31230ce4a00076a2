"""What differs between two documents is shown, whatever is alike in them."""

from hypothesis import given
from hypothesis import strategies as st

from equipoise.protocol.difference import apart, differences, sides
from equipoise.protocol.task import PROTOCOL
from tests.tasks import foreign_task


def test_a_text_that_ends_in_a_quotation_mark_keeps_it() -> None:
    assert differences({"p": 'Say "who"'}, {"p": 'Say "what"'}) == ['p: Say \\"who\\" → Say \\"what\\"']


def test_of_long_texts_the_part_that_differs_is_shown() -> None:
    texts = [
        f"Describe the character of the {{occupation}} in one sentence of {n} words, in plain English." for n in (8, 15)
    ]
    assert apart(*texts) == "…ne sentence of 8 words, in plai… → …ne sentence of 15 words, in plai…"
    assert apart("short", "shorter") == "short → shorter"


@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=300), st.text(max_size=300))
def test_unequal_texts_are_shown_unequal_unless_both_are_cut(start: str, one: str, two: str, end: str) -> None:
    old, new = sides(start + one + end, start + two + end)
    assert max(len(old), len(new)) <= 120
    if one != two and max(len(one), len(two)) < 90:
        assert old != new


def test_an_entirely_different_task_is_a_line_of_a_few_hundred_characters() -> None:
    lines = PROTOCOL.differences(foreign_task())
    assert len("; ".join(lines)) < 1500 and lines[-1].startswith("and ") and lines[-1].endswith(" more")
    longer = PROTOCOL.differences(foreign_task(classes={"a": [f"term{i}" for i in range(300)]}))
    assert len("; ".join(longer)) < 1500


def test_of_long_lists_what_went_and_what_came_is_shown() -> None:
    old = [f"occupation {i}" for i in range(30)]
    new = [*old[:10], "x", *old[11:]]
    assert differences({"o": old}, {"o": new}) == ["o: [occupation 10] → [x]"]
    assert differences({"o": old}, {"o": old[9:]}) == [
        "o: [occupation 0, occupation 1, occupation 2, occupation 3] and 5 more → nothing"
    ]
    assert differences({"o": old}, {"o": old[::-1]})[0].startswith("o: the order [occupation 0, ")
