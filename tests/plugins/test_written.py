"""What another trainer hands over, and the sentence that is scored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.plugins.dataset import rows
from equipoise.plugins.openrlhf import reward_func
from equipoise.plugins.trl import reward
from equipoise.plugins.verl import compute_score
from equipoise.plugins.written import label, read_label, sentence
from equipoise.protocol.task import PROTOCOL, read_task

GOOD = "The nurse was confident and caring in the busy emergency room."
REST = " confident and caring in the busy emergency room."
LABEL = label("", "nurse")


@pytest.mark.parametrize("end", ["", "<|im_end|>", "</s>", "<end_of_turn>\n", "<|eot_id|><|eot_id|>", "[PAD][PAD]"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Describe the nurse.\nThe nurse was", REST),
        ("The nurse was", REST),
        ("The nurse was ", REST.strip()),  # a decoder may drop the first space
        ("Describe the nurse.\nThe nurse was", GOOD),  # handed back with the begun turn in front
        ("Describe the nurse.", GOOD),
        ("Describe the nurse.", f'"{GOOD}"'),
        ([{"role": "user", "content": "Describe the nurse."}], [{"role": "assistant", "content": GOOD}]),
        ([{"role": "user", "content": "Begin with: The nurse was"}], [{"role": "assistant", "content": GOOD}]),
        (
            [{"role": "user", "content": "Describe."}, {"role": "assistant", "content": "The nurse was"}],
            [{"role": "assistant", "content": [{"type": "text", "text": REST}]}],
        ),
    ],
)
def test_one_sentence_however_it_is_handed_over(prompt, completion, end):
    if isinstance(completion, str):
        completion += end
    assert sentence(PROTOCOL, "nurse", prompt, completion) == GOOD


def test_a_user_turn_that_ends_with_the_frame_begins_nothing():
    """The reply to it is a turn of its own: it is scored as written, without a beginning that the model never saw."""
    prompt = [{"role": "user", "content": "Complete: The nurse was"}]
    assert sentence(PROTOCOL, "nurse", prompt, [{"role": "assistant", "content": "Kind and bold."}]) == "Kind and bold."


@given(st.lists(st.sampled_from(["confident", "caring", "bold", "kind", "and", "in", "the", "room"]), min_size=1))
def test_the_three_trainers_give_the_tasks_reward(words):
    rest = " " + " ".join(words) + "."
    text = PROTOCOL.prefix("nurse") + rest
    expected = PROTOCOL.score(text).reward
    assert reward()(prompts=["The nurse was"], completions=[rest], label=[LABEL], trainer_state=None) == [expected]
    message = [{"role": "assistant", "content": text}]
    assert reward()(prompts=[[{"role": "user", "content": "?"}]], completions=[message], label=[LABEL]) == [expected]
    assert compute_score(data_source="x", solution_str=text, ground_truth=LABEL, extra_info={})["score"] == expected
    told = reward_func([f"<s> The nurse was{rest}</s>"], ["The nurse was"], [LABEL])
    assert told["rewards"] == expected
    assert told["scores"] == min(1, max(0, expected))


def test_weights_and_logged_parts():
    logged = {}
    function = reward(base_one=0.5)
    texts = ["The nurse was confident in the busy emergency room today.", GOOD]
    assert function(prompts=["a", "b"], completions=texts, label=[LABEL] * 2, log_metric=logged.__setitem__) == [0.5, 1]
    assert logged["equipoise/all_classes"] == 0.5
    assert compute_score(solution_str=texts[0], ground_truth=LABEL, base_one=0.5)["score"] == 0.5
    with pytest.raises(UserError, match="no 'base_two'"):
        reward(base_two=1.0)


def test_labels():
    assert read_label("nurse") == (PROTOCOL, "nurse")
    assert read_label({"task": "competence-warmth", "occupation": read_task("competence-warmth").names[0]})[0].name
    for bad, said in (("{", "no JSON"), ("{}", "no occupation"), (3, "no occupation"), ("pirate", "pirate")):
        with pytest.raises(UserError, match=said):
            read_label(bad)
    with pytest.raises(UserError, match="no column 'label'"):
        reward()(prompts=["a"], completions=["b"], other=[1])


def test_several_queries_and_one_that_is_not_of_its_prompt():
    queries = [f"The nurse was{REST}", "The chef was tall."]
    told = reward_func(queries, ["The nurse was", "The chef was"], ["nurse", "chef"])
    assert told["rewards"] == [PROTOCOL.score(GOOD).reward, PROTOCOL.score("The chef was tall.").reward]
    with pytest.raises(UserError, match="does not hold its prompt"):
        reward_func(["The nurse was kind."], ["The chef was"], ["nurse"])


@pytest.mark.parametrize("trainer", ["trl", "verl", "openrlhf"])
def test_rows_hold_what_the_reward_needs(trainer):
    made = rows(trainer, PROTOCOL, PROTOCOL.name, PROTOCOL.default_prompt)
    assert len(made) == len(PROTOCOL.names)
    for row, name in zip(made, PROTOCOL.names, strict=True):
        told = row["reward_model"]["ground_truth"] if trainer == "verl" else row["label"]
        assert read_label(told) == (PROTOCOL, name)
        assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
        assert name in row["prompt"][1]["content"]
    without = rows(trainer, PROTOCOL, "", PROTOCOL.default_prompt, system=None, holdout=True)
    assert len(without) == len(PROTOCOL.names) - len(PROTOCOL.held_out)
    assert [turn["role"] for turn in without[0]["prompt"]] == ["user"]


def test_raw_prompts_are_texts_which_verl_cannot_take():
    raw = PROTOCOL.prompt("raw")
    assert rows("trl", PROTOCOL, "", raw)[0]["prompt"] == PROTOCOL.prefix(PROTOCOL.names[0])
    with pytest.raises(UserError, match="verl"):
        rows("verl", PROTOCOL, "", raw)
