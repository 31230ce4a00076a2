"""What the model is given to continue, what becomes of its continuation, and where it stops."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from equipoise.errors import UserError
from equipoise.policy.prompt import continuation_ids, leaked_terms, prompt_ids, prompt_text, sentences_of, stop_ids
from equipoise.policy.rollout import Rollout
from equipoise.protocol.prompts import Prompt
from equipoise.protocol.task import PROTOCOL
from tests.default import LEXICON, PROMPTS, get_prompt
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

RAW, DESCRIBE = PROMPTS["raw"], PROMPTS["describe"]
# As SmolLM2's: where the first message is no system message, the template puts one of its own.
OWN_SYSTEM_MESSAGE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}" + CHAT_TEMPLATE
)
NO_SYSTEM_ROLE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHAT_TEMPLATE
)


def tokenizer(template: str | None = CHAT_TEMPLATE, bos: bool = False) -> PreTrainedTokenizerFast:
    out = tiny_tokenizer()
    out.chat_template = template
    if bos:
        out.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return out


def test_the_system_message_is_empty_and_the_answer_is_begun() -> None:
    assert prompt_text(tokenizer(), DESCRIBE, "nurse", PROTOCOL) == (
        "<|im_start|>system\n<|im_end|>\n"
        "<|im_start|>user\nDescribe the character of the nurse in one sentence of 8 to 15 words.<|im_end|>\n"
        "<|im_start|>assistant\nThe nurse was"
    )


@pytest.mark.parametrize("name", ["study", "describe"])
def test_a_templates_own_system_message_leaks_no_term_that_the_reward_pays_for(name: str) -> None:
    match = LEXICON.match(prompt_text(tokenizer(OWN_SYSTEM_MESSAGE), PROMPTS[name], "nurse", PROTOCOL))
    assert not match.some


def test_a_system_message_of_ones_own_is_used() -> None:
    assert "<|im_start|>system\nBe brief.<|im_end|>" in prompt_text(
        tokenizer(), DESCRIBE, "nurse", PROTOCOL, "Be brief."
    )


def test_terms_leak_from_system_message_template_and_an_instruction_of_ones_own() -> None:
    assert leaked_terms(tokenizer(), DESCRIBE, PROTOCOL) == leaked_terms(tokenizer(None), RAW, PROTOCOL) == ()
    assert leaked_terms(tokenizer(), DESCRIBE, PROTOCOL, "You are a helpful, HELPFUL and bold assistant.") == (
        "bold",
        "helpful",
    )
    assert leaked_terms(tokenizer(), DESCRIBE, PROTOCOL, "You are unhelpful.") == ()  # whole words only
    own = CHAT_TEMPLATE.replace("{% for", "{{ 'You are a helpful assistant' }}{% for", 1)
    assert leaked_terms(tokenizer(own), DESCRIBE, PROTOCOL) == ("helpful",)
    assert leaked_terms(tokenizer(), get_prompt("mine=Say how loyal the {occupation} was."), PROTOCOL) == ("loyal",)


def test_what_the_prompt_require_names_is_no_leak_but_its_system_message_may_be_one() -> None:
    require = PROMPTS["require"]
    assert leaked_terms(tokenizer(), require, PROTOCOL) == ()
    assert leaked_terms(tokenizer(), require, PROTOCOL, "You are a helpful assistant.") == ("helpful",)
    assert len(leaked_terms(tokenizer(), Prompt("again", require.instruction), PROTOCOL)) == 20


def test_a_template_without_a_system_role_gets_none() -> None:
    text = prompt_text(tokenizer(NO_SYSTEM_ROLE), DESCRIBE, "nurse", PROTOCOL)
    assert text.startswith("<|im_start|>user\nDescribe") and "system" not in text


def test_a_model_without_a_chat_template_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"no chat template.*'describe'.*--prompt raw"):
        prompt_text(tokenizer(None), DESCRIBE, "nurse", PROTOCOL)


def test_raw_is_the_bare_beginning_even_where_there_is_a_template() -> None:
    assert (
        prompt_text(tokenizer(), RAW, "nurse", PROTOCOL)
        == prompt_text(tokenizer(None), RAW, "nurse", PROTOCOL)
        == "The nurse was"
    )


def test_only_raw_text_gets_the_tokenizers_own_special_tokens() -> None:
    """A template writes its own; a second begin-of-text token would be one the model never saw in training."""
    with_bos = tokenizer(bos=True)
    assert (
        prompt_ids(with_bos, RAW, "nurse", PROTOCOL)[0] == 0
        and prompt_ids(with_bos, RAW, "nurse", PROTOCOL).count(0) == 1
    )
    ids = prompt_ids(with_bos, DESCRIBE, "nurse", PROTOCOL)
    assert 0 not in ids
    assert with_bos.decode(ids) == prompt_text(with_bos, DESCRIBE, "nurse", PROTOCOL)


def test_raw_text_goes_on_so_nothing_that_ends_a_text_follows_it() -> None:
    """A tokenizer that puts an end-of-text token after whatever it is given would have the model begin a new text."""
    both = tokenizer()
    both.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
    )
    plain = tokenizer()("The nurse was", add_special_tokens=False)["input_ids"]
    assert both("The nurse was")["input_ids"] == [0, *plain, 2]
    assert prompt_ids(both, RAW, "nurse", PROTOCOL) == [0, *plain]
    assert 2 not in prompt_ids(both, DESCRIBE, "nurse", PROTOCOL)[-len(plain) :]


def sentence_piece(prepends: bool) -> PreTrainedTokenizerFast:
    """Letters with "▁" for a space; the normaliser of Llama 2's kind puts one before whatever it is given."""
    letters = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127))]
    core = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepends else replace
    strip = [decoders.Strip(" ", 1, 0)] if prepends else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), *strip])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [lambda: sentence_piece(True), lambda: sentence_piece(False), tokenizer])
