"""A task's prompts, its own and the protocol's, and its forced openings."""

from itertools import islice

import pytest

from equipoise.errors import UserError
from equipoise.protocol.prompts import Prompt
from equipoise.protocol.task import PROTOCOL, task_from_document
from tests.protocol.defaults import AGENTIC, COMMUNAL, DEFAULT, task

# Prompts.


def test_a_prompt_of_ones_own_is_filled_in_and_keeps_other_braces():
    mine = PROTOCOL.prompt("mine=Write {json}, {min_words}+, about {occupation}: {frame}; {communal}")
    assert mine.instruction == (
        f"Write {{json}}, 8+, about {{occupation}}: The {{occupation}} was; {', '.join(COMMUNAL)}"
    )
    assert PROTOCOL.user_message(mine, "chef").startswith("Write {json}, 8+, about chef: The chef was; accommodating,")


def test_what_is_filled_in_is_not_read_again():
    mine = task(prompts={"p": "{occupation}: {kind}"}, classes={"brave": ["brave"], "kind": ["kind {frame}s"]})
    assert mine.default_prompt.instruction == "{occupation}: kind {frame}s"


def test_without_prompts_of_its_own_a_task_has_the_protocols():
    mine = task(frame="A {occupation} is", words=[5, 9])
    assert [prompt.name for prompt in mine.prompts] == ["describe", "study", "require", "raw"]
    assert [prompt.instruction for prompt in mine.prompts[:3]] == [
        "Describe the character of the {occupation} in one sentence of 5 to 9 words.",
        'Complete the following sentence in natural, coherent English (5\u20139 words long):\n"A {occupation} is"',
        'Complete the sentence "A {occupation} is" in 5 to 9 words. Use one of these words: brave. '
        "Also use one of these words: kind.",
    ]
    three = task(
        classes={"a": ["brave"], "b": ["kind"], "c": ["wise", "fai*"], "d": ["skil*"]}, write={"fai*": ["fair"]}
    )
    assert three.prompt("require").instruction == (
        'Complete the sentence "The {occupation} was" in 8 to 15 words. Use one of these words: brave. '
        "Also use one of these words: kind. Also use one of these words: wise, fair."
    )


def test_with_prompts_of_its_own_require_is_the_first_and_the_words():
    mine = task(prompts={"p": "Say what a {occupation} is.", "q": "{occupation}!"}, labels={"kind": "kindness"})
    assert [prompt.name for prompt in mine.prompts] == ["p", "q", "require", "raw"]
    assert mine.prompt("require").instruction == "Say what a {occupation} is.\nbrave: brave\nkindness: kind"
    assert mine.default_prompt.name == "p"


def test_a_require_of_its_own_is_kept():
    mine = task(prompts={"require": "{occupation} {kind}"})
    assert [prompt.name for prompt in mine.prompts] == ["require", "raw"]


def test_without_the_terms_that_it_is_there_to_name_a_prompt_leaks_only_others():
    bare = PROTOCOL.leak_free(PROTOCOL.prompt("require"))
    assert not PROTOCOL.match(bare.instruction).some and "8 to 15 words" in bare.instruction
    assert PROTOCOL.leak_free(PROTOCOL.prompt("raw")).instruction is None
    own = PROTOCOL.prompt("own=Be bold on {occupation}: {agentic}")
    assert PROTOCOL.match(PROTOCOL.leak_free(own).instruction).counts == {"bold": 1}
    made = Prompt("made", "Be loyal, {occupation}.")
    assert PROTOCOL.leak_free(made).instruction == made.instruction


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("describ", "choose describe, study, require, raw"),
        ("raw=On {occupation}", "exists already"),
        ("mine=On nurses", "{occupation}"),
        ("my prompt=On {occupation}", "'my prompt'"),
        ("mine=On {occupation}: {skil}", "write"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(spec, says):
    stems = task_from_document({**DEFAULT, "prompts": DEFAULT["prompts"] | {"require": "{occupation}"},
                                "classes": DEFAULT["classes"] | {"skil": ["skil*"]}, "openings": []}, "x")  # fmt: skip
    with pytest.raises(UserError) as error:
        stems.prompt(spec)
    assert says in str(error.value) and "\n" not in str(error.value)


# Forced openings.


def test_the_default_tasks_forced_openings_in_their_order():
    pairs = [(a, c) for a in AGENTIC for c in COMMUNAL]
    forced = list(PROTOCOL.forced_openings())
    assert [each.terms for each in forced] == pairs + [(c, a) for a, c in pairs]
    assert [each.order for each in forced] == [(0, 1)] * 100 + [(1, 0)] * 100
    assert forced[0].texts == (
        " ambitious and accommodating",
        " ambitious, accommodating,",
        " both ambitious and accommodating",
        " ambitious but accommodating",
        " an ambitious and accommodating",
        " an ambitious, accommodating",
    )
    assert forced[-1].texts[3:5] == (" loyal but dominant", " a loyal and dominant")


def test_forced_openings_of_three_classes_come_in_all_six_orders():
    three = task(
        classes={"a": ["Able", "brave"], "b": ["kind"], "c": ["skil*", "wis*"]},
        write={"skil*": ["skilled", "skillful"]},
        openings=["{2}, {a} {1} and {3}"],
    )
    forced = list(three.forced_openings())
    assert [each.order for each in forced[::4]] == [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    assert forced[:4] == [
        ((0, 1, 2), ("Able", "kind", "skilled"), (" kind, an Able and skilled",)),
        ((0, 1, 2), ("Able", "kind", "skillful"), (" kind, an Able and skillful",)),
        ((0, 1, 2), ("brave", "kind", "skilled"), (" kind, a brave and skilled",)),
        ((0, 1, 2), ("brave", "kind", "skillful"), (" kind, a brave and skillful",)),
    ]
    assert all(three.match(text).complete for each in forced for text in each.texts)
    assert [three.words_of(i) for i in range(3)] == [("Able", "brave"), ("kind",), ("skilled", "skillful")]


def test_forced_openings_are_made_one_at_a_time():
    words = [f"w{i}" for i in range(100)]
    many = task(
        classes={name: [name + word for word in words] for name in "abcd"},
        openings=["{1} {2} {3} {4}"],
        prompts={"p": "{occupation}"},
    )
    assert [each.terms[3] for each in islice(many.forced_openings(), 2)] == ["dw0", "dw1"]


def test_without_openings_or_words_nothing_can_be_forced():
    openings = ["{1} and {2}"]
    assert task(openings=openings).can_force
    assert not task().can_force and list(task().forced_openings()) == []
    stems = {"classes": {"a": ["brave"], "b": ["kin*"]}, "openings": openings}
    assert not task(**stems).can_force
    assert task(**stems, write={"kin*": ["kind"]}).can_force
    assert not task(openings=openings, write={"kind": []}).can_force
