"""From a named prompt and an occupation to token ids, with the model's own chat template."""

from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from equipoise.errors import UserError
from equipoise.policy.rollout import Rollout
from equipoise.protocol.prompts import Prompt, clean
from equipoise.protocol.task import Task

Tokenizer = Any  # transformers' tokenizers share no typed base that carries every method used here


def prompt_text(tokenizer: Tokenizer, prompt: Prompt, occupation: str, task: Task, system: str = "") -> str:
    """The text before the continuation: system and user turns, then the assistant turn begun with the task's prefix,
    such as `The X was`.

    The system message is empty rather than absent: where it is absent many templates put their own, and SmolLM2's
    contains one of the terms the reward pays for. A template without a system role gets none.
    """
    user = task.user_message(prompt, occupation)
    if user is None:
        return task.prefix(occupation)
    if not tokenizer.chat_template:
        raise UserError(
            f"the model's tokenizer has no chat template, which prompt {prompt.name!r} needs: use --prompt raw, "
            "or an instruction-tuned model"
        )
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        text = tokenizer.apply_chat_template(turns[1:], tokenize=False, add_generation_prompt=True)
    return str(text) + task.prefix(occupation)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt, occupation: str, task: Task, system: str = "") -> list[int]:
    """Token ids of `prompt_text`. A chat template writes its own special tokens; `raw` text gets the tokenizer's."""
    text = prompt_text(tokenizer, prompt, occupation, task, system)
    return list(tokenizer(text, add_special_tokens=prompt.instruction is None)["input_ids"])


def leaked_terms(tokenizer: Tokenizer, prompt: Prompt, task: Task, system: str = "") -> tuple[str, ...]:
    """The terms that the model reads before it writes: in the template's own text, the system message, the instruction,
    the occupations and the frame. Class by class, each once.

    What a prompt names on purpose (its placeholders for a class's terms) is not among them.
    """
    plain = task.leak_free(prompt)
    matches = [task.match(prompt_text(tokenizer, plain, occupation, task, system)) for occupation in task.names]
    found = {term for match in matches for term in match.counts}
    return tuple(term for term in task.lexicon.terms if term in found)


def sentences_of(tokenizer: Tokenizer, rollout: Rollout, occupations: Sequence[str], task: Task) -> list[str]:
    """The task's sentence of each completion: its prefix and what was written after it.

    Prompt and completion are decoded together and the prompt's text is taken off: by itself a completion may lose the
    space before its first word, or gain one inside a word.
    """
    prompts = {tuple(p): "" for p in rollout.prompts}
    decode = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    prompts = dict(zip(prompts, tokenizer.batch_decode([list(p) for p in prompts], **decode), strict=True))
    whole = [list(p) + c for p, c in zip(rollout.prompts, rollout.completions(), strict=True)]
    texts = tokenizer.batch_decode(whole, **decode)
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
        closing = "\"'”’) \n\r\t"
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
        ids.update(i for i, text in enumerate(texts) if text.rstrip(closing).endswith((".", "!", "?")))
    if not ids:
        raise UserError("the tokenizer names no end-of-text token, so no sentence could ever end: set its eos_token")
    return tuple(sorted(ids))
