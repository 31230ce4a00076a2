"""The begun answer as chat templates of every kind write it, against what the template itself gives or says."""

import datetime
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import UserError
from equipoise.policy.prompt import prompt_text, render_prompts
from equipoise.policy.template import DATE, begun_turn, with_fixed_date
from equipoise.protocol.task import PROTOCOL
from tests.default import PROMPTS
from tests.policy.test_prompt import NO_SYSTEM_ROLE, OWN_SYSTEM_MESSAGE, tokenizer
from tests.tiny import CHAT_TEMPLATE

DESCRIBE, STUDY, RAW = (PROMPTS[name] for name in ("describe", "study", "raw"))
MESSAGE = "Describe the character of the nurse in one sentence of 8 to 15 words."

# Each writes a finished assistant turn in another way than it begins one for generation.
THOUGHT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|A|>{{ m['content'] }}{{ eos_token }}{% else %}"
    "<|{{ m['role'][0] | upper }}|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|A|><think>\n{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SPACE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]{% else %} {{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)
EMPTY_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}</{{ m['role'] }}>{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (THOUGHT, f"<|S|><|U|>{MESSAGE}<|A|>The nurse was"),
        (
            CHANNELS,
            f"<|start|>system<|message|><|end|><|start|>user<|message|>{MESSAGE}<|end|>"
            "<|start|>assistant<|channel|>final<|message|>The nurse was",
        ),
        (SPACE, f"[INST] {MESSAGE}[/INST] The nurse was"),
        (
            EMPTY_THOUGHT,
            f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{MESSAGE}<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\nThe nurse was",
        ),
        (PARTS, f"<system></system><user>{MESSAGE}</user><assistant>The nurse was"),
        (
            "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'user' %}{{ m['content'][0]['text'] }}"
            "{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
            f"[system][user]{MESSAGE}[assistant]The nurse was",
        ),
        (
            "{% for m in messages %}[{% if m['role'] == 'assistant' %}{{ m['content'] }}{% else %}"
            "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}",
            f"[[{MESSAGE}[The nurse was",
        ),
        (CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim"), None),
    ],
)
def test_the_answer_is_begun_as_the_template_writes_a_finished_one(template: str, text: str | None) -> None:
    plain = (
        f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{MESSAGE}<|im_end|>\n<|im_start|>assistant\nThe nurse was"
    )
    assert prompt_text(tokenizer(template), DESCRIBE, "nurse", PROTOCOL) == (plain if text is None else text)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, OWN_SYSTEM_MESSAGE, NO_SYSTEM_ROLE])
@pytest.mark.parametrize("prompt", [DESCRIBE, STUDY, PROMPTS["require"]], ids=lambda p: p.name)
def test_where_a_template_begins_answers_as_it_writes_them_the_text_is_that_of_generation(
    template: str, prompt: object
) -> None:
    tok = tokenizer(template)
    for occupation in PROTOCOL.names:
        user = PROTOCOL.user_message(prompt, occupation)  # type: ignore[arg-type]
        turns = [{"role": "system", "content": ""}, {"role": "user", "content": user}]
        turns = turns[1:] if template is NO_SYSTEM_ROLE else turns
        want = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + f"The {occupation} was"
        assert prompt_text(tok, prompt, occupation, PROTOCOL) == want  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{% if m['role'] != 'user' %}{{ m['content'] }}{% endif %}{% endfor %}", "instruction"),
        (
            "{{ messages[-2]['content'] }}{{ messages[-1]['content'] | upper }}",
            "leaves out what the answer begins with",
        ),
        ("{{ messages[-2]['content'] }}\nThe answer:", "leaves out what the answer begins with"),
        ("{{ messages[-2]['content'] }}{% if messages[-1]['content'] %}{% endif %}", "leaves out"),
        ("{{ messages[-2]['content'] | tojson }}{{ messages[-1]['content'] }}", None),
        ("{{ raise_exception('only\nfor tools') }}{{ content }}", "it says 'only'"),
        ("{{ 1 + messages[0]['content'] }}", "it says"),
        ("{% for m in messages %}{{ m['content'] ", "it says"),
        ("{{ no_such_thing.content }}", "it says"),
        ("{{ raise_exception('not today') }}", "it says 'not today'"),
        (CHAT_TEMPLATE + "[summary] {{ messages[-1]['content'] }}", "writes the answer's beginning twice"),
    ],
)
def test_a_template_that_does_not_write_it_all_is_refused_in_one_line(template: str, reason: str | None) -> None:
    tok = tokenizer(template)
    if reason is None:  # quoted, the message is still there
        assert prompt_text(tok, DESCRIBE, "nurse", PROTOCOL) == f'"{MESSAGE}"The nurse was'
        return
    with pytest.raises(UserError, match=r"chat template cannot begin the answer.*--prompt raw") as raised:
        prompt_text(tok, DESCRIBE, "nurse", PROTOCOL)
    assert reason in str(raised.value) and "\n" not in str(raised.value)