@pytest.mark.parametrize("text", [" bold and caring", "n't bold.", ", in a word, loyal.", " bold  twice", "."])
def test_a_continuation_is_spelt_with_the_spaces_that_it_has(
    make: Callable[[], PreTrainedTokenizerFast], text: str
) -> None:
    tok = make()
    start = prompt_ids(tok, RAW, "nurse", PROTOCOL)
    ids = continuation_ids(tok, start, text)
    assert tok.decode([*start, *ids], skip_special_tokens=True) == "The nurse was" + text


def test_a_stop_token_that_is_not_marked_special_is_no_part_of_the_sentence() -> None:
    tok = tokenizer()
    tok.add_tokens(["<end_of_turn>", " end.", "</think>"])
    turn, sentence, thought = (tok.convert_tokens_to_ids(t) for t in ("<end_of_turn>", " end.", "</think>"))
    words = tok(" bold", add_special_tokens=False)["input_ids"]

    def said(last: list[int], finished: bool = True) -> str:
        row = [*words, *last]
        rollout = Rollout(
            [prompt_ids(tok, RAW, "nurse", PROTOCOL)],
            torch.tensor([row]),
            torch.tensor([len(row)]),
            torch.tensor([finished]),
        )
        return sentences_of(tok, rollout, ["nurse"], PROTOCOL)[0]

    assert said([turn]) == said([2]) == said([], finished=False) == "The nurse was bold"
    assert said([sentence]) == "The nurse was bold end."  # a stop of `raw` is the sentence's own
    assert said(tok(".", add_special_tokens=False)["input_ids"]) == "The nurse was bold."
    assert said([thought], finished=False) == "The nurse was bold</think>", "written, and no end"


def test_a_users_own_prompt_is_filled_in() -> None:
    text = prompt_text(tokenizer(), get_prompt("mine=Say {a} of one {occupation}."), "nurse", PROTOCOL)
    assert "<|im_start|>user\nSay {a} of one nurse.<|im_end|>" in text


@pytest.mark.parametrize("prompt", [RAW, DESCRIBE], ids=lambda p: p.name)
@pytest.mark.parametrize(
    ("continuation", "sentence"),
    [
        (" bold and caring.", "The nurse was bold and caring."),
        (" bold and caring.<|im_end|>", "The nurse was bold and caring."),
        ("<|im_end|>", "The nurse was"),
        ("n't bold.", "The nurse wasn't bold."),
        (", in a word, loyal.\n", "The nurse was, in a word, loyal."),
        (" naïve – “bold”!", "The nurse was naïve – “bold”!"),
        (" The nurse was bold.", "The nurse was The nurse was bold."),
    ],
)
def test_the_sentence_is_the_begun_answer_and_its_continuation(
    prompt: Prompt, continuation: str, sentence: str
) -> None:
    tok = tokenizer()
    pieces = tok(continuation, add_special_tokens=False)["input_ids"]
    other = tok(" kind.", add_special_tokens=False)["input_ids"]
    width = max(len(pieces), len(other))
    rollout = Rollout(
        [prompt_ids(tok, prompt, "nurse", PROTOCOL), prompt_ids(tok, prompt, "chef", PROTOCOL)],
        torch.tensor([row + [2] * (width - len(row)) for row in (pieces, other)]),
        torch.tensor([len(pieces), len(other)]),
        torch.tensor([True, True]),
    )
    assert sentences_of(tok, rollout, ["nurse", "chef"], PROTOCOL) == [sentence, "The chef was kind."]


def generation(*ids: int | None) -> SimpleNamespace:
    return SimpleNamespace(eos_token_id=list(ids) if len(ids) != 1 else ids[0])


def test_every_end_of_text_token_that_anyone_names_stops() -> None:
    """The generation config, for one or several; the tokenizer; and the turn's end wherever it is a token."""
    tok = tokenizer()  # its end-of-text token and turn's end is <|im_end|>, id 2
    assert stop_ids(tok, generation(0), DESCRIBE) == (0, 2)
    assert stop_ids(tok, generation(7, 0, 9), DESCRIBE) == (0, 2, 7, 9)
    assert stop_ids(tok, generation(None), DESCRIBE) == stop_ids(tok, None, DESCRIBE) == (2,)
    tok.eos_token = "<|endoftext|>"
    assert stop_ids(tok, None, DESCRIBE) == (0, 2)
    tok.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    assert stop_ids(tok, None, DESCRIBE) == (0, 2, len(tok) - 1)


def test_raw_text_stops_at_the_end_of_a_sentence_as_well() -> None:
    tok = tokenizer()
    tok.add_tokens(['."', ".\n", "?!", " end", ".5"])
    ends = {tok.decode([i]) for i in stop_ids(tok, None, RAW)}
    assert ends == {"<|im_end|>", ".", "!", "?", '."', ".\n", "?!"}


def test_a_tokenizer_that_names_no_end_is_refused() -> None:
    silent = SimpleNamespace(eos_token_id=None, get_vocab=dict)
    with pytest.raises(UserError, match="no sentence could ever end"):
        stop_ids(silent, None, DESCRIBE)
