"""Distillation: the HMM that guides is made from sentences that the language model itself writes, freely.

1. Sample from the model at the temperature of use, the whole distribution. In each place, keep some draws of the next
   token, a projection of its distribution, and add that up to the mean distribution of all places.
2. Tokens that are not expected even once in so many places are tied with others of their class into one symbol. So the
   HMM is over the few thousand tokens that matter, and still a distribution over all of them.
3. Cluster the projections (k-means): a token's first state is the cluster of what the model expects after it. This is
   the latent variable distillation of A. Liu, H. Zhang and G. Van den Broeck (2023), "Scaling up probabilistic circuits
   by latent variable distillation", with predictions in place of hidden layers.
4. Expectation maximisation in mini-batches, counts mixed with a share that falls linearly to 0, most of them from all
   draws of a token and not only from the one that was gone on with. The M step adds a little of the mean distribution
   to every state, so that a term that was never drawn keeps the probability that the model gives it on the whole.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from equipoise.methods.ctrlg import hmm
from equipoise.methods.ctrlg.hmm import HMM, Counts, Sequences
from equipoise.policy.config import SamplingConfig
from equipoise.policy.draw import invert_many, weights
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import sample
from equipoise.runs.ranks import ALONE, Ranks

FEATURES = 96
OTHERS = 8
"""Draws of each next token, the one that is gone on with among them."""
HELD_OUT = 0.05
"""Share of the sentences that no parameter is fitted to."""
SOFT = 0.8
"""Share of the counts that comes from all draws of a token, not from the one that was gone on with."""
_DOUBLE = torch.float64
SMOOTHING = 1.0
"""Expected observations added to each distribution in the M step, once the sentences are counted."""


@dataclass(frozen=True)
class Free:
    """Sentences that the model wrote freely. tokens_BT, lengths_B as in a Rollout; prompts_B which prompt each follows;
    logprobs_BT of each token in nats; features_BTD projections of the distribution *before* each token; others_BTM
    tokens that could have come instead, equally probable draws; mean_V the mean distribution over all places."""

    tokens_BT: Tensor
    lengths_B: Tensor
    finished_B: Tensor
    prompts_B: Tensor
    logprobs_BT: Tensor
    features_BTD: Tensor
    others_BTM: Tensor
    mean_V: Tensor


class Recorder:
    """A guide that does not steer: it draws as the sampler does, and keeps what the model expected."""

    def __init__(
        self, vocabulary: int, sampling: SamplingConfig, stop_ids: Sequence[int], device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        projection_VD = torch.randn(vocabulary, FEATURES, generator=generator) / FEATURES**0.5
        self.projection_VD = projection_VD.to(device)
        self.sampling = sampling
        # A table, as the prompt `raw` has thousands: `torch.isin` then sorts them, which a CUDA graph forbids.
        self.stops_V = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.stops_V[[i for i in stop_ids if i >= 0]] = True
        self.mean_V = torch.zeros(vocabulary, dtype=torch.float64, device=device)
        """Sum of the distributions in all places so far."""
        self._states: dict[int, _Recording] = {}

    def open(self, rows: int) -> "_Recording":
        if rows not in self._states:
            self._states[rows] = _Recording(self, rows)
        return self._states[rows]


class _Recording:
    def __init__(self, recorder: Recorder, rows: int) -> None:
        device = recorder.projection_VD.device
        steps, vocabulary = recorder.sampling.max_new_tokens, len(recorder.projection_VD)
        self.recorder = recorder
        self.features_TBD = torch.zeros(steps, rows, FEATURES, device=device)
        self.logprobs_TB = torch.zeros(steps, rows, device=device)
        self.others_TBM = torch.zeros(steps, rows, OTHERS, dtype=torch.int32, device=device)
        self.total_V = torch.zeros(vocabulary, device=device)
        self.live_B = torch.ones(rows, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        for buffer in (self.features_TBD, self.logprobs_TB, self.others_TBM, self.total_V, self.step):
            buffer.zero_()
        self.live_B.fill_(1)

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, rows: Tensor | None = None) -> Tensor:
        probs_BV = weights(logits_BV, self.recorder.sampling)
        # Systematic sampling: OTHERS equidistant points, of which the uniform number itself is one.
        steps_M = torch.arange(OTHERS, device=uniform_B.device) / OTHERS
        points_BM = torch.remainder(uniform_B[:, None] + steps_M, 1.0)
        drawn_BM = invert_many(probs_BV, points_BM)
        token_B = drawn_BM[:, 0]
        columns = {
            "features_TBD": probs_BV.sqrt() @ self.recorder.projection_VD,
            "logprobs_TB": probs_BV.gather(1, token_B[:, None]).squeeze(1).log(),
            "others_TBM": drawn_BM.int(),
        }
        for name, column in columns.items():
            buffer = getattr(self, name)
            if rows is not None:
                column = torch.zeros_like(buffer[0]).index_copy(0, rows, column)
            buffer.index_copy_(0, self.step, column[None])
        live_B = self.live_B if rows is None else self.live_B[rows]
        self.total_V += live_B @ probs_BV
        live_B = live_B * ~self.recorder.stops_V[token_B]
        if rows is None:
            self.live_B.copy_(live_B)
        else:
            self.live_B[rows] = live_B
        self.step.add_(1).clamp_(max=len(self.logprobs_TB) - 1)
        return token_B

    def report(self) -> Mapping[str, Tensor]:
        self.recorder.mean_V += self.total_V
        return {
            "features": self.features_TBD.transpose(0, 1).half(),
            "logprobs": self.logprobs_TB.T.clone(),
            "others": self.others_TBM.transpose(0, 1).clone(),
        }


def sample_freely(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    count: int,
    seed: int,
    batch: int,
    say: Callable[[str], None],
    ranks: Ranks = ALONE,
) -> Free | None:
    """About `count` sentences, equally many for each prompt, a batch by each rank at a time; they are kept on rank 0,
    the others get None. Raises NonFiniteLogits, on all."""
    plain = SamplingConfig(sampling.temperature, 1.0, sampling.max_new_tokens)
    recorder = Recorder(policy.model.config.get_text_config().vocab_size, plain, policy.stop_ids, policy.device)
    generator = torch.Generator().manual_seed(seed)
    each = -(-count // len(prompts))
    which = [i for _ in range(each) for i in range(len(prompts))]
    size = min(batch, len(which))

    def written(chosen: list[int], uniform_BT: Tensor) -> list[Tensor]:
        filled = chosen + chosen[:1] * (size - len(chosen))  # full batches, so one shape is recorded
        recorder.mean_V.zero_()
        rollout = sample(policy, [prompts[i] for i in filled], plain, uniform_BT=uniform_BT, guide=recorder)
        columns = _columns(rollout, torch.tensor(filled, device=policy.device))
        kept = [*(column[: len(chosen)] for column in columns), recorder.mean_V.clone()]
        return kept if ranks.size == 1 else [column.cpu() for column in kept]

    parts: list[list[Tensor]] = []
    mean_V = torch.zeros(len(recorder.projection_VD), dtype=torch.float64, device=policy.device)
    started, told = time.monotonic(), time.monotonic()
    for begin in range(0, len(which), batch * ranks.size):
        round_ = [
            # All draw everybody's random numbers, so that a batch has its own, whoever writes it.
            (which[first : first + batch], torch.rand(size, plain.max_new_tokens, generator=generator, dtype=_DOUBLE))
            for first in range(begin, min(begin + batch * ranks.size, len(which)), batch)
        ]
        for *columns, total_V in ranks.deal(round_, lambda given: written(*given)):
            if ranks.first:
                parts.append([column.to(policy.device) for column in columns])
                mean_V += total_V.to(policy.device)
        done, now = min(begin + batch * ranks.size, len(which)), time.monotonic()
        if now - told > 20:
            left = (now - started) / done * (len(which) - done)
            say(f"distilling: {done:,} of {len(which):,} sentences, about {left:.0f} s left")
            told = now
    if not ranks.first:
        return None
    together = [torch.cat(column) for column in zip(*parts, strict=True)]
    return Free(*[*together, mean_V / mean_V.sum()])


def _columns(rollout: Rollout, prompts_B: Tensor) -> list[Tensor]:
    """In the order of `Free`, all but the last."""
    report = rollout.report
    of_tokens = [report["logprobs"], report["features"], report["others"]]
    return [rollout.tokens_BT, rollout.lengths_B, rollout.finished_B, prompts_B, *of_tokens]


def symbols(free: Free, class_V: NDArray[np.int32]) -> Tensor:
    """(V,) symbol of each token: its own where it is expected once or more, else one for all others of a class."""
    steps = torch.arange(free.tokens_BT.shape[1], device=free.tokens_BT.device)
    drawn_N = free.tokens_BT[steps < free.lengths_B[:, None]]
    expected_V = free.mean_V * len(drawn_N)
    # Class 0 is never allowed: one symbol for all of it.
    own = np.flatnonzero((expected_V.cpu().numpy() >= 1) & (class_V != 0))
    key_V = class_V.astype(np.int64)
    key_V[own] = int(class_V.max()) + 1 + np.arange(len(own))
    return torch.from_numpy(np.unique(key_V, return_inverse=True)[1])


@dataclass(frozen=True)
class Distilled:
    """held_out: mean log-likelihood of held-out sentences in nats per token, the language model's own beside it."""

    model: HMM
    symbol_V: Tensor
    held_out: float
    held_out_model: float
    sentences: int
    tokens: int


