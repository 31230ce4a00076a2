"""A hidden Markov model over a reduced vocabulary, and expectation maximisation on weighted sequences.

H states, S symbols, P prompts, B sequences of at most T symbols. Before the first symbol the state is drawn from the
prompt's own initial distribution; each state emits a symbol, then moves. All recursions normalise at every step (the
scaling of L. R. Rabiner, 1989, "A tutorial on hidden Markov models", Proc. IEEE 77(2), section V.A), so they run in
float32 on probabilities and not on logarithms, as plain matrix products.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class HMM:
    """Probabilities in float32: initial_PH[p, j] that the first state is j, transition_HH[i, j] that j follows i,
    emission_SH[s, j] that j emits symbol s."""

    initial_PH: Tensor
    transition_HH: Tensor
    emission_SH: Tensor

    def to(self, device: torch.device) -> "HMM":
        return HMM(self.initial_PH.to(device), self.transition_HH.to(device), self.emission_SH.to(device))

    def save(self, path: Path, metadata: dict[str, str], **more: Tensor) -> None:
        """Write a safetensors file, with the tensors `more` beside the model's own."""
        tensors = {"initial": self.initial_PH, "transition": self.transition_HH, "emission": self.emission_SH, **more}
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, path, metadata=metadata)

    @staticmethod
    def load(path: Path) -> tuple["HMM", dict[str, str], dict[str, Tensor]]:
        """The model, the metadata, and the other tensors of a file; one that was kept in fewer bits has its columns
        brought back to a sum of 1. Raises SafetensorError and OSError."""
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        own = HMM(tensors.pop("initial"), tensors.pop("transition"), tensors.pop("emission"))
        return own if own.emission_SH.dtype == torch.float32 else own.normalised(), metadata, tensors

    def normalised(self) -> "HMM":
        """In float32, every distribution with a sum of 1."""
        initial_PH, transition_HH, emission_SH = (
            x.float() for x in (self.initial_PH, self.transition_HH, self.emission_SH)
        )
        return HMM(
            initial_PH / initial_PH.sum(1, keepdim=True),
            transition_HH / transition_HH.sum(1, keepdim=True),
            emission_SH / emission_SH.sum(0, keepdim=True),
        )


@dataclass(frozen=True)
class Sequences:
    """symbols_BT: (B, T) symbols, anything beyond lengths_B: (B,), all at least 1. prompts_B: (B,) which prompt each
    follows. weights_B: (B,) how much each counts. others_BTM: (B, T, M), where known, M symbols that could have come in
    each place instead, drawn from the distribution that the symbol itself was drawn from."""

    symbols_BT: Tensor
    lengths_B: Tensor
    prompts_B: Tensor
    weights_B: Tensor
    others_BTM: Tensor | None = None

    def select(self, rows: Tensor, scale: float = 1.0) -> "Sequences":
        """The given rows, with weights `scale` times theirs."""
        return Sequences(
            self.symbols_BT[rows],
            self.lengths_B[rows],
            self.prompts_B[rows],
            self.weights_B[rows] * scale,
            None if self.others_BTM is None else self.others_BTM[rows],
        )

    def __len__(self) -> int:
        return len(self.lengths_B)


@dataclass(frozen=True)
class Counts:
    """Expected weighted counts, shaped as the parameters that they estimate."""

    initial_PH: Tensor
    transition_HH: Tensor
    emission_SH: Tensor
    log_likelihood: float
    """Σ weight · log-likelihood in nats, under the model that the counts were taken with."""

    def mixed(self, other: "Counts", share: float) -> "Counts":
        """(1 − share) of these and `share` of the others."""
        return Counts(
            torch.lerp(self.initial_PH, other.initial_PH, share),
            torch.lerp(self.transition_HH, other.transition_HH, share),
            torch.lerp(self.emission_SH, other.emission_SH, share),
            other.log_likelihood,
        )


def log_likelihoods(hmm: HMM, data: Sequences, batch: int = 1024) -> Tensor:
    """(B,) log-likelihood of each sequence in nats, in float64."""
    parts = [_forward(hmm, data.select(rows)).log_likelihood_B for rows in torch.arange(len(data)).split(batch)]
    return torch.cat(parts)


class _Forward(NamedTuple):
    predicted_TBH: Tensor
    """State given the symbols before its own."""
    filtered_TBH: Tensor
    """State given those and its own symbol."""
    scale_TB: Tensor
    """Each symbol's probability given those before; 1 beyond the end."""
    log_likelihood_B: Tensor


