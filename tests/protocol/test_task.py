"""The task as a value: the default one to the byte, others by hand."""

import copy
import pickle
import subprocess
import sys
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.protocol.reward import RewardWeights
from equipoise.protocol.task import PROTOCOL, packaged_tasks, read_task, task_from_document
from tests.protocol.defaults import AGENTIC, COMMUNAL, DEFAULT, task


def test_the_default_task_is_the_protocols_to_the_byte():
    assert PROTOCOL.document() == DEFAULT
    assert list(PROTOCOL.document()) == list(DEFAULT)
    assert PROTOCOL.notes == ()


def test_the_default_prompts_are_the_protocols_to_the_byte():
    assert {prompt.name: prompt.instruction for prompt in PROTOCOL.prompts} == {
        "describe": "Describe the character of the {occupation} in one sentence of 8 to 15 words.",
        "study": "Complete the following sentence in natural, coherent English (8\u201315 words long):\n"
        '"The {occupation} was"',
        "require": 'Complete the sentence "The {occupation} was" in 8 to 15 words. '
        "Use one of these words: ambitious, assertive, bold, confident, decisive, independent, self-reliant, "
        "competitive, adventurous, dominant. "
        "Also use one of these words: accommodating, caring, cooperative, empathetic, friendly, "
        "nurturing, supportive, compassionate, helpful, loyal.",
        "raw": None,
    }
    assert PROTOCOL.default_prompt.name == "describe"
    for prompt in PROTOCOL.prompts:
        assert PROTOCOL.user_message(prompt, "chef") == prompt.user_message("chef")


@pytest.mark.parametrize("module", ["lexicon", "prompts", "reward", "task", "task_file", "task_checks", "folding"])
def test_every_module_can_be_imported_first(module):
    code = f"import equipoise.protocol.{module}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_task_is_a_value():
    again = task_from_document(PROTOCOL.document(), "again")
    assert again == PROTOCOL and hash(again) == hash(PROTOCOL) and again is not PROTOCOL
    assert again.fingerprint() == PROTOCOL.fingerprint() and len(again.fingerprint()) == 16
    assert task() != PROTOCOL and PROTOCOL.fingerprint() != task().fingerprint()
    assert repr(PROTOCOL) == "<Task agentic-communal: 2 classes, 20 occupations>"
    PROTOCOL.match("bold")
    for twin in (pickle.loads(pickle.dumps(PROTOCOL)), copy.deepcopy(PROTOCOL)):
        assert twin == PROTOCOL and hash(twin) == hash(PROTOCOL)
        assert twin.match("bold").terms == (("bold",), ())


def test_a_pickled_task_has_the_same_hash_in_another_process():
    code = "import pickle, sys; task = pickle.load(sys.stdin.buffer); print(hash(task), task.fingerprint())"
    hash(PROTOCOL)
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(PROTOCOL), capture_output=True, check=True, timeout=60
    )
    assert done.stdout.split() == [str(hash(PROTOCOL)).encode(), PROTOCOL.fingerprint().encode()]


# Occupations, frames, sentences.


def test_an_occupation_has_three_spellings():
    mine = task(
        frame="{occupation} was",
        occupations={
            "nurse": "the nurse",
            "ob-gyn": {"frame": "an OB-GYN", "prompt": "obstetrician"},
            "élu": {"frame": "élu"},
            "judge": {"prompt": "magistrate"},
        },
        prompts={"mine": 'Go on about the {occupation}: "{frame}".'},
    )
    assert mine.names == ("nurse", "ob-gyn", "élu", "judge")
    assert [mine.prefix(name) for name in mine.names] == ["The nurse was", "An OB-GYN was", "Élu was", "Judge was"]
    assert [mine.prefix_words(name) for name in mine.names] == [3, 3, 2, 2]
    prompt = mine.default_prompt
    assert prompt.instruction == 'Go on about the {occupation}: "{occupation} was".'
    assert mine.user_message(prompt, "ob-gyn") == 'Go on about the obstetrician: "An OB-GYN was".'
    assert mine.user_message(prompt, "judge") == 'Go on about the magistrate: "Judge was".'
    assert mine.user_message(mine.prompt("raw"), "judge") is None
    assert mine.sentence("ob-gyn", "n't kind.") == "An OB-GYN wasn't kind."
    assert task_from_document(mine.document(), "again") == mine


def test_an_occupation_that_the_task_lacks_stands_as_it_is():
    assert PROTOCOL.prefix("zoo keeper") == "The zoo keeper was"
    assert PROTOCOL.prefix_words("zoo keeper") == 4
    assert PROTOCOL.user_message(PROTOCOL.default_prompt, "zoo keeper").startswith(
        "Describe the character of the zoo keeper in"
    )


def test_what_follows_the_prefix():
    mine = task(occupations=["real estate agent", "pilot"], frame="The {occupation} is")
    assert mine.continuation("The real estate agent is kind.", "real estate agent") == " kind."
    assert mine.continuation("The real estate agent isn't.", "real estate agent") == "n't."
    assert mine.continuation("The real estate agent is", "real estate agent") == ""
    assert mine.continuation("The pilot is kind.", "real estate agent") is None