def fit(
    free: Free, symbol_V: Tensor, prompts: int, hidden: int, passes: int, seed: int, say: Callable[[str], None]
) -> Distilled:
    """Initialise and run EM on the free sentences."""
    device = free.tokens_BT.device
    symbol_V = symbol_V.to(device)
    count_S = int(symbol_V.max()) + 1
    ones_B = torch.ones(len(free.lengths_B), device=device)
    others_BTM = symbol_V[free.others_BTM].int()
    data = Sequences(symbol_V[free.tokens_BT], free.lengths_B, free.prompts_B, ones_B, others_BTM)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator).to(device)
    held = max(1, int(len(data) * HELD_OUT))
    test, train = order[:held], order[held:]
    base_S = torch.zeros(count_S, device=device).index_add_(0, symbol_V, free.mean_V.float())
    base_S = (base_S + 1e-9) / (base_S + 1e-9).sum()
    fitted = data.select(train)
    states_BT = _first_states(free, train, hidden, generator)
    counts = hmm.from_states(fitted, states_BT, (prompts, hidden, count_S))
    model = hmm.maximise(counts, base_S, SMOOTHING)
    # A symbol's probability is shared among its tokens as the model does on the whole.
    within_V = torch.log(
        (free.mean_V + 1e-12)
        / torch.zeros(count_S, dtype=torch.float64, device=device).index_add_(0, symbol_V, free.mean_V + 1e-12)[
            symbol_V
        ]
    )
    real_BT = torch.arange(free.tokens_BT.shape[1], device=device) < free.lengths_B[:, None]
    within = float((within_V[free.tokens_BT] * real_BT)[test].sum())
    tokens = float(data.lengths_B[test].sum())

    def held_out(model: HMM) -> float:
        return (float(hmm.log_likelihoods(model, data.select(test)).sum()) + within) / tokens

    say(f"k-means: {held_out(model):.3f} nats per held-out token")
    model = _mini_batch_em(model, counts, fitted, base_S, passes, generator)
    own = float((free.logprobs_BT * real_BT)[test].double().sum()) / tokens
    return Distilled(model, symbol_V.cpu(), held_out(model), own, len(data), int(data.lengths_B.sum()))


