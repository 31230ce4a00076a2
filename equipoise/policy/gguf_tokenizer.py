"""A tokenizer from a GGUF file's own tables.

transformers can read them too, and its versions read them differently: of SmolLM2's, 5.17 swaps the special tokens (end
of text becomes `<|im_start|>`), and no version so far splits digits as the `smollm` pre-tokenizer does; of Gemma's,
5.17 makes single letters.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4
"""llama.cpp's types of tokens that are never made by merging: special ones, and whole words of text."""
_SPACE = "▁"
"""What SentencePiece writes for a space."""


def read_tokenizer(gguf: Path, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer of the file, for texts of up to `max_length` tokens: of the kinds that SmolLM2 and Gemma have."""
    fields = GGUFReader(gguf).fields

    def value(key: str, default: Any = None) -> Any:
        name = f"tokenizer.{key}"
        return fields[name].contents() if name in fields else default

    tokens, kinds = value("ggml.tokens"), value("ggml.token_type")
    if value("ggml.model") == "gpt2":
        assert value("ggml.pre") == "smollm" and not value("ggml.add_bos_token")
        core = _byte_level(tokens, [_pair(merge) for merge in value("ggml.merges")])
    else:
        assert value("ggml.model") == "llama" and value("ggml.add_bos_token") and not value("ggml.add_space_prefix")
        core = _sentencepiece(tokens, value("ggml.unknown_token_id"), value("ggml.bos_token_id"))
    added = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (_CONTROL, _USER_DEFINED) and " " not in token  # spaces are merged, under SentencePiece's mark
    ]
    core.add_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[value("ggml.bos_token_id")],
        eos_token=tokens[value("ggml.eos_token_id")],
        unk_token=tokens[value("ggml.unknown_token_id")],
        pad_token=tokens[value("ggml.padding_token_id")],
        chat_template=value("chat_template"),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _pair(merge: str) -> tuple[str, str]:
    first, second = merge.split(" ")
    return first, second


def _byte_level(tokens: Sequence[str], merges: list[tuple[str, str]]) -> Tokenizer:
    core = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(tokens: Sequence[str], unknown: int, begin: int) -> Tokenizer:
    """Without a space in front, with the token of the beginning there. What no token spells is spelt in bytes."""
    vocabulary = {token.replace(" ", _SPACE): i for i, token in enumerate(tokens)}
    merges = _merges(vocabulary)
    core = Tokenizer(BPE(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", _SPACE)
    # After the normalizer there is no space left to split at; transformers' own Gemma tokenizer has it too.
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    first = tokens[begin]
    core.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, begin)]
    )
    return core


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Such a vocabulary lists no merges: whatever two of its tokens make a third one is one, and the third's number
    its rank. Of several ways to make a token the one with the longest first part comes first."""
    return [
        (token[:cut], token[cut:])
        for token in sorted(vocabulary, key=vocabulary.__getitem__)
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
