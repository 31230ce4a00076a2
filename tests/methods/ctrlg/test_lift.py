"""The token automaton says of tokens what the protocol says of the text that they decode to."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from equipoise.errors import UserError
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.ctrlg.lift import TokenAutomaton, lift, token_bytes
from equipoise.policy import bundled
from equipoise.policy.source import load_tokenizer, resolve
from equipoise.protocol.lexicon import LEXICON
from equipoise.protocol.prompts import clean, word_count
from equipoise.protocol.reward import strict_success
from tests.tiny import tiny_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
PIECES = [
    "▁bold", "▁Bold", "▁b", "old", "bold", "ly", "▁self", "-", "rel", "iant", "-reliant", "▁confident", "ident",
    "▁conf", "▁caring", "▁car", "ing", "▁loyal", "▁un", "▁", "▁a", "a", "s", ".", "!", "▁.", "..", '"', "'", "▁and",
    "▁very", ".▁The", "▁The", "▁Dr", "Dr", ",", "▁-", "_", "▁helpful", "▁▁", "3", "▁bold▁and▁loyal.", "é", "▁“", "\n",
]  # fmt: skip
BYTES = [f"<0x{byte:02X}>" for byte in (0x0A, 0x20, 0x2E, 0x41, 0x62, 0xC3, 0xA9)]


def sentence_piece_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(BPE({t: i for i, t in enumerate([*SPECIAL, *PIECES, *BYTES])}, [], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


SENTENCE_PIECE = sentence_piece_tokenizer()
SP_END = SENTENCE_PIECE.eos_token_id


def verdict(tokenizer: PreTrainedTokenizerFast, tokens: list[int], low: int = 8, high: int = 15) -> bool:
    """What the protocol says of the decoded continuation, and the four things that Ctrl-G leaves out."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = "The nurse was" + text
    special = set(tokens) & {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ours = text.startswith(" ") and not text.endswith(" ") and not special and all(" " <= c <= "~" for c in text)
    if (low, high) == (8, 15):
        return ours and strict_success(clean(whole))
    return ours and LEXICON.match(whole).both and whole.endswith((".", "!", "?")) and low <= word_count(whole) <= high


def byte_level() -> TokenAutomaton:
    return lift(tiny_tokenizer(), (2,), CtrlGConfig(), LEXICON, max_new_tokens=99)


@pytest.fixture(scope="module")
def sentence_piece() -> TokenAutomaton:
    return lift(SENTENCE_PIECE, (SP_END,), CtrlGConfig(), LEXICON, max_new_tokens=64)


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_sentence_piece_tokens_are_judged_as_their_text_is(sentence_piece: TokenAutomaton, data: st.DataObject) -> None:
    number = {t: i for i, t in enumerate([*SPECIAL, *PIECES, *BYTES])}
    usual = ["▁bold", "▁b", "old", "▁self", "-reliant", "▁caring", "▁car", "ing", "▁loyal", "▁and", "▁very", "▁a"]
    usual = [*usual, "▁a", "▁very", "▁Dr", "▁The", "s", "ly", "-"]
    tokens = data.draw(st.lists(st.sampled_from(usual), min_size=6, max_size=14))
    for _ in range(data.draw(st.integers(0, 2))):
        tokens.insert(data.draw(st.integers(0, len(tokens))), data.draw(st.sampled_from([*PIECES, *BYTES, *SPECIAL])))
    ids = [number[t] for t in [*tokens, data.draw(st.sampled_from([".", "!", "s", "..", "<0x2E>"]))]]
    assert sentence_piece.run([*ids, SP_END]) == verdict(SENTENCE_PIECE, ids)
    assert not sentence_piece.run(ids), "no end, no sentence"


def test_many_of_those_random_tokens_are_accepted(sentence_piece: TokenAutomaton) -> None:
    # So that the test above cannot pass by refusing everything.
    number = {t: i for i, t in enumerate([*SPECIAL, *PIECES, *BYTES])}
    chance, accepted = random.Random(0), 0
    words = ["▁bold", "▁caring", "▁a", "▁very", "▁and", "ly", "▁loyal"]
    for _ in range(500):
        ids = [number[chance.choice(words)] for _ in range(chance.randint(5, 11))] + [number["."]]
        accepted += sentence_piece.run([*ids, SP_END])
        assert sentence_piece.run([*ids, SP_END]) == verdict(SENTENCE_PIECE, ids)
    assert accepted > 100


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        (" bold and caring in a very quiet way.", True),
        (" bold and caring in a way.", True),  # 9 words
        (" bold and caring in.", False),  # 7
        (" bold and caring a b c d e f g h i.", True),  # 15
        (" bold and caring a b c d e f g h i j.", False),
        ("  bold  and caring in a   way .", True),  # spaces are no words
        (" boldly and caring in a way.", False),
        (" the self-reliant and therefore loyal one.", True),
    ],
)
def test_single_bytes_as_tokens(text: str, accepted: bool) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert byte_level().run([*ids, 2]) is accepted
    assert verdict(tokenizer, ids) is accepted


