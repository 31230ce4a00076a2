"""A tiny random model in the Hugging Face format, as training leaves one."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.protocol.lexicon import AGENTIC, COMMUNAL, OCCUPATIONS

WORDS = ("<unk>", "</s>", "The", "was", "and", "a", "in", ".", '"', "=1+1", "naïve", "🙂", *OCCUPATIONS)


def save_tiny_model(folder: Path, seed: int = 0, prompt: str | None = "raw") -> Path:
    """A one-layer Llama over whole words. `prompt`, if any, is recorded as the one it was trained with."""
    vocabulary = {word: i for i, word in enumerate(WORDS + AGENTIC + COMMUNAL)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
        bos_token_id=None,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if prompt is not None:
        (folder / "run.json").write_text(json.dumps({"config": {"prompt": prompt, "system": ""}}))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