def _forward(hmm: HMM, data: Sequences) -> _Forward:
    steps = int(data.lengths_B.max())
    predicted_BH = hmm.initial_PH[data.prompts_B]
    predicted, filtered, scales = [], [], []
    for t in range(steps):
        joint_BH = predicted_BH * hmm.emission_SH[data.symbols_BT[:, t]]
        scale_B = joint_BH.sum(-1)
        live_B = t < data.lengths_B
        predicted.append(predicted_BH)
        # Beyond the end nothing is read again; any finite number will do.
        filtered.append(torch.where(live_B[:, None], joint_BH / scale_B[:, None], predicted_BH))
        scales.append(torch.where(live_B, scale_B, 1.0))
        predicted_BH = filtered[-1] @ hmm.transition_HH
    scale_TB = torch.stack(scales)
    return _Forward(torch.stack(predicted), torch.stack(filtered), scale_TB, scale_TB.double().log().sum(0))


def expected_counts(hmm: HMM, data: Sequences, soft: float = 0.0, batch: int = 1024) -> Counts:
    """The E step over all sequences, `batch` at a time; sums over batches are in float64.

    With `soft` 0 these are the counts of expectation maximisation. Else that share of them comes from `others_BTM`:
    at each place every other symbol counts 1/M, with the posterior of its state and of the one before given the
    symbols before it. What follows says nothing of those, but there are M times as many.
    """
    total = [torch.zeros_like(x, dtype=torch.float64) for x in (hmm.initial_PH, hmm.transition_HH, hmm.emission_SH)]
    log_likelihood = torch.zeros((), dtype=torch.float64, device=hmm.initial_PH.device)
    for rows in torch.arange(len(data)).split(batch):
        log_likelihood += _add_counts(hmm, data.select(rows), soft, total)
    initial, transition, emission = (x.float() for x in total)
    return Counts(initial, transition, emission, float(log_likelihood))


def _add_counts(hmm: HMM, data: Sequences, soft: float, total: list[Tensor]) -> Tensor:
    run = _forward(hmm, data)
    after_BH = torch.ones_like(run.filtered_TBH[0])  # likelihood of what follows given the state, over its prediction
    pairs_HH = torch.zeros_like(hmm.transition_HH)
    emitted_SH, ratio_SH = torch.zeros_like(hmm.emission_SH), torch.zeros_like(hmm.emission_SH)
    for t in range(len(run.filtered_TBH) - 1, -1, -1):
        live_B1 = (t < data.lengths_B)[:, None]
        weight_B1 = live_B1 * data.weights_B[:, None]
        emitted_BH = (1 - soft) * weight_B1 * run.filtered_TBH[t] * after_BH
        _add_rows(emitted_SH, data.symbols_BT[:, t], emitted_BH)
        ahead_BH = hmm.emission_SH[data.symbols_BT[:, t]] * after_BH / run.scale_TB[t][:, None]
        pull_BH = (1 - soft) * weight_B1 * ahead_BH  # what each state of this place is multiplied with
        if soft and data.others_BTM is not None:
            others_BM = data.others_BTM[:, t]
            emission_BMH = hmm.emission_SH[others_BM]
            probability_BM = torch.bmm(emission_BMH, run.predicted_TBH[t].unsqueeze(-1)).squeeze(-1)
            ratio_BM = soft / others_BM.shape[1] * weight_B1 / probability_BM
            pull_BH += torch.bmm(ratio_BM.unsqueeze(1), emission_BMH).squeeze(1)
            _add_products(ratio_SH, others_BM, ratio_BM, run.predicted_TBH[t])
        if t == 0:
            total[0].index_put_((data.prompts_B,), (run.predicted_TBH[0] * pull_BH).double(), accumulate=True)
            break
        pairs_HH += run.filtered_TBH[t - 1].T @ pull_BH
        after_BH = torch.where(live_B1, ahead_BH @ hmm.transition_HH.T, 1.0)
    total[1] += pairs_HH * hmm.transition_HH
    total[2] += emitted_SH
    total[2] += ratio_SH * hmm.emission_SH
    return (run.log_likelihood_B * data.weights_B).sum()


def _add_rows(into_SH: Tensor, symbols_B: Tensor, rows_BH: Tensor) -> None:
    """into_SH[symbols_B[b]] += rows_BH[b], in an order that does not change from run to run."""
    if into_SH.is_cuda:
        into_SH.index_put_((symbols_B,), rows_BH, accumulate=True)
    else:
        into_SH.index_add_(0, symbols_B, rows_BH)