@pytest.mark.skipif(not bundled.is_ready(), reason="the bundled model is not here")
def test_the_bundled_tokenizer_with_every_way_to_cut_a_word() -> None:
    tokenizer = load_tokenizer(resolve("bundled"))
    automaton = lift(tokenizer, (0, 2), CtrlGConfig(), LEXICON, max_new_tokens=32)
    spelt = token_bytes(tokenizer)
    by_bytes = {piece: i for i, piece in enumerate(spelt) if piece is not None}
    chance, accepted = random.Random(1), 0
    words = [
        "bold",
        "boldly",
        "self-reliant",
        "Self-Reliant",
        "selfless",
        "un",
        "caring",
        "uncaring",
        "loyal",
        "helpful",
    ]
    words += [
        "confident",
        "and",
        "a",
        "very",
        "the",
        "Dr.",
        "Lee",
        "He",
        "'bold'",
        '"caring"',
        "(loyal)",
        "x-bold",
        "yes.",
    ]
    for _ in range(800):
        text = " " + " ".join(chance.choices(words, k=chance.randint(5, 12))) + chance.choice([".", ".", "!", ""])
        ids, rest = [], text.encode()
        while rest:  # any token that fits, not the one the tokenizer would choose
            fits = [rest[:n] for n in range(1, 16) if rest[:n] in by_bytes]
            ids.append(by_bytes[chance.choice(sorted(set(fits)))])
            rest = rest[len(spelt[ids[-1]] or b"") :]
        assert automaton.run([*ids, 2]) == verdict(tokenizer, ids), text
        accepted += automaton.run([*ids, 2])
    assert accepted > 80
    for _ in range(300):  # any tokens at all
        ids = [chance.randrange(len(tokenizer)) for _ in range(chance.randint(1, 20))]
        assert automaton.run([*ids, 2]) == verdict(tokenizer, ids)


def test_a_stop_token_with_text_ends_the_sentence_with_its_text() -> None:
    # As with the prompt `raw`, whose stop tokens are all that end a sentence.
    number = {t: i for i, t in enumerate([*SPECIAL, *PIECES, *BYTES])}
    stops = (SP_END, number["."], number["!"], number[".▁The"], number["▁bold▁and▁loyal."])
    automaton = lift(SENTENCE_PIECE, stops, CtrlGConfig(), LEXICON, max_new_tokens=64)
    words = [number[t] for t in ("▁bold", "▁and", "▁loyal", "▁a", "▁a")]
    assert automaton.run([*words, number["."]])
    assert automaton.run([*words, number["s"], number["!"]])
    assert automaton.run([*words, number[".."], SP_END])
    assert not automaton.run([*words, number["."], SP_END]), "nothing follows a stop token"
    assert not automaton.run([*words, SP_END])
    assert not automaton.run([*words, number[".▁The"]])
    assert automaton.run([*[number["▁a"]] * 4, number["▁bold▁and▁loyal."]])
    assert not automaton.run([*[number["▁a"]], number["▁bold▁and▁loyal."]]), "too short"


def test_needed_tokens_are_the_shortest_way_out(sentence_piece: TokenAutomaton) -> None:
    # "▁bold▁and▁loyal." twice makes six words of the five that are needed; then the end.
    assert sentence_piece.need_F[sentence_piece.start] == 3
    table = sentence_piece.next_FC
    for state in range(sentence_piece.done):
        assert sentence_piece.need_F[state] == 1 + min(sentence_piece.need_F[t] for t in set(table[state].tolist()))


def test_bounds_that_no_sentence_meets_are_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"max-words 3 is too few.* at least 4; use 4"):
        lift(SENTENCE_PIECE, (SP_END,), CtrlGConfig(min_words=1, max_words=3), LEXICON, max_new_tokens=64)
    lift(SENTENCE_PIECE, (SP_END,), CtrlGConfig(min_words=1, max_words=5), LEXICON, max_new_tokens=64)
    with pytest.raises(UserError, match=r"max-new-tokens 2 is too few: .* needs 3 tokens"):
        lift(SENTENCE_PIECE, (SP_END,), CtrlGConfig(), LEXICON, max_new_tokens=2)
    with pytest.raises(UserError, match="min-words 9 and max-words 8"):
        CtrlGConfig(min_words=9, max_words=8)


def test_other_word_bounds_are_kept() -> None:
    automaton = lift(SENTENCE_PIECE, (SP_END,), CtrlGConfig(min_words=5, max_words=6), LEXICON, max_new_tokens=64)
    number = {t: i for i, t in enumerate([*SPECIAL, *PIECES, *BYTES])}
    for more in range(6):
        ids = [number[t] for t in ("▁bold", "▁loyal", *["▁a"] * more, ".")]
        assert automaton.run([*ids, SP_END]) == verdict(SENTENCE_PIECE, ids, 5, 6) == (more <= 1)


def test_a_tokenizer_without_known_bytes_is_refused() -> None:
    core = Tokenizer(BPE({"a": 0, "</s>": 1}, []))
    core.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    with pytest.raises(UserError, match="byte-level or SentencePiece"):
        token_bytes(tokenizer)
