"""From a named prompt and an occupation to token ids, and from a model's tokens to sentences."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from equipoise.errors import UserError
from equipoise.policy.rollout import Rollout
from equipoise.policy.template import DATE, asks_for_date, begun_turn
from equipoise.protocol.prompts import Prompt, clean
from equipoise.protocol.task import Task

Tokenizer = Any  # transformers' tokenizers share no typed base that carries every method used here

_DECODE: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
_CLOSING = "\"'”’) \n\r\t"


class Prompts(NamedTuple):
    """What a model reads before it writes, for every occupation of a task."""

    ids: dict[str, list[int]]
    """Token ids by occupation."""
    record: dict[str, str]
    """For records. `prompts`: SHA-256 of the rendered texts and their ids; `prompt_date`: the date that stands for
    today's, where the chat template asks for it."""


def render_prompts(tokenizer: Tokenizer, prompt: Prompt, task: Task, system: str = "") -> Prompts:
    """The prompts of all of the task's occupations. Raises UserError as `prompt_text`."""
    texts = {name: prompt_text(tokenizer, prompt, name, task, system) for name in task.names}
    ids = {name: _ids(tokenizer, prompt, text) for name, text in texts.items()}
    rendered = json.dumps({name: [texts[name], ids[name]] for name in sorted(texts)})
    record = {"prompts": hashlib.sha256(rendered.encode()).hexdigest()}
    if prompt.instruction is not None and asks_for_date(tokenizer.get_chat_template()):
        record["prompt_date"] = DATE.isoformat()
    return Prompts(ids, record)


def prompt_text(tokenizer: Tokenizer, prompt: Prompt, occupation: str, task: Task, system: str = "") -> str:
    """The text before the continuation: system and user turns, then the assistant turn begun with the task's prefix,
    such as `The X was`.

    Raises UserError for a tokenizer without chat template, one whose template does not write all of it, and a system
    message beside the prompt `raw`.
    """
    user = task.user_message(prompt, occupation)
    if user is None:
        if system:
            raise UserError(
                f"prompt {prompt.name!r} has no place for a system message, so {system[:60]!r} would be dropped: leave "
                "out --system, or use a prompt with an instruction"
            )
        return task.prefix(occupation)
    if not tokenizer.chat_template:
        raise UserError(
            f"the model's tokenizer has no chat template, which prompt {prompt.name!r} needs: use --prompt raw, "
            "or an instruction-tuned model"
        )
    return begun_turn(tokenizer, user, task.prefix(occupation), system).text


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, occupation: str, task: Task, system: str = "") -> list[int]:
    """Token ids of `prompt_text`. A chat template writes its own special tokens; `raw` text gets those that the
    tokenizer puts before a text, and none of those after: the text goes on."""
    return _ids(tokenizer, prompt, prompt_text(tokenizer, prompt, occupation, task, system))


def _ids(tokenizer: Tokenizer, prompt: Prompt, text: str) -> list[int]:
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if prompt.instruction is not None:
        return plain
    whole = list(tokenizer(text)["input_ids"])
    starts = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    start = next(starts, None)
    if start is None:
        raise UserError("the tokenizer spells a text otherwise where it adds special tokens: use another model")
    return whole[: start + len(plain)]


def leaked_terms(tokenizer: Tokenizer, prompt: Prompt, task: Task, system: str = "") -> tuple[str, ...]:
    """The terms that the model reads before it writes: in the template's own text, the system message, the instruction,
    the occupations and the frame. Class by class, each once.

    What a prompt names on purpose (its placeholders for a class's terms) is not among them.
    """
    plain = task.leak_free(prompt)
    matches = [task.match(prompt_text(tokenizer, plain, occupation, task, system)) for occupation in task.names]
    found = {term for match in matches for term in match.counts}
    return tuple(term for term in task.lexicon.terms if term in found)


def ends_sentence(text: str) -> bool:
    """Whether the text of a token is, or ends with, the end of a sentence; closing quotation marks may follow it."""
    return text.rstrip(_CLOSING).endswith((".", "!", "?"))


def continuation_ids(tokenizer: Tokenizer, prompt: Sequence[int], text: str) -> list[int]:
    """Token ids that write exactly `text` after the prompt's; where there are none, those that the tokenizer gives it.

    A tokenizer that puts a space before whatever it is given would write two of them, and one where none is meant: it
    gets the text after the prompt's last word.
    """
    before, word, alone = _last_word(tokenizer, tuple(prompt))
    own, joint = (list(tokenizer(given, add_special_tokens=False)["input_ids"]) for given in (text, word + text))
    spellings = [own, joint[len(alone) :]] if joint[: len(alone)] == alone else [own]
    exact = (ids for ids in spellings if tokenizer.decode([*prompt, *ids], **_DECODE) == before + text)
    return next(exact, spellings[0])


@lru_cache(maxsize=1024)
def _last_word(tokenizer: Tokenizer, prompt: tuple[int, ...]) -> tuple[str, str, list[int]]:
    """A prompt's text, its last word, and the ids of that word by itself."""
    text = tokenizer.decode(list(prompt), **_DECODE)
    word = (text.split() or [""])[-1]
    return text, word, list(tokenizer(word, add_special_tokens=False)["input_ids"])


def sentences_of(tokenizer: Tokenizer, rollout: Rollout, occupations: Sequence[str], task: Task) -> list[str]:
    """The task's sentence of each completion: its prefix and what was written after it.

    Prompt and completion are decoded together and the prompt's text is taken off: by itself a completion may lose the
    space before its first word, or gain one inside a word. The token that ended a completion is no part of the
    sentence, whether or not the tokenizer calls it special, unless it is the sentence's own end.
    """
    prompts = {tuple(p): "" for p in rollout.prompts}
    prompts = dict(zip(prompts, tokenizer.batch_decode([list(p) for p in prompts], **_DECODE), strict=True))
    completions, finished = rollout.completions(), rollout.finished_B.tolist()
    last = {c[-1] for c, done in zip(completions, finished, strict=True) if done and c} - set(tokenizer.all_special_ids)
    stops = {i for i in last if not ends_sentence(tokenizer.decode([i], clean_up_tokenization_spaces=False))}
    written = [c[:-1] if done and c and c[-1] in stops else c for c, done in zip(completions, finished, strict=True)]
    texts = tokenizer.batch_decode([list(p) + c for p, c in zip(rollout.prompts, written, strict=True)], **_DECODE)
    return [
        clean(task.prefix(occupation) + text.removeprefix(prompts[tuple(prompt)]))
        for occupation, prompt, text in zip(occupations, rollout.prompts, texts, strict=True)
    ]


def stop_ids(tokenizer: Tokenizer, generation_config: Any, prompt: Prompt) -> tuple[int, ...]:
    """Every id that ends a completion: all of the model's end-of-text ids, and for `raw` each that ends a sentence.

    A model may have several (Llama 3.1 has three); missing one makes the policy run on after the others.
    """
    configured = generation_config.eos_token_id if generation_config is not None else None
    named = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    named.append(tokenizer.eos_token_id)
    named.extend(tokenizer.get_vocab().get(turn_end) for turn_end in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>"))
    ids = {int(i) for i in named if i is not None}
    if prompt.instruction is None:
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
        ids.update(i for i, text in enumerate(texts) if ends_sentence(text))
    if not ids:
        raise UserError("the tokenizer names no end-of-text token, so no sentence could ever end: set its eos_token")
    return tuple(sorted(ids))
