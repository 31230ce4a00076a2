"""The probe of acceptability: its features by a slow definition, its file, and what it is refused for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from equipoise.evaluation import acceptability, fluency
from equipoise.evaluation.acceptability import PROBED, Probe, features, read_probe, score, written
from equipoise.evaluation.config import EvaluateConfig
from equipoise.policy.packaged import GEMMA
from equipoise.policy.source import resolve
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer


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


def test_features_are_means_and_last_states_of_each_sentence_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptability, "LAYERS", (1, 2))
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = ["The nurse was kind.", "No.", "The pilot was very bold, and the chef was loyal."]
    found = features(texts, tokenizer, model)
    assert found.shape == (3, 2 * 2 * 32)
    for text, row in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])  # alone, so without padding
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = [part for k in (1, 2) for part in (states[k][0, 1:].mean(0), states[k][0, -1])]
        assert np.allclose(row, torch.cat(expected).detach().numpy(), atol=1e-5)


def test_the_score_is_linear() -> None:
    probe = Probe(np.array([1.0, -2.0], dtype=np.float32), 0.5, 0.6)
    assert score(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]), probe).tolist() == [1.5, -1.5, 0.5]


def test_the_packaged_probe_belongs_to_the_model_that_it_is_read_for() -> None:
    probe = read_probe(resolve("gemma-3-270m"))
    assert probe is not None and probe.weights_F.shape == (2 * len(acceptability.LAYERS) * 640,)
    with safe_open(PROBED[GEMMA], framework="np") as file:
        said = file.metadata()
    assert said["judge"] == GEMMA.fingerprint and json.loads(said["sentences"]) == 1008
    assert 0.5 < probe.threshold < 1 and len(said["data_sha256"]) == 64
    assert read_probe(resolve("bundled")) is None


def test_texts_count_as_acceptable_from_the_threshold_on_and_empty_ones_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptability, "LAYERS", (1, 2))
    texts = ["The nurse was kind.", "", "The pilot was bold.", "The nurse was kind.", "No one \ud800 knew."]
    found = features([text.replace("\ud800", "?") for text in texts], tiny_tokenizer(), tiny_model())
    weights = np.random.default_rng(0).normal(size=128).astype(np.float32)
    middle = float(score(found[[2]], Probe(weights, 0.0, 0.0))[0])
    probe = Probe(weights, 1.0 - middle, 1.0 - 1e-4)  # so that the third text lies at 1
    monkeypatch.setattr(fluency, "read_probe", lambda source: probe)
    config = EvaluateConfig(fluency=False, acceptability=str(tiny_folder(tmp_path / "tiny")), device="cpu")
    judged = fluency.judge(config, texts, lambda line: None, lambda done, total: None)
    assert judged.acceptable is not None and judged.probed is not None
    scores, flags = judged.probed["tiny"], judged.acceptable["tiny"]
    assert scores[2] == pytest.approx(1, abs=1e-4) and flags[2] == 1
    assert scores[0] == scores[3] == pytest.approx(score(found[[0]], probe)[0], abs=1e-4)
    assert flags.tolist() == [float(value >= probe.threshold) for value in scores]
    assert scores[1] == -np.inf and flags[1] == 0
