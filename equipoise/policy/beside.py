"""What lies beside a model's weights: its tokenizer, and how it is sampled."""

from collections.abc import Iterable
from copy import copy
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from equipoise.policy.template import with_fixed_date


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer. The date of the prompts that the model was trained with goes with it: the same text
    tomorrow, whoever asks."""
    dated = copy(tokenizer)
    if isinstance(dated.chat_template, dict):  # several, by name
        dated.chat_template = {name: with_fixed_date(each) for name, each in dated.chat_template.items()}
    elif dated.chat_template:
        dated.chat_template = with_fixed_date(dated.chat_template)
    dated.save_pretrained(folder)


def generation_config(
    plain: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int] | None
) -> GenerationConfig:
    """How the protocol samples. top_k is 0 because transformers otherwise cuts to the 50 likeliest tokens."""
    own = plain.generation_config
    if stop_ids is None:
        configured = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        stop_ids = {i for i in (*configured, tokenizer.eos_token_id) if i is not None}
    stops = sorted(stop_ids)
    pads = (tokenizer.pad_token_id, own.pad_token_id, *stops)
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=0.95,
        top_k=0,
        max_new_tokens=32,
        bos_token_id=own.bos_token_id,
        eos_token_id=stops or None,
        pad_token_id=next((i for i in pads if i is not None), None),
    )
