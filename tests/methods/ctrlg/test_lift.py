"""The token automaton says of tokens what the protocol says of the text that they decode to."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from equipoise.errors import UserError
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.ctrlg.constraint import Constraint
from equipoise.methods.ctrlg.feasible import fewest_words
from equipoise.methods.ctrlg.lift import NEVER, TokenAutomaton, fewest_tokens, lift, lift_constraint
from equipoise.methods.ctrlg.spelling import token_bytes
from equipoise.policy import bundled
from equipoise.policy.source import load_tokenizer, resolve
from equipoise.protocol.prompts import clean
from equipoise.protocol.task import PROTOCOL, packaged_tasks, read_task
from tests.methods.ctrlg.oracle import accepts, constraint, never_written
from tests.tiny import tiny_tokenizer

AGENTIC, COMMUNAL = (each.terms for each in PROTOCOL.classes)
SPECIAL = ["<unk>", "<s>", "</s>"]
PIECES = [
    "▁bold", "▁Bold", "▁b", "old", "bold", "ly", "▁self", "-", "rel", "iant", "-reliant", "▁confident", "ident",
    "▁conf", "▁caring", "▁car", "ing", "▁loyal", "▁un", "▁", "▁a", "a", "s", ".", "!", "▁.", "..", '"', "'", "▁and",
    "▁very", ".▁The", "▁The", "▁Dr", "Dr", ",", "▁-", "_", "▁helpful", "▁▁", "3", "▁bold▁and▁loyal.", "é", "▁“", "\n",
    "n't", "\u00ad", "\u00a0", "‑", "\u0301", "▁É",
]  # fmt: skip
BYTES = [f"<0x{byte:02X}>" for byte in (0x0A, 0x20, 0x2E, 0x41, 0x62, 0xC3, 0xA9, 0xAD, 0xC2, 0xE2, 0x80, 0x91, 0x9C)]


def sentence_piece_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(BPE({t: i for i, t in enumerate([*SPECIAL, *PIECES, *BYTES])}, [], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


SENTENCE_PIECE = sentence_piece_tokenizer()
SP_END = SENTENCE_PIECE.eos_token_id


NUMBER = {t: i for i, t in enumerate([*SPECIAL, *PIECES, *BYTES])}
DEMAND = constraint(AGENTIC, COMMUNAL, words=(8, 15))
PREFIXES = {"nurse": "The nurse was", "contractor": "The independent contractor was"}


def verdict(
    tokenizer: PreTrainedTokenizerFast, tokens: list[int], demand: Constraint = DEMAND, prefix: str = "The nurse was"
) -> bool:
    """What the protocol says of the decoded continuation, and what Ctrl-G leaves out."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    special = set(tokens) & {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    if special or never_written(text) or "\ufffd" in text:  # no vocabulary here has that character itself
        return False
    return accepts(demand, prefix + text)


def lifted(
    tokenizer: PreTrainedTokenizerFast, stops: tuple[int, ...], demand: Constraint = DEMAND, limit: int = 99
) -> TokenAutomaton:
    return lift_constraint(tokenizer, stops, demand, PREFIXES, max_new_tokens=limit)


@pytest.fixture(scope="module")
def byte_level() -> TokenAutomaton:
    return lifted(tiny_tokenizer(), (2,))


@pytest.fixture(scope="module")
def sentence_piece() -> TokenAutomaton:
    return lifted(SENTENCE_PIECE, (SP_END,))


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_sentence_piece_tokens_are_judged_as_their_text_is(sentence_piece: TokenAutomaton, data: st.DataObject) -> None:
    usual = ["▁bold", "▁b", "old", "▁self", "-reliant", "▁caring", "▁car", "ing", "▁loyal", "▁and", "▁very", "▁a"]
    usual = [*usual, "▁a", "▁very", "▁Dr", "▁The", "s", "ly", "-"]
    tokens = data.draw(st.lists(st.sampled_from(usual), min_size=6, max_size=14))
    odd = [*PIECES, *BYTES, *SPECIAL, "<0xE2><0x80><0x91>", "<0xC3><0xA9>", "<0xE2><0x80><0x9C>", "<0xC2><0xAD>"]
    for _ in range(data.draw(st.integers(0, 2))):
        tokens.insert(data.draw(st.integers(0, len(tokens))), data.draw(st.sampled_from(odd)))
    tokens.append(data.draw(st.sampled_from([".", "!", "s", "..", "<0x2E>", ".\n"])))
    ids = [NUMBER[t] for token in tokens for t in split(token)]
    for name, prefix in PREFIXES.items():
        assert sentence_piece.run([*ids, SP_END], name) == verdict(SENTENCE_PIECE, ids, prefix=prefix)
        assert not sentence_piece.run(ids, name), "no end, no sentence"