def _add_products(into_SH: Tensor, symbols_BM: Tensor, factor_BM: Tensor, rows_BH: Tensor) -> None:
    """into_SH[symbols_BM[b, m]] += factor_BM[b, m] · rows_BH[b]: a sparse matrix times a dense one."""
    batch, count = symbols_BM.shape
    row_N = torch.arange(batch, device=symbols_BM.device).repeat_interleave(count)
    where_2N = torch.stack([symbols_BM.flatten().long(), row_N])
    # Indices are symbols and rows, so valid. torch 2.11 and 2.12 warn that nothing says so, even where the argument
    # `check_invariants` does (pytorch issue 184610); this they heed.
    with torch.sparse.check_sparse_tensor_invariants(False):
        sparse_SB = torch.sparse_coo_tensor(where_2N, factor_BM.flatten(), (len(into_SH), batch))
        into_SH += torch.sparse.mm(sparse_SB, rows_BH)


def maximise(counts: Counts, base_S: Tensor, smoothing: float = 0.0) -> HMM:
    """The M step. `smoothing` adds that many expected observations to each distribution: of symbols from base_S, of
    states from how often each is visited. A state that is never visited gets what was added, or a uniform choice."""
    visits_H = counts.emission_SH.sum(0)
    share_H = (visits_H + 1e-6) / (visits_H + 1e-6).sum()

    def normalised(x: Tensor, prior: Tensor, dim: int) -> Tensor:
        x = x + smoothing * prior
        size = x.sum(dim, keepdim=True)
        return torch.where(size > 0, x / size.clamp(min=torch.finfo(x.dtype).tiny), 1 / x.shape[dim])

    return HMM(
        normalised(counts.initial_PH, share_H[None, :], 1),
        normalised(counts.transition_HH, share_H[None, :], 1),
        normalised(counts.emission_SH, base_S[:, None], 0),
    )


def from_states(data: Sequences, states_BT: Tensor, shape: tuple[int, int, int]) -> Counts:
    """Counts as if the states were seen: states_BT (B, T), −1 where unknown. `shape` is (P, H, S)."""
    prompts, hidden, symbols = shape
    device = data.lengths_B.device
    known_BT = (states_BT >= 0) & (torch.arange(states_BT.shape[1], device=device) < data.lengths_B[:, None])
    weights_BT = data.weights_B.float()[:, None].expand_as(states_BT)

    def count(rows: int, columns: int, row: Tensor, column: Tensor, weight: Tensor) -> Tensor:
        flat = torch.zeros(rows * columns, device=device)
        return flat.index_put_((row * columns + column,), weight, accumulate=True).view(rows, columns)

    both_BT = known_BT[:, :-1] & known_BT[:, 1:]
    first_B = known_BT[:, 0]
    return Counts(
        count(prompts, hidden, data.prompts_B[first_B], states_BT[first_B, 0], weights_BT[first_B, 0]),
        count(hidden, hidden, states_BT[:, :-1][both_BT], states_BT[:, 1:][both_BT], weights_BT[:, 1:][both_BT]),
        count(symbols, hidden, data.symbols_BT[known_BT], states_BT[known_BT], weights_BT[known_BT]),
        float("nan"),
    )


def k_means(points_ND: Tensor, clusters: int, generator: torch.Generator, rounds: int = 12) -> Tensor:
    """(K, D) centres: Lloyd's algorithm from distinct random points; an emptied cluster keeps its centre. Where there
    are fewer points than clusters, the last centres repeat the first."""
    points_ND = points_ND.float()
    first = torch.randperm(len(points_ND), generator=generator).to(points_ND.device)
    centres_KD = points_ND[first[torch.arange(clusters, device=first.device) % len(first)]]
    for _ in range(rounds):
        nearest_N = nearest(points_ND, centres_KD)
        sums_KD = torch.zeros_like(centres_KD).index_put_((nearest_N,), points_ND, accumulate=True)
        sizes_K = torch.bincount(nearest_N, minlength=clusters)
        centres_KD = torch.where(sizes_K[:, None] > 0, sums_KD / sizes_K.clamp(min=1)[:, None], centres_KD)
    return centres_KD


def nearest(points_ND: Tensor, centres_KD: Tensor) -> Tensor:
    """(N,) the nearest centre of each point."""
    half_K = centres_KD.square().sum(-1) / 2
    return torch.cat([(half_K - part.float() @ centres_KD.T).argmin(-1) for part in points_ND.split(16384)])