def test_an_instruction_that_ends_with_the_beginning_of_the_answer_is_not_taken_for_it() -> None:
    """The assistant's turn is lost, and what is before it ends as the answer should."""
    tok = tokenizer("{{ messages[-2]['content'] }}{# messages[-1]['content'] #}")
    with pytest.raises(UserError, match="cannot begin the answer"):
        prompt_text(tok, PROTOCOL.prompt("mine=Complete this: The {occupation} was"), "nurse", PROTOCOL)


def test_a_system_message_that_has_no_place_is_refused_and_an_empty_one_left_out() -> None:
    ignoring = "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['content'] }}]{% endif %}{% endfor %}"
    for template in (NO_SYSTEM_ROLE, SPACE, ignoring):
        assert prompt_text(tokenizer(template), DESCRIBE, "nurse", PROTOCOL).endswith("The nurse was")
        with pytest.raises(UserError, match=r"no place for a system message, so 'Be brief\.' would be dropped"):
            prompt_text(tokenizer(template), DESCRIBE, "nurse", PROTOCOL, "Be brief.")
    assert "Be brief." in prompt_text(tokenizer(PARTS), DESCRIBE, "nurse", PROTOCOL, "Be brief.")
    with pytest.raises(UserError, match=r"prompt 'raw' has no place for a system message"):
        prompt_text(tokenizer(), RAW, "nurse", PROTOCOL, "Be brief.")


def test_lists_are_given_to_no_template_that_would_print_them() -> None:
    tok = tokenizer(CHAT_TEMPLATE)
    assert [turn["content"] for turn in begun_turn(tok, "Say it.", "It is", "").turns] == ["", "Say it.", "It is"]
    only_long = "{% for m in messages %}{% if m['content'] | length == 1 %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match="cannot begin the answer"):
        begun_turn(tokenizer(only_long), "Say it.", "It is", "")


TODAY = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHAT_TEMPLATE


def test_the_date_is_the_same_on_every_day_and_on_record() -> None:
    tok = tokenizer(TODAY)
    prompts = render_prompts(tok, DESCRIBE, PROTOCOL)
    assert prompt_text(tok, DESCRIBE, "nurse", PROTOCOL).startswith("Today is 26 Jul 2024.\n<|im_start|>system")
    assert prompts.record["prompt_date"] == DATE.isoformat() == "2024-07-26"
    fixed = tokenizer("Today is 26 Jul 2024.\n" + CHAT_TEMPLATE)
    assert render_prompts(fixed, DESCRIBE, PROTOCOL).record == {"prompts": prompts.record["prompts"]}
    assert "prompt_date" not in render_prompts(tok, RAW, PROTOCOL).record
    # A template that has been given the date before it was saved says the same.
    tok.chat_template = with_fixed_date(TODAY)
    assert with_fixed_date(tok.chat_template) == tok.chat_template
    assert render_prompts(tok, DESCRIBE, PROTOCOL) == prompts


FLAGGED = ["%-d", "%-m", "%_d", "%^a", "%#Z", "%Ey", "%%", "%", " ", "/", ", ", "of"]


@settings(deadline=None, max_examples=50)  # the machine may be busy
@given(st.lists(st.sampled_from([*(f"%{c}" for c in "aAbBcCdDeFfgGhHIjklmMpPrRSTuUVwWxXyY"), *FLAGGED])))
def test_any_form_of_the_date_is_what_strftime_gives(parts: list[str]) -> None:
    form = "".join(parts)
    tok = tokenizer(f"{{{{ strftime_now(format='{form}') }}}}|" + CHAT_TEMPLATE)
    want = datetime.datetime(DATE.year, DATE.month, DATE.day).strftime(form)
    assert prompt_text(tok, DESCRIBE, "nurse", PROTOCOL).partition("|")[0] == want


@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}\n{% endif %}", "{%- if true %} x{% endif %}"])
def test_what_gives_the_date_adds_nothing_to_the_text(start: str) -> None:
    conditional = "{% if false %}{{ strftime_now('%Y') }}{% endif %}"
    text = prompt_text(tokenizer(start + CHAT_TEMPLATE + conditional), DESCRIBE, "nurse", PROTOCOL)
    assert text == prompt_text(tokenizer(start + CHAT_TEMPLATE), DESCRIBE, "nurse", PROTOCOL)


def test_the_fingerprint_is_of_texts_and_tokens() -> None:
    tok = tokenizer()
    same = render_prompts(tok, DESCRIBE, PROTOCOL)
    assert re.fullmatch("[0-9a-f]{64}", same.record["prompts"]) and list(same.ids) == list(PROTOCOL.names)
    assert render_prompts(tokenizer(), DESCRIBE, PROTOCOL) == same
    others = [
        render_prompts(tokenizer(CHANNELS), DESCRIBE, PROTOCOL),
        render_prompts(tok, STUDY, PROTOCOL),
        render_prompts(tok, DESCRIBE, PROTOCOL, "Be brief."),
        render_prompts(tok, RAW, PROTOCOL),
        render_prompts(tokenizer(bos=True), RAW, PROTOCOL),  # the same text, one token more
    ]
    assert len({same.record["prompts"], *(other.record["prompts"] for other in others)}) == 6