def split(piece: str) -> list[str]:
    """A sequence of pieces that is written as one."""
    if piece == ".\n":
        return [".", "\n"]
    return [piece[i : i + 6] for i in range(0, len(piece), 6)] if piece.startswith("<0x") else [piece]


def test_many_of_those_random_tokens_are_accepted(sentence_piece: TokenAutomaton) -> None:
    # So that the test above cannot pass by refusing everything.
    chance, accepted = random.Random(0), 0
    words = ["▁bold", "▁caring", "▁a", "▁very", "▁and", "ly", "▁loyal"]
    for _ in range(500):
        ids = [NUMBER[chance.choice(words)] for _ in range(chance.randint(5, 11))] + [NUMBER["."]]
        accepted += sentence_piece.run([*ids, SP_END], "nurse")
        assert sentence_piece.run([*ids, SP_END], "nurse") == verdict(SENTENCE_PIECE, ids)
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
        (" bold and caring in a\u3000way.\n", True),
        (" bold and caring in — “é” 字 😀 ß.", True),
        (" bold and caring a b c d e f g 字\u00a0😀.", True),
        (" bold and caring a b c d e f g h 字\u00a0😀.", False),
        (" bold and car\u00ading in a way.", True),
        (" bold and caring in a way a\u0301.", False),
        (" boldly and caring in a way.", False),
        (" the self-reliant and therefore loyal one.", True),
    ],
)
def test_single_bytes_as_tokens(byte_level: TokenAutomaton, text: str, accepted: bool) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert byte_level.run([*ids, 2], "nurse") is accepted
    assert verdict(tokenizer, ids) is accepted


WORDS = [
    "bold", "boldly", "self-reliant", "Self‑Reliant", "selfless", "un", "caring", "uncaring", "loyal", "helpful", "and",
    "confident", "a", "very", "the", "Dr.", "Lee", "He", "'bold'", "“caring”", "(loyal)", "x-bold", "yes.", "Zoë",
    "car\u00ading", "😀", "字", "\u00a0", "É.",
]  # fmt: skip


@pytest.mark.skipif(not bundled.is_ready(), reason="the bundled model is not here")
def test_the_bundled_tokenizer_with_every_way_to_cut_a_word_and_a_character() -> None:
    tokenizer = load_tokenizer(resolve("bundled"))
    automaton = lifted(tokenizer, (0, 2), limit=32)
    spelt = token_bytes(tokenizer)
    by_bytes = {piece: i for i, piece in enumerate(spelt) if piece is not None}
    chance, accepted = random.Random(1), 0
    for n in range(1200):
        text = (
            " " + " ".join(chance.choices(WORDS, k=chance.randint(5, 12))) + chance.choice([".", ".", "!", "", ".\n"])
        )
        ids, rest = [], text.encode()
        while rest:  # any token that fits, not the one the tokenizer would choose
            fits = [rest[:n] for n in range(1, 16) if rest[:n] in by_bytes]
            ids.append(by_bytes[chance.choice(sorted(set(fits)))])
            rest = rest[len(spelt[ids[-1]] or b"") :]
        name, prefix = list(PREFIXES.items())[n % 2]
        assert automaton.run([*ids, 2], name) == verdict(tokenizer, ids, prefix=prefix), text
        accepted += automaton.run([*ids, 2], name)
        assert not automaton.run([*ids, by_bytes[b"\xe2"], 2], name), "half a character"
    assert accepted > 120
    for _ in range(300):  # any tokens at all
        ids = [chance.randrange(len(tokenizer)) for _ in range(chance.randint(1, 20))]
        assert automaton.run([*ids, 2], "nurse") == verdict(tokenizer, ids)


@pytest.mark.skipif(not bundled.is_ready(), reason="the bundled model is not here")
def test_the_look_ahead_of_the_bundled_model_stays_small() -> None:
    automaton = lift(load_tokenizer(resolve("bundled")), (0, 2), CtrlGConfig(), PROTOCOL, max_new_tokens=32)
    assert len(automaton.next_RC) < 4500
    assert automaton.next_BC.nbytes + automaton.words_BC.nbytes < 50e6


