"""Learn the probe of acceptability, and say how well it does on judged sentences that it has not seen.

    python -m benchmarks.acceptability.fit judged.csv --write

The CSV has the columns Text and acceptable (1 or 0). Low-rank adapters of the encoder's first layers and a logistic
regression on their output learn the sentences of `grammar.txt`; from there one set of adapters for each of ten folds,
side by side, learns the judged sentences of the other nine. Printed: the area under the ROC curve (AUC) of all
sentences, each judged by the adapters that have not seen it. Two minutes on a GPU, hours on two cores.
"""

import argparse
import csv
import hashlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.optimize import minimize
from scipy.stats import rankdata
from torch import nn
from torch.nn import functional as F

from benchmarks.acceptability.pairs import CONSTRUCTIONS, Grammar
from equipoise.evaluation.acceptability import WEIGHTS, load_encoder, written
from equipoise.policy.bundled import folder
from equipoise.policy.packaged import MPNET

LAYERS, RANK, SCALE = 8, 8, 2.0
ADAPTED = re.compile(r"attn\.[qkvo]$|dense$")
FIRST, SECOND = {"rate": 1e-3, "epochs": 2, "batch": 128}, {"rate": 1e-3, "epochs": 3, "batch": 16}
FOLDS = 10


class Adapted(nn.Module):
    """A frozen linear layer for the sentences of K models, one after the other, each with adapters of its own."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, None, None

    def reset(self, count, like):
        out, inner = self.base.weight.shape
        device = self.base.weight.device
        down = torch.randn(count, inner, RANK, device=device) / math.sqrt(inner)
        up = torch.zeros(count, RANK, out, device=device)
        if like is not None:
            down, up = like[0].expand(count, -1, -1).clone(), like[1].expand(count, -1, -1).clone()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self, x):
        own = F.dropout(x, 0.05, self.training).reshape(len(self.down), -1, x.shape[-1])
        return self.base(x) + SCALE * torch.bmm(torch.bmm(own, self.down), self.up).reshape(*x.shape[:-1], -1)


class Models:
    """K models side by side on one encoder."""

    def __init__(self, encoder, device):
        self.tokenizer, model = encoder
        self.model, self.device = model.to(device), device
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.adapters = {}
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Linear) and ADAPTED.search(name):
                self.adapters[name] = Adapted(module)
                self.model.set_submodule(name, self.adapters[name])
        self.mean = self.spread = None

    def encode(self, texts):
        return [encoding.ids for encoding in self.tokenizer.encode_batch([written(text) for text in texts])]

    def reset(self, count, like=None):
        """Fresh adapters and heads, or copies of the single model that `state` gave."""
        width = self.model.config.hidden_size
        for i, adapter in enumerate(self.adapters.values()):
            adapter.reset(count, like and like[2 * i : 2 * i + 2])
        self.weight = nn.Parameter(torch.zeros(count, width, device=self.device))
        self.bias = nn.Parameter(torch.zeros(count, device=self.device))
        if like:
            self.weight.data += like[-2]
            self.bias.data += like[-1]

    def parameters(self):
        return [p for each in self.adapters.values() for p in (each.down, each.up)] + [self.weight, self.bias]

    def state(self):
        return [parameter.detach()[:1].clone() for parameter in self.parameters()]

    def states(self, rows):
        """(N, F): the mean over a sentence's tokens but the first."""
        longest, pad = max(map(len, rows)), self.model.config.pad_token_id
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.arange(longest)[None] < torch.tensor([len(row) for row in rows])[:, None]
        found = self.model(input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device))
        mask[:, 0] = False
        share = (mask / mask.sum(1, keepdim=True)).to(self.device)
        return (found.last_hidden_state.float() * share[..., None]).sum(1)

    def logits(self, rows):
        """(K, N) of K·N sentences, the first N for the first model."""
        z = ((self.states(rows) - self.mean) / self.spread).view(len(self.weight), -1, self.weight.shape[1])
        return torch.einsum("kbh,kh->kb", z, self.weight) + self.bias[:, None]

    @torch.no_grad()
    def standardise(self, rows):
        """Take mean and spread of the states while one fresh model, which changes nothing, is there."""
        self.model.eval()
        z = torch.cat([self.states(rows[a : a + 128]) for a in range(0, len(rows), 128)])
        self.mean, self.spread = z.mean(0), z.std(0) + 1e-3

    @torch.no_grad()
    def scores(self, rows):
        """(K, N) logits of the same N sentences under every model."""
        self.model.eval()
        count, out = len(self.weight), np.zeros((len(self.weight), len(rows)))
        order = np.argsort([len(row) for row in rows])
        for first in range(0, len(order), 48):
            batch = order[first : first + 48]
            out[:, batch] = self.logits([rows[i] for _ in range(count) for i in batch]).cpu().numpy()
        return out

    def learn(self, rows, labels, own, *, rate, epochs, batch, seed=0):
        """Train model k on the sentences `own[k]`: Adam, a warm-up of a tenth of the steps and a linear decay."""
        chance, count = np.random.default_rng(seed), len(own)
        lengths, labels = np.array([len(row) for row in rows]), torch.tensor(labels, dtype=torch.float32)
        parameters = self.parameters()
        first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        steps, step = min(map(len, own)) // batch, 0
        self.model.train()
        for _ in range(epochs):
            for indices in self._batches(own, lengths, steps, batch, chance):
                step += 1
                passed = step / (steps * epochs)
                now = rate * (passed / 0.1 if passed < 0.1 else (1 - passed) / 0.9)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                    out = self.logits([rows[i] for i in indices])
                wanted = labels[indices].to(self.device).view(count, batch)
                loss = F.binary_cross_entropy_with_logits(out.float(), wanted, reduction="none").mean(1).sum()
                self._step(parameters, torch.autograd.grad(loss, parameters), first, second, now, step)

    def _batches(self, own, lengths, steps, batch, chance):
        """Sentences of about one length in every model's batch, so that little is padded."""
        drawn = []
        for indices in own:
            indices = chance.permutation(indices)[: steps * batch]
            nearly = lengths[indices] + chance.normal(0, 1.5, len(indices))
            drawn.append(indices[np.argsort(nearly)].reshape(steps, batch))
        return np.stack(drawn)[:, chance.permutation(steps)].transpose(1, 0, 2).reshape(steps, -1)

    @torch.no_grad()
    def _step(self, parameters, gradients, first, second, rate, step):
        """Adam with β = (0.9, 0.98), decay 0.01, each model's gradient cut to norm 1. The head, whose inputs have a
        spread of one, learns at 10/√width of the rate."""
        count = len(self.weight)
        norms = sum(g.reshape(count, -1).pow(2).sum(1) for g in gradients).sqrt()
        cut = (1 / (norms + 1e-6)).clamp(max=1)
        for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
            g = g * cut.view(count, *[1] * (g.ndim - 1))
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.98).addcmul_(g, g, value=0.02)
            own = rate * (10 / math.sqrt(self.weight.shape[1]) if p is self.weight else 1.0)
            p.mul_(1 - own * 0.01)
            p.sub_(own * (m / (1 - 0.9**step)) / ((v / (1 - 0.98**step)).sqrt() + 1e-8))


