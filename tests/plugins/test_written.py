"""What another trainer hands over, and the sentence that is scored."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.plugins.dataset import rows
from equipoise.plugins.openrlhf import reward_func
from equipoise.plugins.trl import reward
from equipoise.plugins.verl import compute_score
from equipoise.plugins.written import label, read_label, sentence
from equipoise.protocol.task import PROTOCOL, read_task, task_from_document

GOOD = "The nurse was confident and caring in the busy emergency room."
REST = " confident and caring in the busy emergency room."
LABEL = label("", "nurse")
ENDS = [
    "",
    "<|im_end|>",
    "</s>",
    "<end_of_turn>\n",
    "<|eot_id|><|eot_id|>",
    "[PAD][PAD]",
    "<turn|>",
    "<EOS>",
    " [/INST]",
]
THOUGHT = "<|channel|>analysis<|message|>Bold?<|end|><|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize("end", ENDS)
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
        ("Describe the nurse.\nThe nurse was", GOOD.replace("The nurse", "the  nurse")),
        ("Describe the nurse.\nThe nurse was", f"The nurse was\n{REST}"),
        ("Describe the nurse.", f"<|im_start|>assistant\n{GOOD}"),
        ("Describe the nurse.", f"<s><|start_header_id|>assistant<|end_header_id|>\n\n{GOOD}"),
        ("Describe the nurse.", f"<start_of_turn>model\n{GOOD}"),
        ("Describe the nurse.", THOUGHT + GOOD),
        ("Describe the nurse.", f"<|im_start|>assistant\n<think>\nBold? The nurse was\n</think>\n\n{GOOD}"),
        (
            [{"role": "user", "content": "Describe."}, {"role": "assistant", "content": "The nurse was"}],
            [{"role": "assistant", "content": [{"type": "text", "text": REST}]}],
        ),
    ],
)
def test_one_sentence_however_it_is_handed_over(prompt, completion, end):
    if isinstance(completion, str):
        completion += end
    written = sentence(PROTOCOL, "nurse", prompt, completion)
    assert " ".join(written.split()).replace("the nurse", "The nurse", 1) == GOOD


def test_a_thought_without_an_answer_is_no_sentence():
    assert sentence(PROTOCOL, "nurse", "Describe.", "<think>Confident and caring, or") == ""


def test_a_begun_word_is_no_repeated_beginning():
    """Where a frame is one word, what goes on with a longer one repeats nothing."""
    document = {**PROTOCOL.document(), "frame": "{occupation}"}
    task = task_from_document(document, "mine")
    assert sentence(task, "nurse", "Nurse", " nurses are caring.") == "Nurse nurses are caring."
    assert sentence(task, "nurse", "Nurse", " nurse: caring.") == "nurse: caring."


def test_four_classes_give_the_reward_of_score_in_all_trainers(tmp_path):
    classes = {"daring": ["bold"], "warm": ["kind"], "steady": ["calm"], "deep": ["wis*"]}
    document = {"name": "four", "occupations": ["nurse"], "classes": classes}
    path = tmp_path / "four.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    for words, reward_of in (
        ("bold, kind, calm and wiser", 1.0),
        ("bold, kind and calm but", 0.3),
        ("there today but", -0.2),
    ):
        text, told = f"The nurse was {words} in the busy room.", label(str(path), "nurse")
        assert reward()(prompts=["?"], completions=[text], label=[told]) == pytest.approx([reward_of])
        assert compute_score(solution_str=text, ground_truth=told)["score"] == pytest.approx(reward_of)
        assert reward_func([f"?{text}"], ["?"], [told])["rewards"] == pytest.approx(reward_of)


@pytest.mark.parametrize(
    "turn", [None, 3, b"x", {"role": "assistant", "content": "x"}, ["x"], [{"role": "assistant"}], [{"content": [3]}]]
)
def test_what_is_no_turn_is_one_line(turn):
    with pytest.raises(UserError, match="a turn is a text or a list of messages"):
        sentence(PROTOCOL, "nurse", "Describe.", turn)


@pytest.mark.parametrize("value", ["0.5", None, True, [1], float("inf")])
def test_weights_that_are_no_numbers_are_one_line(value):
    with pytest.raises(UserError, match="expected a finite number"):
        reward(base_one=value)
    with pytest.raises(UserError, match="expected a finite number"):
        compute_score(solution_str="", ground_truth="nurse", base_one=value)


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
