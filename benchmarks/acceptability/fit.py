"""Learn the probe of acceptability, and say how well it does on judged sentences that it has not seen.

    python benchmarks/acceptability/fit.py judged.csv --write

The CSV has the columns Text and acceptable (1 or 0). Learnt is a ridge regression on the encoder's states, from
sentences of `grammar.txt` and from the judged ones together; how much the judged ones weigh, and the L2 penalty, are
chosen within each of ten folds (nested cross-validation). Printed: the area under the ROC curve, over seeds of the folds.
"""

import argparse
import csv
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from pairs import Grammar
from safetensors.numpy import save_file
from scipy.optimize import minimize
from scipy.stats import rankdata

from equipoise.evaluation.acceptability import WEIGHTS, features, load_encoder
from equipoise.policy.bundled import folder
from equipoise.policy.packaged import MPNET

LAYERS = (6,)
PENALTIES = (1e3, 3e3, 1e4)
SHARES = (1.0, 3.0)
"""What a judged sentence weighs, a made one 1."""
FOLDS, SEEDS = 10, (0, 1, 2)


def auc(scores, labels):
    ranks, ones = rankdata(scores), labels.sum()
    return (ranks[labels == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones))


def standard_error(area, labels):
    """Hanley and McNeil 1982, Radiology 143(1)."""
    ones, zeros = labels.sum(), (1 - labels).sum()
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    among = (ones - 1) * (first - area**2) + (zeros - 1) * (second - area**2)
    return np.sqrt((area * (1 - area) + among) / (ones * zeros))


class Made:
    """What the made sentences contribute to every fit, once computed."""

    def __init__(self, x, y):
        self.mean, self.spread = x.mean(0), x.std(0) + 1e-6
        z = (x - self.mean) / self.spread
        self.products, self.moments = z.T @ z, z.T @ (y - y.mean())

    def fit(self, x, y, penalty, share):
        """(weights, bias) for features as they are; the mean score of the judged sentences is their share of ones."""
        z = (x - self.mean) / self.spread
        products = self.products + share * z.T @ z + penalty * np.eye(z.shape[1])
        weights = np.linalg.solve(products, self.moments + share * z.T @ (y - y.mean())) / self.spread
        return weights, y.mean() - (x @ weights).mean()

    def best(self, x, y, fold):
        """(penalty, share) with the highest AUC over five folds."""

        def value(setting):
            scores = np.zeros(len(y))
            for k in range(5):
                out = fold % 5 == k
                weights, bias = self.fit(x[~out], y[~out], *setting)
                scores[out] = x[out] @ weights + bias
            return auc(scores, y)

        return max(((penalty, share) for penalty in PENALTIES for share in SHARES), key=value)

    def unseen(self, x, y, fold):
        """(N,) the scores that each sentence gets from a probe that has not seen its fold."""
        scores = np.zeros(len(y))
        for k in range(FOLDS):
            out = fold % FOLDS == k
            weights, bias = self.fit(x[~out], y[~out], *self.best(x[~out], y[~out], fold[~out] // FOLDS))
            scores[out] = x[out] @ weights + bias
        return scores


def calibrated(scores, labels):
    """(slope, offset) with which σ(slope·score + offset) is the probability (Platt 1999)."""
    signs = 2 * labels - 1
    found = minimize(lambda ab: np.logaddexp(0, -signs * (ab[0] * scores + ab[1])).sum(), [1.0, 0.0])
    return found.x


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--made", type=int, default=12_000, help="sentences of the grammar")
    parser.add_argument("--write", action="store_true", help="replace the packaged probe")
    options = parser.parse_args(argv)
    data = options.csv.read_bytes()
    rows = list(csv.DictReader(data.decode("utf-8").splitlines()))
    texts, y = [row["Text"] for row in rows], np.array([float(row["acceptable"]) for row in rows])
    encoder = load_encoder(folder(MPNET), max(LAYERS))
    sentences = Grammar().sentences(options.made, seed=1)
    x = features(texts, *encoder, LAYERS).astype(np.float64)
    made_x = features([text for text, _ in sentences], *encoder, LAYERS).astype(np.float64)
    made = Made(made_x, np.array([float(label) for _, label in sentences]))
    numbers: dict[str, int] = {}
    of_text = np.array([numbers.setdefault(text, len(numbers)) for text in texts])  # equal texts share a fold
    scores = []
    for seed in SEEDS:
        fold = np.random.default_rng(seed).permutation(len(numbers))[of_text]
        scores.append(made.unseen(x, y, fold))
    areas = [auc(each, y) for each in scores]
    area, error = float(np.mean(areas)), standard_error(np.mean(areas), y)
    print(f"nested AUC {', '.join(f'{each:.3f}' for each in areas)}: mean {area:.3f}, standard error {error:.3f}")
    alone = np.linalg.solve(made.products + 1e4 * np.eye(len(made.moments)), made.moments) / made.spread
    print(f"of the made sentences alone, no judged one seen: {auc(x @ alone, y):.3f}")
    if options.write:
        penalty, share = made.best(x, y, np.random.default_rng(SEEDS[0]).permutation(len(numbers))[of_text])
        weights, bias = made.fit(x, y, penalty, share)
        slope, offset = calibrated(scores[0], y)
        chances = 1 / (1 + np.exp(-(slope * scores[0] + offset)))
        said = {
            "encoder": MPNET.fingerprint, "layers": json.dumps(LAYERS), "bias": repr(float(slope * bias + offset)),
            "threshold": repr(float(np.quantile(chances, 1 - y.mean()))), "penalty": repr(penalty), "share": repr(share),
            "nested_auc": f"{area:.4f}", "standard_error": f"{error:.4f}", "made": str(options.made),
            "sentences": str(len(y)), "data_sha256": hashlib.sha256(data).hexdigest(),
            "data": "CoLA, Warstadt, Singh and Bowman 2019, TACL 7", "made_by": "benchmarks/acceptability/fit.py",
        }  # fmt: skip
        WEIGHTS.parent.mkdir(exist_ok=True)
        save_file({"weights": slope * weights}, WEIGHTS, said)
        print(f"{WEIGHTS}: penalty {penalty:g}, judged sentences weigh {share:g}, threshold {said['threshold']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
