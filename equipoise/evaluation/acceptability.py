"""How acceptable a sentence is to a reader, as a linear probe on a judge's hidden states guesses it.

The probe's weights were learnt from linguists' judgements of 1,008 example sentences (CoLA: Warstadt, Singh and Bowman
2019, TACL 7) by `benchmarks/acceptability_probe.py`, and belong to one judge's weights: with another's they mean
nothing, so they are refused there. The score is a least-squares guess of 1 (acceptable) or 0, and may lie outside.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from equipoise.policy.packaged import GEMMA, Packaged
from equipoise.policy.source import Source

LAYERS = (6, 9, 12, 15)
"""Whose outputs are read: the middle of Gemma 3 270M's 18 layers, where probes do best."""
WEIGHTS = Path(__file__).parent / "probes" / "gemma-3-270m.safetensors"
PROBED: dict[Packaged, Path] = {GEMMA: WEIGHTS}
"""Which judges have a probe."""
LONGEST = 128
"""Tokens of a sentence that are read."""

_SPACED = ((re.compile(r"\s+([,.;:?!%)])"), r"\1"), (re.compile(r"\s+(n't|'(?:s|re|ve|ll|d|m)?)(?=\W|$)"), r"\1"))


class Probe(NamedTuple):
    """score = x·weights + bias, x the features of a sentence."""

    weights_F: NDArray[np.float32]
    bias: float
    threshold: float
    """From here on a sentence counts as acceptable: the score that the share of acceptable ones has above it."""


def written(text: str) -> str:
    """The sentence as it is usually written: no space before marks, a capital at the beginning, a mark at the end.

    Corpora have sentences in small letters and in pieces; what is already written so stays as it is, apart from a mark
    that is missing at the end.
    """
    text = text.strip()
    for pattern, mended in _SPACED:
        text = pattern.sub(mended, text)
    text = re.sub(r"\bi\b(?=[ ',.?!]|$)", "I", text)
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else f"{text}."


def read_probe(source: Source) -> Probe | None:
    """The probe that was learnt for this very model; None for any other."""
    path = PROBED.get(source.packaged) if source.packaged is not None else None
    if path is None or source.packaged is None:
        return None
    with safe_open(path, framework="np") as file:
        said = file.metadata()
        assert said["judge"] == source.packaged.fingerprint, "the probe belongs to another conversion of the model"
        return Probe(file.get_tensor("weights"), float(said["bias"]), float(said["threshold"]))


@torch.inference_mode()
def features(texts: Sequence[str], tokenizer: Any, model: Any, done: Callable[[int], None] = lambda n: None) -> Any:
    """(N, F) float32: of each sentence the mean over its tokens, and the last token's, of each of `LAYERS`' outputs.

    A sentence is written in the usual way first, and begins with the tokenizer's own token of the beginning, which
    counts in no mean. Padding stands behind the sentence, where nothing that counts can see it.
    """
    rows = [list(ids)[:LONGEST] for ids in tokenizer([written(text) for text in texts])["input_ids"]]
    out = np.zeros((len(rows), 2 * len(LAYERS) * model.config.hidden_size), dtype=np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for first in range(0, len(order), 32):
        batch = order[first : first + 32]
        lengths = [len(rows[i]) for i in batch]
        ids = torch.tensor([rows[i] + [0] * (max(lengths) - len(rows[i])) for i in batch], device=model.device)
        mask = (
            torch.arange(max(lengths), device=model.device)[None] < torch.tensor(lengths, device=model.device)[:, None]
        )
        states = model.model(
            input_ids=ids, attention_mask=mask.long(), use_cache=False, output_hidden_states=True
        ).hidden_states
        for r, (i, length) in enumerate(zip(batch, lengths, strict=True)):
            own = [states[layer][r, min(1, length - 1) : length].float() for layer in LAYERS]
            parts = [part for state in own for part in (state.mean(0), state[-1])]
            out[i] = torch.cat(parts).cpu().numpy()
        done(len(batch))
    return out


def score(features_NF: Any, probe: Probe) -> Any:
    """(N,) float64: about 1 for acceptable sentences, about 0 for others."""
    return features_NF.astype(np.float64) @ probe.weights_F.astype(np.float64) + probe.bias