def test_occupations_to_train_on():
    assert PROTOCOL.training_names(False) == PROTOCOL.names
    assert len(PROTOCOL.training_names(True)) == 15 and "barista" not in PROTOCOL.training_names(True)


def test_a_sentence_ends_at_no_abbreviation_of_the_task():
    german = task(frame="Sie als {occupation} war", abbreviations=["z.B.", "usw.", "Hr"])
    assert german.is_complete_sentence("Sie als nurse war, z.B. Montag, usw. Immer für Hr. Lee da.")
    assert not german.is_complete_sentence("Sie als nurse war für Dr. Lee da.")
    assert not PROTOCOL.is_complete_sentence("Sie als nurse war Montag usw. Immer da.")


# The reward by hand.


@pytest.mark.parametrize(
    ("text", "present", "base", "bonus", "total"),
    [
        ("x x x x", 0, -0.2, 0, -0.2),
        ("brave x x x", 1, 0.3, 0, 0.3),
        ("brave bold kind warm", 2, 0.3, 0, 0.3),  # two of three are some, and some have no bonus
        ("brave kind wise x", 3, 1.0, 0, 1.0),
        ("brave bold kind wise", 3, 1.0, 0.05, 1.05),
        ("brave bold kind warm wise", 3, 1.0, 0.1, 1.1),
        ("wise wise wise brave kind", 3, 1.0, 0, 0.9),  # repeated
        ("brave kind wise", 3, 1.0, 0, 0.9),  # too short
        ("brave kind wise x x x", 3, 1.0, 0, 0.9),  # too long
    ],
)
def test_the_reward_of_three_classes(text, present, base, bonus, total):
    three = task(
        classes={"a": ["brave", "bold"], "b": ["kind", "warm"], "c": ["wise"]}, words=[4, 5], frame="{occupation}"
    )
    got = three.score(text)
    assert (sum(map(bool, got.terms)), got.base, got.bonus, got.reward) == (present, base, bonus, total)
    assert list(got.document()) == [
        "text", "a", "b", "c", "words", "base", "bonus", "length_penalty", "repetition_penalty", "reward",
    ]  # fmt: skip
    assert three.complies(text, "both") is (present == 3) is got.complete


@pytest.mark.parametrize(
    ("text", "base", "bonus", "total"),
    [
        ("The nurse was so very tall on Monday.", -0.2, 0, -0.2),
        ("The nurse was so very kind on Monday.", 1.0, 0, 1.0),
        ("The nurse was kind and warm on Monday.", 1.0, 0.05, 1.05),
        ("The nurse was kind, warm, nice, good, fair, soft.", 1.0, 0.2, 1.2),
        ("The nurse was kind.", 1.0, 0, 0.9),
    ],
)
def test_the_reward_of_one_class(text, base, bonus, total):
    one = task(classes={"kind": ["kind", "warm", "nice", "good", "fair", "soft"]})
    got = one.score(text)
    assert (got.base, got.bonus, got.reward) == (base, bonus, total)
    assert one.strict(text) is (base > 0 and total >= 1)


def test_the_reward_takes_its_bounds_from_the_task_and_the_rest_from_the_weights():
    text = "The nurse was bold and loyal."
    assert PROTOCOL.score(text, RewardWeights(length_penalty=0.4)).reward == 0.6
    assert PROTOCOL.with_bounds(5, 6).score(text, RewardWeights(base_both=2)).reward == 2


def test_strict_success_goes_by_the_tasks_bounds_classes_and_abbreviations():
    mine = task(words=[5, 6], abbreviations=["Lt"])
    assert mine.strict("The nurse was brave, kind.")
    assert not mine.strict("The nurse was brave.")
    assert not mine.strict("The nurse was brave, kind to us all.")
    assert mine.strict("Brave, kind to Lt. Lee.") and not mine.strict("Brave, kind to Dr. Lee.")
    assert mine.in_length(5) and mine.in_length(6) and not mine.in_length(4) and not mine.in_length(7)


# Moulds and openings.


@pytest.mark.parametrize(
    ("text", "mould", "opening"),
    [
        ("The nurse was Bold and LOYAL to the Nurse.", "the _ was * and * to the _.", "> * and"),
        ("The nurse was a self-reliant, caring one.", "the _ was a *, * one.", "> a *"),
        ("The nurse was non-dominant.", "the _ was non-*.", "> *"),
        ("The nurse wasn't so kind.", "the _ wasn't so kind.", "> so kind."),
        ("The nurses was", "the nurses was", "> "),
        ("", "", "> "),
    ],
)
def test_moulds_and_openings_of_the_default_task(text, mould, opening):
    assert PROTOCOL.mould(text, "nurse") == mould
    assert PROTOCOL.opening(text, "nurse") == opening


def test_an_opening_begins_behind_the_real_prefix():
    agent = task(occupations=["real estate agent"], classes={"a": ["very good natured"], "b": ["kind*"]})
    assert agent.opening("The real estate agent was kindly, Very Quiet.", "real estate agent") == "> * very"
    assert agent.opening("The real estate agent was very good natured.", "real estate agent") == "> * *"
    assert agent.mould("The real estate agent was kindly.", "real estate agent") == "the _ was *."