def _first_states(free: Free, rows: Tensor, hidden: int, generator: torch.Generator) -> Tensor:
    """(B, T) the cluster of the distribution after each token; the last state is kept for the stop token; −1 after the
    last token of a sentence that was cut off."""
    features_BTD, lengths_B = free.features_BTD[rows], free.lengths_B[rows]
    after = torch.arange(1, features_BTD.shape[1], device=lengths_B.device) < lengths_B[:, None]
    points_ND = features_BTD[:, 1:][after]
    few = torch.randperm(len(points_ND), generator=generator)[: hidden * 400].to(points_ND.device)
    centres_KD = hmm.k_means(points_ND[few], hidden - 1, generator)
    states_BT = torch.full(features_BTD.shape[:2], -1, dtype=torch.long, device=lengths_B.device)
    states_BT[:, :-1][after] = hmm.nearest(points_ND, centres_KD)
    finished = torch.nonzero(free.finished_B[rows]).squeeze(-1)
    states_BT[finished, lengths_B[finished] - 1] = hidden - 1
    return states_BT


def _mini_batch_em(
    model: HMM, counts: Counts, data: Sequences, base_S: Tensor, passes: int, generator: torch.Generator
) -> HMM:
    """Stepwise EM (O. Cappé and E. Moulines, 2009, JRSS B 71(3)): the counts of a part of the data, scaled to all of
    it, are mixed into the counts so far."""
    size = max(500, -(-len(data) // 10))
    parts = max(1, round(len(data) / size))
    total, n = passes * parts, 0
    for _ in range(passes):
        order = torch.randperm(len(data), generator=generator).to(data.lengths_B.device)
        for rows in order.chunk(parts):
            part = data.select(rows, scale=len(data) / len(rows))
            counts = counts.mixed(hmm.expected_counts(model, part, SOFT), share=1 - n / total)
            model = hmm.maximise(counts, base_S, SMOOTHING)
            n += 1
    return model