def auc(scores, labels):
    ranks, ones = rankdata(scores), labels.sum()
    return (ranks[labels == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones))


def standard_error(area, labels):
    """Hanley and McNeil 1982, Radiology 143(1)."""
    ones, zeros = labels.sum(), (1 - labels).sum()
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    among = (ones - 1) * (first - area**2) + (zeros - 1) * (second - area**2)
    return np.sqrt((area * (1 - area) + among) / (ones * zeros))


def calibrated(scores, labels):
    """(slope, offset) with which σ(slope·score + offset) is the probability (Platt 1999)."""
    signs = 2 * labels - 1
    return minimize(lambda ab: np.logaddexp(0, -signs * (ab[0] * scores + ab[1])).sum(), [1.0, 0.0]).x


def unseen(models, start, rows, y, texts, seed):
    """(N,) the logit of each sentence by the model that has not seen its fold; equal texts share one."""
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    fold = np.random.default_rng(seed).permutation(len(numbers))[[numbers[text] for text in texts]] % FOLDS
    models.reset(FOLDS, start)
    models.learn(rows, y, [np.flatnonzero(fold != k) for k in range(FOLDS)], **SECOND, seed=seed)
    return models.scores(rows)[fold, np.arange(len(y))]


def packed(models, slope, offset):
    """The tensors of the first model, and its bias, for calibrated logits of states as they are."""
    tensors = {}
    for name, adapter in models.adapters.items():
        tensors[f"{name}.A"] = adapter.down.detach()[0].half().cpu().contiguous()
        tensors[f"{name}.B"] = (SCALE * adapter.up.detach()[0]).half().cpu().contiguous()
    weights = models.weight.detach()[0].double() / models.spread.double()
    bias = float(models.bias.detach()[0]) - float(weights @ models.mean.double())
    return {**tensors, "weights": (slope * weights).cpu()}, float(slope * bias + offset)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--made", type=int, default=48_000, help="sentences of the grammar")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the folds")
    parser.add_argument("--encoder", type=Path, help="its folder; by default out of its packages")
    parser.add_argument("--write", type=Path, nargs="?", const=WEIGHTS, help="the probe's file; the packaged one")
    options = parser.parse_args(argv)
    data = options.csv.read_bytes()
    judged = list(csv.DictReader(data.decode("utf-8").splitlines()))
    texts, y = [row["Text"] for row in judged], np.array([float(row["acceptable"]) for row in judged])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    models = Models(load_encoder(options.encoder or folder(MPNET), LAYERS), device)
    made, rows = Grammar().sentences(options.made, seed=1), models.encode(texts)
    made_rows = models.encode([text for text, _ in made])
    models.reset(1)
    models.standardise(made_rows[:2000])
    models.learn(made_rows, [float(label) for _, label in made], [np.arange(len(made))], **FIRST)
    start = models.state()
    print(
        f"AUC after {len(made):,} made sentences, no judged one seen: {auc(models.scores(rows)[0], y):.3f}", flush=True
    )
    found = [unseen(models, start, rows, y, texts, seed) for seed in options.seeds]
    areas = [auc(each, y) for each in found]
    area, error = float(np.mean(areas)), float(standard_error(np.mean(areas), y))
    print(f"AUC of unseen folds {', '.join(f'{each:.3f}' for each in areas)}: {area:.3f}, standard error {error:.3f}")
    if options.write:
        slope, offset = calibrated(found[0], y)
        chances = 1 / (1 + np.exp(-(slope * found[0] + offset)))
        models.reset(1, start)
        models.learn(rows, y, [np.arange(len(y))], **SECOND)
        tensors, bias = packed(models, slope, offset)
        said = {
            "encoder": MPNET.fingerprint, "encoder_licence": MPNET.licence, "layers": json.dumps([LAYERS]),
            "bias": repr(bias),
            "threshold": repr(float(np.quantile(chances, 1 - y.mean()))), "unseen_auc": f"{area:.4f}",
            "standard_error": f"{error:.4f}", "made": str(options.made), "sentences": str(len(y)),
            "grammar_sha256": hashlib.sha256(CONSTRUCTIONS.read_bytes()).hexdigest(),
            "data_sha256": hashlib.sha256(data).hexdigest(),
            "data": "CoLA, Warstadt, Singh and Bowman 2019, TACL 7", "made_by": "benchmarks/acceptability/fit.py",
        }  # fmt: skip
        options.write.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, options.write, said)
        print(f"{options.write}: threshold {said['threshold']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