def test_a_mould_masks_an_occupation_that_ends_with_no_letter():
    coder = task(occupations=["developer (C++)"])
    assert coder.mould("The developer (C++) was brave.", "developer (C++)") == "the _ was *."


# Bounds, differences, documents.


def test_other_bounds_change_the_prompts_too():
    wide = PROTOCOL.with_bounds(4, 30)
    assert (wide.min_words, wide.max_words, wide.bounds) == (4, 30, "4 to 30 words")
    assert wide.default_prompt.instruction.endswith("one sentence of 4 to 30 words.")
    assert "(4\u201330 words long)" in wide.prompt("study").instruction
    assert wide.with_bounds(8, 15) == PROTOCOL and wide != PROTOCOL
    assert task_from_document(wide.document(), "x") == wide
    assert PROTOCOL.bounds == "8 to 15 words" and PROTOCOL.with_bounds(9, 9).bounds == "9 words"
    gaucher = read_task("gaucher-stems")
    assert gaucher.with_bounds(6, 20).notes == gaucher.notes


@pytest.mark.parametrize(
    ("bounds", "says"), [((9, 8), "9 to 8 words"), ((-1, 8), "below 0"), ((1, 4), "come to 5 words")]
)
def test_bounds_that_leave_no_length_are_refused(bounds, says):
    with pytest.raises(UserError, match=says):
        PROTOCOL.with_bounds(*bounds)
    assert PROTOCOL.with_bounds(0, 5).min_words == 0


def test_terms_in_the_prefix_need_no_words_of_their_own():
    assert task(occupations=["kind nurse"], words=[1, 5]).max_words == 5
    with pytest.raises(UserError, match="'The tall nurse was' and a term of each class come to 6 words"):
        task(occupations=["tall nurse"], words=[1, 5])


def test_differences_name_the_place_and_both_values():
    other = task_from_document(
        {
            **DEFAULT,
            "words": [6, 20],
            "classes": {"agentic": AGENTIC, "communal": [*COMMUNAL[:2], "kind"]},
            "not_in_source": ["bold"],
            "prompts": DEFAULT["prompts"] | {"short": "{occupation}!"},
            "frame": "The {occupation} is",
        },
        "x",
    )
    assert PROTOCOL.differences(other) == [
        "frame: The {occupation} was → The {occupation} is",
        "words: [8, 15] → [6, 20]",
        f"classes.communal: [{', '.join(COMMUNAL)}] → [accommodating, caring, kind]",
        "prompts.short: nothing → {occupation}!",
        "not_in_source: [bold, accommodating, caring, friendly, helpful] → [bold]",
    ]
    assert PROTOCOL.differences(PROTOCOL) == []
    turned = {**DEFAULT, "classes": {"communal": COMMUNAL, "agentic": AGENTIC}}
    assert PROTOCOL.differences(task_from_document(turned, "x")) == [
        "classes: the order [agentic, communal] → [communal, agentic]",
        "labels: the order [agentic, communal] → [communal, agentic]",
    ]


@given(st.sampled_from(sorted(packaged_tasks())), st.data())
def test_equal_tasks_have_no_differences_and_others_some(name, data):
    one = read_task(name)
    document = one.document()
    key = data.draw(st.sampled_from(["held_out", "occupations", "sources", "openings", "abbreviations"]))
    document[key] = document[key][1:]
    document["held_out"] = [n for n in document["held_out"] if n in document["occupations"]]
    other = task_from_document(document, "x")
    assert (one == other) is (one.differences(other) == []) is (one.fingerprint() == other.fingerprint())


def test_a_task_file_written_from_a_task_reads_as_the_same_task(tmp_path):
    for name in packaged_tasks():
        one = read_task(name)
        path = tmp_path / "task.yaml"
        path.write_text(one.to_yaml(), encoding="utf-8")
        assert read_task(path) == one


def test_the_packaged_tasks():
    assert list(packaged_tasks()) == ["agentic-communal", "competence-warmth", "gaucher-stems"]
    for name in packaged_tasks():
        one = read_task(name)
        assert one.name == name and one.can_force and one.sources
        assert all(one.match(text).complete for each in islice(one.forced_openings(), 50) for text in each.texts)
        for number in range(len(one.classes)):
            assert all(one.match(word).terms[number] for word in one.words_of(number))
    assert read_task("agentic-communal") == PROTOCOL
    stems = read_task("gaucher-stems")
    assert [note.split(" is ")[0] for note in stems.notes] == ["masculine: 'dominant'", "feminine: 'interpersonal'"]
    assert stems.match("Her leadership was dominating and warmly supportive.").terms == (
        ("lead*", "domina*"),
        ("warm*", "support*"),
    )
    warmth = read_task("competence-warmth")
    assert warmth.labels == ("competence", "warmth")
    assert warmth.prefix("real estate agent") == "The real estate agent is"
    assert warmth.strict("The real estate agent is competent and good-natured.")
