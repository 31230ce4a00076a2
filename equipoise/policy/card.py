"""The model card: what an exported model is, where it comes from, what it is for, and how to sample from it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.policy.algorithms import ALGORITHMS
from equipoise.policy.source import Source
from equipoise.policy.template import DATE, asks_for_date, begun_turn, turns_of
from equipoise.policy.versions import TESTED, VERSIONS
from equipoise.protocol.prompts import PLACE
from equipoise.protocol.task import PROTOCOL, Task

# The licences under which a derived model may be passed on, by the beginning of the base model's id.
_LICENCES = {
    "HuggingFaceTB/SmolLM2": "apache-2.0",
    "meta-llama/Llama-3.1": "llama3.1",
    "meta-llama/Meta-Llama-3.1": "llama3.1",
    "meta-llama/Llama-3.2": "llama3.2",
    "meta-llama/Llama-3.3": "llama3.3",
    "meta-llama/Meta-Llama-3-": "llama3",
}


@dataclass(frozen=True)
class ModelCard:
    """The facts about one training that its card states."""

    method: str
    """How it was trained, such as: PPO, 2000 steps of 64 sentences, LoRA of rank 16."""
    prompt: str
    """The prompt it was trained with: a name, or NAME=INSTRUCTION."""
    task: Task = PROTOCOL
    occupations: tuple[str, ...] = ()
    """Those it was trained on; all of the task's where none are given."""
    system: str = ""
    """The system message that it was trained with."""
    sampled: str = ""
    """How training sampled, such as: temperature 1, top-p 1, at most 32 new tokens. Empty where it did not."""
    adapter: bool = False
    """Whether the folder holds a LoRA adapter alone, not the whole model."""
    reward: str = ""
    """The function that was maximised in place of the task's reward; empty where there was none."""

    @property
    def trained(self) -> tuple[str, ...]:
        return self.occupations or self.task.names


def render(card: ModelCard, source: Source | None, tokenizer: Any = None) -> str:
    """The text of README.md: YAML front matter as the Hub reads it, then Markdown.

    With a tokenizer, the example's messages are those that its chat template takes. Raises UserError if it takes none.
    """
    base, licence = _base(source)
    task = card.task
    front = {
        "base_model": base,
        "library_name": "peft" if card.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": licence or "other",
        "license_name": None if licence else "that-of-the-base-model",
        "language": "en" if _is_the_studys(task) else None,  # of other tasks no one has said it
        "tags": _tags(card),
    }
    # JSON strings and lists are YAML too, and quote whatever a name may hold.
    matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items() if value is not None)
    held_out = [occupation for occupation in task.names if occupation not in card.trained]
    built = "\nBuilt with Llama.\n" if (licence or "").startswith("llama") else ""
    sampled = f"Training sampled with {card.sampled}.\n" if card.sampled else ""
    template = tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else ""
    dated = ""
    if asks_for_date(template) and task.prompt(card.prompt).instruction is not None:
        dated = f"Where the chat template asks for today's date it writes {DATE.isoformat()}, as in training.\n"
    terms = " and ".join(f"at least one {label} term" for label in task.labels)
    return f"""---
{matter}
---

# {base.rpartition("/")[2]}, tuned for balanced occupational descriptions
{built}
This model was trained with `equipoise` to continue `{task.frame.replace(PLACE, "<occupation>")}` to one sentence of
{task.bounds} that describes the person with {terms}. How often it does so is for an evaluation to say.

- Base model: {base}
{_form(card, source)}- Task: {task.name}, in `task.yaml` beside this file
- Method: {card.method}
{_reward(card)}- Prompt: `{task.prompt(card.prompt).name}`
- Occupations trained on ({len(card.trained)}): {", ".join(card.trained)}
- Held out: {", ".join(held_out) or f"none of the task's {len(task.names)}"}

## Terms

{_terms(task)}

{_intended(task)}
## How to sample

```python
{_example(card, source, tokenizer)}
```

`generation_config.json` sets what the protocol samples with: temperature 1, top-p 0.95, no top-k, 32 new tokens.
{sampled}{dated}{_compared(card)}"""


def _tags(card: ModelCard) -> list[str]:
    """Those that are true of the method and of the task."""
    title = card.method.partition(",")[0]
    learnt = title in [each.title for each in ALGORITHMS.values()]
    how = [title.lower(), "reinforcement-learning"] if learnt else ["sft"]
    of = ["fairness", "gender-stereotypes"] if _is_the_studys(card.task) else []
    return [*how, *of, "occupations"]


def _is_the_studys(task: Task) -> bool:
    """Whether the terms are the default task's. Its name says nothing: it stays in a file that was begun as a copy."""
    return task.classes == PROTOCOL.classes


def is_card(text: str) -> bool:
    """Whether `render` wrote the text, whatever results or words of a person's came into it since."""
    begins = ("This model was trained with `equipoise` to continue ", "It was trained with `equipoise`.\n")
    return text.startswith("---\n") and any(begin in text for begin in begins) and "\n\n- Base model: " in text


