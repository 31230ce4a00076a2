"""The bytes that each token of a vocabulary adds to a text."""

import json
from collections.abc import Callable

from tokenizers import pre_tokenizers

from equipoise.documents import parse_json
from equipoise.errors import UserError
from equipoise.policy.prompt import Tokenizer


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes that each token id adds to a text, None for special and other added tokens.

    From the vocabulary, never by decoding tokens one by one, which loses spaces and the parts of characters. Raises
    UserError for a tokenizer that is neither byte-level, nor SentencePiece-like, nor one of whole words.
    """
    pieces: dict[str, int] = tokenizer.get_vocab()
    out: list[bytes | None] = [None] * (max(pieces.values()) + 1)
    added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    spell = _speller(tokenizer)
    for piece, index in pieces.items():
        if index not in added:
            out[index] = spell(piece)
    return out


def _speller(tokenizer: Tokenizer) -> Callable[[str], bytes | None]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = parse_json(backend.to_str())["decoder"] if backend is not None else {"type": "unknown"}
    kinds = json.dumps(decoder)
    if decoder is None:  # whole words, which transformers joins with spaces
        return lambda piece: b" " + piece.encode()
    if "ByteLevel" in kinds:
        byte_of = _byte_alphabet()
        return lambda piece: bytes(byte_of[c] for c in piece) if all(c in byte_of for c in piece) else None
    if "\u2581" in json.dumps(decoder, ensure_ascii=False):
        fallback = "ByteFallback" in kinds

        def spell(piece: str) -> bytes:
            if fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("\u2581", " ").encode()

        return spell
    raise UserError(
        "Ctrl-G does not know how this model's tokenizer turns tokens into text: use a model with a byte-level or "
        "SentencePiece tokenizer (Llama, SmolLM, Qwen, Mistral, Gemma, GPT-2 have one)"
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on, in order."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    table = {chr(byte): byte for byte in own} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    return table