def test_a_stop_token_with_text_ends_the_sentence_with_its_text() -> None:
    # As with the prompt `raw`, whose stop tokens are all that end a sentence.
    stops = (SP_END, NUMBER["."], NUMBER["!"], NUMBER[".▁The"], NUMBER["▁bold▁and▁loyal."])
    automaton = lifted(SENTENCE_PIECE, stops)
    words = [NUMBER[t] for t in ("▁bold", "▁and", "▁loyal", "▁a", "▁a")]
    assert automaton.run([*words, NUMBER["."]], "nurse")
    assert automaton.run([*words, NUMBER["s"], NUMBER["!"]], "nurse")
    assert automaton.run([*words, NUMBER[".."], SP_END], "nurse")
    assert not automaton.run([*words, NUMBER["."], SP_END], "nurse"), "nothing follows a stop token"
    assert not automaton.run([*words, SP_END], "nurse")
    assert not automaton.run([*words, NUMBER[".▁The"]], "nurse")
    assert automaton.run([*[NUMBER["▁a"]] * 4, NUMBER["▁bold▁and▁loyal."]], "nurse")
    assert not automaton.run([*[NUMBER["▁a"]], NUMBER["▁bold▁and▁loyal."]], "nurse"), "too short"
    assert automaton.run([*[NUMBER["▁a"]] * 3, NUMBER["▁loyal"], NUMBER["."]], "contractor")


def test_needed_tokens_are_the_shortest_way_out(sentence_piece: TokenAutomaton) -> None:
    # "▁bold▁and▁loyal." twice makes six words of the five that are needed; then the limit may cut.
    assert sentence_piece.fewest_tokens("nurse") == 2
    assert sentence_piece.fewest_tokens("contractor") == 2
    twice = [NUMBER["▁bold▁and▁loyal."]] * 2
    assert sentence_piece.run(twice, "nurse", 2) and not sentence_piece.run(twice, "nurse", 3)
    assert sentence_piece.run([*twice, SP_END], "nurse", 3) and not sentence_piece.run(twice[:1], "nurse", 1)
    tokens = [int((sentence_piece.class_V == c).argmax()) for c in range(sentence_piece.next_BC.shape[1])]
    chance = random.Random(2)
    for _ in range(300):
        state = sentence_piece.starts["nurse"]
        while 0 < sentence_piece.need_F[state] < NEVER:
            following = [sentence_piece.step(state, token) for token in tokens]
            assert sentence_piece.need_F[state] == 1 + min(sentence_piece.need_F[f] for f in following)
            state = chance.choice(following)


def test_bounds_that_no_sentence_meets_are_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"max-words 3 is too few: .*'The independent.*has at least 4; use 4"):
        lifted(SENTENCE_PIECE, (SP_END,), constraint(AGENTIC, COMMUNAL, words=(1, 3)))
    # "The independent contractor was-caring." has four, but these tokens cannot spell it.
    with pytest.raises(
        UserError, match=r"tokens spell no .*'The independent.*constraint in 4 words: raise max-words or"
    ):
        lifted(SENTENCE_PIECE, (SP_END,), constraint(AGENTIC, COMMUNAL, words=(1, 4)))
    lifted(SENTENCE_PIECE, (SP_END,), constraint(AGENTIC, COMMUNAL, words=(1, 5)))
    with pytest.raises(UserError, match=r"max-new-tokens 1 is too few: .*'The .* needs 2 tokens"):
        lifted(SENTENCE_PIECE, (SP_END,), limit=1)
    lifted(SENTENCE_PIECE, (SP_END,), limit=2)
    with pytest.raises(UserError, match="min-words 9 and max-words 8"):
        CtrlGConfig(min_words=9, max_words=8)
    with pytest.raises(
        UserError, match="min-words 16 and max-words 15 leave no length, where the task asks for 8 to 15"
    ):
        lift(SENTENCE_PIECE, (SP_END,), CtrlGConfig(min_words=16), PROTOCOL)
    with pytest.raises(UserError, match="max-words 0 must be at least 1"):
        CtrlGConfig(max_words=0)


def test_the_fewest_words_and_tokens_of_a_task() -> None:
    assert fewest_words(PROTOCOL, "nurse") == 3  # "The nurse was-bold-caring."
    assert fewest_tokens(SENTENCE_PIECE, (SP_END,), PROTOCOL, "nurse") == 2
    assert fewest_tokens(SENTENCE_PIECE, (SP_END,), PROTOCOL.with_bounds(5, 5), "nurse") == 3  # ▁bold ▁loyal .


