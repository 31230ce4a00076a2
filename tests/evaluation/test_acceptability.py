"""The probe of acceptability: its features by a slow definition, its file, its sentences, and what becomes of texts."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import MPNetConfig, MPNetModel

from benchmarks.acceptability import fit, pairs
from equipoise.evaluation import acceptability, fluency
from equipoise.evaluation.acceptability import (
    WEIGHTS,
    Acceptability,
    Probe,
    features,
    is_probe,
    load_encoder,
    read_probe,
    written,
)
from equipoise.evaluation.config import EvaluateConfig
from equipoise.policy.packaged import MPNET

TEXTS = ["The nurse was kind.", "No.", "The pilot was very bold, and the chef was loyal."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random encoder of three small layers, with a tokenizer of a few words."""
    torch.manual_seed(0)
    words = sorted({word for text in TEXTS for word in text.replace(".", " .").replace(",", " ,").split()})
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **{word: i + 4 for i, word in enumerate(words)}}
    core = Tokenizer(WordLevel(vocabulary, "<unk>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    place = tmp_path / "encoder"
    config = MPNetConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=140, initializer_range=0.5,
    )  # fmt: skip
    MPNetModel(config).save_pretrained(place)
    core.save(str(place / "tokenizer.json"))
    return place


@pytest.mark.parametrize(
    ("given", "usual"),
    [
        ("she 's reading i ca n't imagine what", "She's reading I can't imagine what."),
        ("if sam was going , sally would know", "If sam was going, sally would know."),
        ("who showed what to who ?", "Who showed what to who?"),
        ("The nurse was kind.", "The nurse was kind."),
        ("The nurse was kind", "The nurse was kind."),
        ("", "."),
    ],
)
def test_a_sentence_is_read_as_it_is_usually_written(given: str, usual: str) -> None:
    assert written(given) == usual


def test_features_are_the_means_of_each_sentence_by_itself(folder: Path) -> None:
    tokenizer, model = load_encoder(folder, 2)
    found = features(TEXTS, tokenizer, model, (1, 2))
    assert found.shape == (3, 16)
    whole = MPNetModel.from_pretrained(folder).eval()
    for text, row in zip(TEXTS, found, strict=True):
        ids = torch.tensor([tokenizer.encode(text).ids])  # alone, so without padding
        states = whole(input_ids=ids, output_hidden_states=True).hidden_states
        expected = torch.cat([states[k][0, 1:].mean(0) for k in (1, 2)])
        assert np.allclose(row, expected.detach().numpy(), atol=1e-5)


def test_texts_longer_than_the_encoder_reads_are_cut(folder: Path) -> None:
    tokenizer, model = load_encoder(folder, 1)
    long = features(["kind " * 500], tokenizer, model, (1,))
    assert np.allclose(long, features(["kind " * 900], tokenizer, model, (1,))) and np.isfinite(long).all()


def test_the_probability_is_the_logistic_of_a_linear_score(folder: Path) -> None:
    weights = np.random.default_rng(0).normal(size=8)
    probe = Probe(weights, 0.25, 0.5, (2,))
    x = features(TEXTS, *load_encoder(folder, 2), (2,)).astype(np.float64)
    expected = [1 / (1 + np.exp(-(sum(a * b for a, b in zip(row, weights, strict=True)) + 0.25))) for row in x]
    assert Acceptability(torch.device("cpu"), probe, folder)(TEXTS) == pytest.approx(expected, abs=1e-5)


def test_the_packaged_probe_fits_its_encoder_and_says_what_it_was_learnt_from() -> None:
    probe = read_probe()
    assert probe.weights_F.shape == (768 * len(probe.layers),) and max(probe.layers) <= 12
    with safe_open(WEIGHTS, framework="np") as file:
        said = file.metadata()
    assert said["encoder"] == MPNET.fingerprint and json.loads(said["sentences"]) == 1008
    assert 0.5 < probe.threshold < 1 and len(said["data_sha256"]) == 64
    assert float(said["unseen_auc"]) - 2 * float(said["standard_error"]) > 0.74


def test_a_probe_of_another_encoder_is_none(tmp_path: Path) -> None:
    with safe_open(WEIGHTS, framework="pt") as file:
        said = file.metadata() | {"encoder": "another-1"}
    save_file(load_file(WEIGHTS), tmp_path / "probe.safetensors", said)
    with pytest.raises(AssertionError, match="another encoder"):
        read_probe(tmp_path / "probe.safetensors")


def test_it_is_known_by_its_name_and_a_folder_of_that_name_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_probe("all-mpnet-base-v2") and is_probe(" All-MPNet-base-v2") and not is_probe("bundled")
    (tmp_path / "all-mpnet-base-v2").mkdir()
    assert not is_probe("all-mpnet-base-v2")


def test_texts_count_as_acceptable_from_the_threshold_on_and_empty_ones_never(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["The nurse was kind.", "", "The pilot was bold.", "The nurse was kind.", "No one \ud800 knew."]
    weights = np.random.default_rng(0).normal(size=8)
    probe = Probe(weights, 0.0, 0.0, (2,))
    plain = Acceptability(torch.device("cpu"), probe, folder)([text.replace("\ud800", "?") for text in texts])
    settled = probe._replace(threshold=float(plain[2]) - 1e-6)  # the third text lies on it
    monkeypatch.setattr(acceptability, "read_probe", lambda: settled)
    monkeypatch.setattr(acceptability.bundled, "folder", lambda model: folder)
    config = EvaluateConfig(fluency=False, acceptability="all-mpnet-base-v2", device="cpu")
    judged = fluency.judge(config, texts, lambda line: None, lambda done, total: None)
    assert judged.acceptable is not None and judged.probed is not None
    scores, flags = judged.probed["all-mpnet-base-v2"], judged.acceptable["all-mpnet-base-v2"]
    assert flags[2] == 1 and scores[0] == scores[3] == pytest.approx(plain[0], abs=1e-5)
    assert flags.tolist() == [float(value >= settled.threshold) for value in scores]
    assert scores[1] == 0 and flags[1] == 0


def test_adapters_are_added_to_the_weights(folder: Path) -> None:
    chance = torch.Generator().manual_seed(1)
    down, up = torch.randn(8, 2, generator=chance), torch.randn(2, 8, generator=chance)
    name = "encoder.layer.1.attention.attn.q"
    weights = np.random.default_rng(0).normal(size=8)  # not all alike: a layer's output adds up to nought
    probe = Probe(weights, 0.0, 0.5, (2,), {name: (down, up)})
    changed = MPNetModel.from_pretrained(folder).eval()
    with torch.no_grad():
        changed.get_submodule(name).weight += torch.einsum("ir,ro->oi", down, up)
    tokenizer, _ = load_encoder(folder, 2)
    expected = features(TEXTS, tokenizer, changed, (2,)).astype(float) @ weights
    found = Acceptability(torch.device("cpu"), probe, folder)(TEXTS)
    assert found == pytest.approx(1 / (1 + np.exp(-expected)), abs=1e-5)


def test_what_is_learnt_is_what_the_file_gives(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sentences about nurses are good, those about pilots bad: what the file holds tells them apart."""
    words = ["kind", "bold", "loyal", "very", "and", "chef", "was"]
    chance = random.Random(0)
    rows = [(f"The {who} {' '.join(chance.choices(words, k=4))}.", who) for who in ["nurse", "pilot"] * 60]
    made = [(text, int(who == "nurse")) for text, who in rows]
    (tmp_path / "judged.csv").write_text("Text,acceptable\n" + "".join(f"{text},{label}\n" for text, label in made))
    monkeypatch.setattr(pairs.Grammar, "sentences", lambda self, count, seed: made)
    monkeypatch.setattr(fit, "LAYERS", 2)
    monkeypatch.setattr(fit, "FIRST", {"rate": 1e-2, "epochs": 6, "batch": 8})
    file = tmp_path / "probe.safetensors"
    fit.main([str(tmp_path / "judged.csv"), "--encoder", str(folder), "--seeds", "0", "--write", str(file)])
    printed = capsys.readouterr().out
    probe = read_probe(file)
    assert probe.layers == (2,) and len(probe.adapters) == 12
    chances = Acceptability(torch.device("cpu"), probe, folder)([text for text, _ in made])
    labels = np.array([label for _, label in made])
    assert fit.auc(chances, labels) > 0.95 and abs(chances.mean() - 0.5) < 0.2
    assert "AUC of unseen folds" in printed


def test_the_area_under_the_curve_counts_pairs_in_order() -> None:
    scores, labels = np.array([0.1, 0.4, 0.4, 0.8, 0.3]), np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    ones, zeros = scores[labels == 1], scores[labels == 0]
    expected = np.mean([(a > b) + 0.5 * (a == b) for a in ones for b in zeros])
    assert fit.auc(scores, labels) == pytest.approx(expected)


# The sentences that it is learnt from.


@pytest.mark.parametrize(
    ("form", "word", "expected"),
    [
        ("ed", "carry", "carried"), ("ed", "enjoy", "enjoyed"), ("ed", "plan", "planned"), ("ed", "write", "wrote"),
        ("en", "write", "written"), ("en", "hope", "hoped"), ("ing", "hit", "hitting"), ("ing", "die", "dying"),
        ("ing", "make", "making"), ("s", "wash", "washes"), ("s", "carry", "carries"), ("s", "play", "plays"),
        ("pl", "child", "children"), ("pl", "box", "boxes"), ("pl", "lady", "ladies"), ("pl", "boy", "boys"),
        ("er", "strange", "stranger"), ("er", "old", "older"), ("est", "rich", "richest"), ("v", "run", "run"),
    ],
)  # fmt: skip
def test_words_are_inflected(form: str, word: str, expected: str) -> None:
    assert pairs.FORMS[form](word) == expected


def test_every_line_of_the_grammar_can_be_filled() -> None:
    grammar, chance = pairs.Grammar(), random.Random(0)
    told = {"A": "Ann", "B": "Bob", "C": "Cy", "M": "Max", "F": "Flo"}
    lines = [line for both in grammar.constructions for lines in both for line in lines]
    assert len(lines) > 500 and all(good and bad for good, bad in grammar.constructions)
    for line in lines:
        for _ in range(3):
            text = pairs.finished(grammar._fill(line, dict(told), chance))
            assert not set("[]{}|_") & set(text), (line, text)
    assert all(frame.count("{S}") == 1 for frame in grammar.frames)


def test_sentences_come_in_pairs_and_are_the_same_for_the_same_seed() -> None:
    made = pairs.Grammar().sentences(400, seed=3)
    assert made == pairs.Grammar().sentences(400, seed=3) != pairs.Grammar().sentences(400, seed=4)
    assert [label for _, label in made] == [1, 0] * 200
    assert all(text[0].isupper() and text[-1] in ".?!" for text, _ in made)


def test_a_pair_shares_its_words(tmp_path: Path) -> None:
    (tmp_path / "g.txt").write_text(
        "== words\nNAME_M: Al\nNAME_F: Bea Cleo Dora\nADJ: old\nTHING: egg oak\n== verbs\nMEND: carry\n"
        "== constructions\n= one\n+ a {THING} {ed:MEND} a {THING2}\n- a {THING} [{v:MEND}|{v:MEND}] a {THING2}\n"
        "== frames\n{S}\n"
    )
    good, bad = pairs.Grammar(tmp_path / "g.txt").pair(random.Random(1))
    assert good in ("An egg carried an oak.", "An oak carried an egg.") and bad == good.replace("carried", "carry")
