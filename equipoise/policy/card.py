"""The model card: what an exported model is, where it comes from, what it is for, and how to sample from it."""

import json
from dataclasses import dataclass
from pathlib import Path

from equipoise.policy import bundled
from equipoise.policy.source import Source
from equipoise.protocol.lexicon import AGENTIC, COMMUNAL, OCCUPATIONS
from equipoise.protocol.prompts import get_prompt, prefix

# The licences under which a derived model may be passed on, by the beginning of the base model's id.
_LICENCES = {
    "HuggingFaceTB/SmolLM2": "apache-2.0",
    "meta-llama/Llama-3.1": "llama3.1",
    "meta-llama/Meta-Llama-3.1": "llama3.1",
    "meta-llama/Llama-3.2": "llama3.2",
    "meta-llama/Llama-3.3": "llama3.3",
    "meta-llama/Meta-Llama-3-": "llama3",
}
# Among the protocol's terms, those that the paper they are taken after does not list.
NOT_IN_GAUCHER = ("bold", "accommodating", "caring", "friendly", "helpful")


@dataclass(frozen=True)
class ModelCard:
    """The facts about one training that its card states."""

    method: str
    """How it was trained, such as: PPO, 2000 steps of 64 sentences, LoRA of rank 16."""
    prompt: str
    """The prompt it was trained with: a name, or NAME=INSTRUCTION."""
    occupations: tuple[str, ...] = OCCUPATIONS
    """The occupations it was trained on."""
    agentic: tuple[str, ...] = AGENTIC
    communal: tuple[str, ...] = COMMUNAL


def render(card: ModelCard, source: Source | None) -> str:
    """The text of README.md: YAML front matter as the Hub reads it, then Markdown."""
    base, licence = _base(source)
    front = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": licence or "other",
        "license_name": None if licence else "that-of-the-base-model",
        "language": "en",
        "tags": ["ppo", "reinforcement-learning", "fairness", "gender-stereotypes", "occupations"],
    }
    # JSON strings and lists are YAML too, and quote whatever a name may hold.
    matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items() if value is not None)
    held_out = [occupation for occupation in OCCUPATIONS if occupation not in card.occupations]
    built = "\nBuilt with Llama.\n" if (licence or "").startswith("llama") else ""
    outside = ", ".join(term for term in NOT_IN_GAUCHER if term in card.agentic + card.communal)
    outside_note = f"\nNot in that paper's stem lists: {outside}." if outside else ""
    return f"""---
{matter}
---

# {base.rpartition("/")[2]}, tuned for balanced occupational descriptions
{built}
This model continues `The <occupation> was` to one English sentence of 8 to 15 words that describes the person with at
least one agentic and at least one communal term. It was trained with `equipoise`.

- Base model: {base}
- Method: {card.method}
- Prompt: `{get_prompt(card.prompt).name}`
- Occupations trained on ({len(card.occupations)}): {", ".join(card.occupations)}
- Held out: {", ".join(held_out) or "none of the protocol's twenty"}

## Terms

Agentic: {", ".join(card.agentic)}.
Communal: {", ".join(card.communal)}.

After D. Gaucher, J. Friesen and A. C. Kay (2011), *Evidence that gendered wording in job advertisements exists and
sustains gender inequality*, Journal of Personality and Social Psychology 101(1).{outside_note}
A term counts as a whole word, whatever its case.

## Intended use and limits

For research on what a lexical constraint does to language about occupations: compliance, diversity, fluency.

- The reward counts words. A sentence that satisfies it need not be true, fair or natural, and "not confident" counts as
  much as "confident".
- Balance between two lists of adjectives is not absence of bias; nothing else about gender, or any other attribute, was
  trained or checked.
- Training narrows what the model writes: expect fewer different terms and sentence patterns than the base model has.
- Whatever limits and terms of use the base model has, this one has too. Do not use it to describe or judge real people.

## How to sample

```python
{_example(card)}
```

`generation_config.json` sets what the training sampled with: temperature 1, top-p 0.95, no top-k, 32 new tokens.
"""


def _example(card: ModelCard) -> str:
    message = get_prompt(card.prompt).user_message("nurse")
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # where this card lies',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
    ]
    if message is None:
        lines += [f"text = {prefix('nurse')!r}", 'inputs = tokenizer(text, return_tensors="pt")']
    else:
        lines += [
            "turns = [",
            '    {"role": "system", "content": ""},',
            f'    {{"role": "user", "content": {json.dumps(message, ensure_ascii=False)}}},',
            "]",
            "text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)",
            f'text += "{prefix("nurse")}"',
            'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)',
        ]
    lines += [
        "for ids in model.generate(**inputs, num_return_sequences=5):",
        '    continuation = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
        f'    print("{prefix("nurse")}" + continuation)',
    ]
    return "\n".join(lines)


def _base(source: Source | None) -> tuple[str, str | None]:
    """The base model's name, without the path of a local folder, and its licence where it is known."""
    if source is None:
        return "unknown", None
    if source.kind == "bundled":
        return bundled.HUB_ID, "apache-2.0"
    if source.kind != "hub":
        return Path(source.path_or_id).resolve().name, None
    licence = next((name for start, name in _LICENCES.items() if source.path_or_id.startswith(start)), None)
    return source.path_or_id, licence