GERMAN = """
name: arzt
frame: "{occupation} ist"
words: [4, 9]
occupations: {Ärztin: die Ärztin, Makler: der selbständige Makler}
classes:
  stark: [kühn, groß*, selbständig]
  warm: [herzlich*, treu]
  klug: [weise]
openings: ["{1}, {2} und {3}."]
write: {groß*: [großzügig], herzlich*: [herzlich]}
abbreviations: [Dr, z.B]
"""
GERMAN_WORDS = [
    "kühn", "KÜHN", "groß", "GROSSE", "Großmut", "herzliche", "treu", "untreu", "treue", "weise", "Weise.", "z.B.",
    "Dr.", "und,", "–", "“sehr”", "Haus",
]  # fmt: skip


@pytest.mark.parametrize(("terms", "shape"), [("both", "strict"), ("any", "strict"), ("both", "free")])
def test_a_task_of_three_classes_stems_and_other_letters(tmp_path: Path, terms: Any, shape: Any) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(GERMAN, encoding="utf-8")
    task = read_task(path)
    tokenizer = tiny_tokenizer()
    config = CtrlGConfig(terms=terms, shape=shape)
    automaton = lift(tokenizer, (2,), config, task)
    chance, accepted = random.Random(3), 0
    for n in range(1500):
        text = (
            " " + " ".join(chance.choices(GERMAN_WORDS, k=chance.randint(2, 7))) + chance.choice([".", ".", "", "!\n"])
        )
        occupation = task.names[n % 2]
        whole = clean(task.prefix(occupation) + text)
        match = task.match(whole)
        found = match.complete if terms == "both" else match.some
        shaped = shape == "free" or (task.in_length(len(whole.split())) and task.is_complete_sentence(whole))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert automaton.run([*ids, 2], occupation) == (found and shaped), text
        if (terms, shape) == ("both", "strict"):
            assert (found and shaped) == task.strict(whole)
        accepted += found and shaped
    assert accepted > 50


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == PROTOCOL.name else pytest.mark.slow) for name in packaged_tasks()]
)
def test_every_packaged_task_can_be_met_and_its_longest_prefix_needs_the_most_words(name: str) -> None:
    task = read_task(name)
    words = {occupation: fewest_words(task, occupation) for occupation in task.names}
    extra = {words[occupation] - task.prefix_words(occupation) for occupation in task.names}
    assert extra == {0}, "glued to the prefix: was-bold-caring"
    automaton = lift(tiny_tokenizer(), (2,), CtrlGConfig(), task)
    assert all(automaton.fewest_tokens(occupation) < 100 for occupation in task.names)


def test_other_word_bounds_are_kept() -> None:
    demand = constraint(AGENTIC, COMMUNAL, words=(5, 6))
    automaton = lifted(SENTENCE_PIECE, (SP_END,), demand)
    for more in range(6):
        ids = [NUMBER[t] for t in ("▁bold", "▁loyal", *["▁a"] * more, ".")]
        assert automaton.run([*ids, SP_END], "nurse") == verdict(SENTENCE_PIECE, ids, demand) == (more <= 1)
        assert automaton.run([*ids, SP_END], "contractor") == (more == 0)


def test_it_is_made_once_for_all_that_ask_and_anew_where_anything_differs() -> None:
    made = lifted(SENTENCE_PIECE, (SP_END,))
    assert lifted(sentence_piece_tokenizer(), (SP_END,), limit=9) is made
    others = [
        lifted(SENTENCE_PIECE, (SP_END,), constraint(AGENTIC, COMMUNAL, words=(8, 14))),
        lifted(SENTENCE_PIECE, (SP_END, NUMBER["."])),
        lift_constraint(SENTENCE_PIECE, (SP_END,), DEMAND, PREFIXES, vocabulary=200),
    ]
    assert all(other is not made for other in others)
    assert others[0].levels == made.levels - 1 and len(others[2].class_V) == 200


def test_a_tokenizer_without_known_bytes_is_refused() -> None:
    core = Tokenizer(BPE({"a": 0, "</s>": 1}, []))
    core.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    with pytest.raises(UserError, match="byte-level or SentencePiece"):
        token_bytes(tokenizer)