def _reward(card: ModelCard) -> str:
    return f"- Reward: the function `{card.reward}`, in place of the task's\n" if card.reward else ""


def _terms(task: Task) -> str:
    """The terms of each class, where they are from, and how they are matched."""
    lines = [
        f"{label[:1].upper()}{label[1:]}: {', '.join(each.terms)}."
        for label, each in zip(task.labels, task.classes, strict=True)
    ]
    if task.sources:
        lines += ["", "After:", "", *(f"- {source}" for source in task.sources), ""]
    if task.not_in_source:
        lines.append(f"Not in that source: {', '.join(task.not_in_source)}.")
    counted = "A term counts as a whole word, whatever its case."
    if any(term.endswith("*") for term in task.lexicon.terms):
        counted += " One that ends in `*` counts in every word that begins so."
    return "\n".join([*lines, counted])


def _intended(task: Task) -> str:
    """What the model is for, and what the terms cannot say."""
    written = [word for number in range(len(task.classes)) for word in task.words_of(number)]
    term = written[0] if written else task.lexicon.terms[0].removesuffix("*") + "…"
    return f"""## Intended use and limits

For research on what a lexical constraint does to language about occupations: compliance, diversity, fluency.

- The reward counts words. A sentence that satisfies it need not be true, fair or natural, and "{term}" counts as much
  where it is denied as where it is said.
- Balance between lists of words is not absence of bias; no attribute of a person was trained or checked but by them.
- Training narrows what the model writes: expect fewer different terms and sentence patterns than the base model has.
- Whatever limits and terms of use the base model has, this one has too. Do not use it to describe or judge real people.
"""


def _compared(card: ModelCard) -> str:
    if card.adapter:
        return ""
    return (
        f"Exports of small models were compared in transformers {' and '.join(VERSIONS)}, and gave the same logits\n"
        f"and tokens in all: {', '.join(TESTED)}. Of other types the versions themselves may make something else.\n"
    )


def _form(card: ModelCard, source: Source | None) -> str:
    """What is in the folder, where that is not the whole model."""
    if not card.adapter:
        return ""
    packaged = source.packaged if source is not None else None
    exact = (
        f"; its weights are those of the package {packaged.requirements[0].partition('==')[0]}, 4-bit ones, with "
        f"others, such as those of\n  {packaged.hub_id} on the Hub, it writes something else"
        if packaged is not None
        else ""
    )
    return f"- In this folder: the LoRA adapter alone, to be loaded with that base model{exact}\n"


def _loading(card: ModelCard, source: Source | None) -> list[str]:
    """The example's lines that load model and tokenizer."""
    if not card.adapter:
        return [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'folder = "."  # where this card lies',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "model = AutoModelForCausalLM.from_pretrained(folder)",
        ]
    packaged = source.packaged if source is not None else None
    name = f"place(resolve({packaged.alias!r}))" if packaged is not None else json.dumps(_base(source)[0])
    where = "" if packaged is not None or (source is not None and source.kind == "hub") else "  # where its folder is"
    return [
        *(["from equipoise.policy.source import place, resolve"] if packaged is not None else []),
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
        "",
        'folder = "."  # where this card lies',
        f"base = {name}{where}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)",
        "model.generation_config = GenerationConfig.from_pretrained(folder)",
    ]


def _example(card: ModelCard, source: Source | None, tokenizer: Any) -> str:
    task, occupation = card.task, card.trained[0]
    message = task.user_message(task.prompt(card.prompt), occupation)
    begun = task.prefix(occupation)
    lines = _loading(card, source)
    if message is None:
        lines += [f"text = {begun!r}", 'inputs = tokenizer(text, return_tensors="pt")']
    else:
        if getattr(tokenizer, "chat_template", None):
            turns = begun_turn(tokenizer, message, begun, card.system).turns
        else:
            turns = turns_of(message, begun, card.system)
        lines += [
            "turns = [",
            *(f"    {json.dumps(turn, ensure_ascii=False)}," for turn in turns),
            "]",
            "text = tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)",
            'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)',
        ]
    lines += [
        "for ids in model.generate(**inputs, num_return_sequences=5):",
        '    continuation = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
        f"    print({json.dumps(begun, ensure_ascii=False)} + continuation)",
    ]
    return "\n".join(lines)


def _base(source: Source | None) -> tuple[str, str | None]:
    """The base model's name, without the path of a local folder, and its licence where it is known."""
    if source is None:
        return "unknown", None
    if (packaged := source.packaged) is not None:
        return packaged.hub_id, packaged.licence
    if source.kind != "hub":
        return Path(source.path_or_id).resolve().name, None
    licence = next((name for start, name in _LICENCES.items() if source.path_or_id.startswith(start)), None)
    return source.path_or_id, licence
