"""How acceptable a sentence is to a reader, as a probe on an encoder's hidden states guesses it.

The encoder is MPNet-base (Song et al. 2020, NeurIPS), as it was tuned for the similarity of sentences. Low-rank
adapters (Hu et al. 2022, ICLR) of its lower layers and a logistic regression on their output were learnt first from
sentences of constructions that grammars call acceptable or not, then from linguists' judgements of 1,008 examples
(CoLA: Warstadt, Singh and Bowman 2019, TACL 7), by `benchmarks/acceptability/fit.py`. They belong to this encoder's
weights.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import MPNetConfig, MPNetModel

from equipoise.documents import parse_json
from equipoise.policy import bundled
from equipoise.policy.packaged import MPNET

WEIGHTS = Path(__file__).parent / "probes" / f"{MPNET.name}.safetensors"
LONGEST = 128
"""Tokens of a sentence that are read."""

_SPACED = ((re.compile(r"\s+([,.;:?!%)])"), r"\1"), (re.compile(r"\s+(n't|'(?:s|re|ve|ll|d|m)?)(?=\W|$)"), r"\1"))


class Probe(NamedTuple):
    """P(acceptable) = σ(x·weights + bias), x the features of a sentence."""

    weights_F: NDArray[np.float64]
    bias: float
    threshold: float
    """From here on a sentence counts as acceptable: the probability that the share of acceptable ones has above it."""
    layers: tuple[int, ...]
    """Whose outputs are features, from 1 on."""
    adapters: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = MappingProxyType({})
    """By the name of a linear module, (in, rank) and (rank, out): what is added to its weight, transposed."""


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


def is_probe(name: str) -> bool:
    """Whether `name` is the packaged probe's; a folder of that name wins."""
    return name.strip().lower() == MPNET.alias and not Path(name).expanduser().is_dir()


def read_probe(path: Path = WEIGHTS) -> Probe:
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
        assert said["encoder"] == MPNET.fingerprint, "the probe belongs to another encoder"
        names = sorted(name.removesuffix(".A") for name in file.keys() if name.endswith(".A"))  # noqa: SIM118
        adapters = {name: (file.get_tensor(f"{name}.A"), file.get_tensor(f"{name}.B")) for name in names}
        weights = file.get_tensor("weights").double().numpy()
    return Probe(weights, float(said["bias"]), float(said["threshold"]), tuple(parse_json(said["layers"])), adapters)


def load_encoder(folder: Path, layers: int) -> tuple[Tokenizer, MPNetModel]:
    """The tokenizer, and the first `layers` layers in float32 on the CPU."""
    config = MPNetConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    model = MPNetModel(config, add_pooling_layer=False)
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in load_file(folder / "model.safetensors").items() if k in own})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    return tokenizer, model.eval()


class Acceptability:
    """The probe in memory. Called with texts it gives (N,) float64, the probability that each is acceptable."""

    def __init__(self, device: torch.device, probe: Probe | None = None, folder: Path | None = None) -> None:
        """By default the packaged probe, and its encoder out of its packages. Raises UserError as `bundled.folder`."""
        self.probe = read_probe() if probe is None else probe
        self.tokenizer, model = load_encoder(folder or bundled.folder(MPNET), max(self.probe.layers))
        with torch.no_grad():
            for name, (down, up) in self.probe.adapters.items():
                weight: Any = model.get_submodule(name).weight
                weight += (down.float() @ up.float()).T
        self.model: Any = model.to(device)

    def __call__(self, texts: Sequence[str], done: Callable[[int], None] = lambda n: None) -> NDArray[np.float64]:
        x = features(texts, self.tokenizer, self.model, self.probe.layers, done).astype(np.float64)
        return 1 / (1 + np.exp(-(x @ self.probe.weights_F + self.probe.bias)))


@torch.inference_mode()
def features(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    model: Any,
    layers: Sequence[int],
    done: Callable[[int], None] = lambda n: None,
) -> NDArray[np.float32]:
    """(N, F): of each sentence the mean over its tokens of each of the layers' outputs.

    A sentence is written in the usual way first. The token of the beginning counts in no mean, and padding is masked.
    """
    rows = [encoding.ids for encoding in tokenizer.encode_batch([written(text) for text in texts])]
    out = np.zeros((len(rows), len(layers) * model.config.hidden_size), dtype=np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for first in range(0, len(order), 32):
        batch = order[first : first + 32]
        lengths = torch.tensor([len(rows[i]) for i in batch])
        longest = int(lengths.max())
        padded = [rows[i] + [model.config.pad_token_id] * (longest - len(rows[i])) for i in batch]
        mask = torch.arange(longest)[None] < lengths[:, None]
        states = model(
            input_ids=torch.tensor(padded).to(model.device),
            attention_mask=mask.long().to(model.device),
            output_hidden_states=True,
        ).hidden_states
        inner = mask.clone()
        inner[:, 0] = False
        share = (inner / inner.sum(1, keepdim=True)).to(model.device)
        means = [torch.einsum("bt,bth->bh", share, states[layer].float()) for layer in layers]
        out[batch] = torch.cat(means, 1).cpu().numpy()
        done(len(batch))
    return out
