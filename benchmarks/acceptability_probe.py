"""Learn the probe of acceptability from judged sentences, and say how well it does on sentences that it has not seen.

    python benchmarks/acceptability_probe.py judged.csv --write

The CSV has the columns Text and acceptable (1 or 0). Printed: the area under the ROC curve of nested cross-validation,
ten folds, the strength of the L2 penalty chosen within each; it estimates what unseen sentences of the kind would give.
"""

import argparse
import csv
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from scipy.stats import rankdata

from equipoise.evaluation.acceptability import LAYERS, PROBED, features
from equipoise.policy.source import load_tokenizer, resolve
from equipoise.policy.weights import load_model

PENALTIES = (3e3, 1e4, 3e4, 1e5)


def auc(scores, labels):
    ranks, ones = rankdata(scores), labels.sum()
    return (ranks[labels == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones))


def fit(x, y, penalty):
    """Ridge regression on standardised features, as (weights, bias) for the features as they are."""
    mean, spread = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / spread
    weights = z.T @ np.linalg.solve(z @ z.T + penalty * np.eye(len(z)), y - y.mean()) / spread
    return weights, y.mean() - mean @ weights


def best(x, y, fold):
    """The penalty with the highest mean AUC over five folds."""

    def value(penalty):
        found = []
        for k in range(5):
            weights, bias = fit(x[fold % 5 != k], y[fold % 5 != k], penalty)
            found.append(auc(x[fold % 5 == k] @ weights + bias, y[fold % 5 == k]))
        return np.mean(found)

    return max(PENALTIES, key=value)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--judge", default="gemma-3-270m")
    parser.add_argument("--write", action="store_true", help="replace the packaged weights")
    options = parser.parse_args(argv)
    data = options.csv.read_bytes()
    rows = list(csv.DictReader(data.decode("utf-8").splitlines()))
    y = np.array([float(row["acceptable"]) for row in rows])
    source = resolve(options.judge)
    model = load_model(source, dtype=torch.float32, device="cpu").eval()
    x = features([row["Text"] for row in rows], load_tokenizer(source), model).astype(np.float64)
    numbers: dict[str, int] = {}
    of_text = np.array([numbers.setdefault(row["Text"], len(numbers)) for row in rows])  # equal texts share a fold
    fold = np.random.default_rng(0).permutation(len(numbers))[of_text]
    scores = np.zeros(len(y))
    for k in range(10):
        out = fold % 10 == k
        weights, bias = fit(x[~out], y[~out], best(x[~out], y[~out], fold[~out] // 10))
        scores[out] = x[out] @ weights + bias
    measured = auc(scores, y)
    print(f"nested AUC {measured:.3f} of {len(y):,} sentences, {y.mean():.1%} acceptable")
    if options.write:
        penalty = best(x, y, fold)
        weights, bias = fit(x, y, penalty)
        said = {
            "judge": source.packaged.fingerprint, "bias": repr(float(bias)), "penalty": repr(penalty),
            "threshold": repr(float(np.quantile(scores, 1 - y.mean()))), "layers": str(LAYERS),
            "nested_auc": f"{measured:.4f}", "sentences": str(len(y)), "data_sha256": hashlib.sha256(data).hexdigest(),
            "data": "CoLA, Warstadt, Singh and Bowman 2019, TACL 7", "made_by": "benchmarks/acceptability_probe.py",
        }  # fmt: skip
        path = PROBED[source.packaged]
        path.parent.mkdir(exist_ok=True)
        save_file({"weights": weights.astype(np.float32)}, path, said)
        print(f"{path}: penalty {penalty:g}, threshold {said['threshold']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
