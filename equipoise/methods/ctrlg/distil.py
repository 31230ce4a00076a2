"""Distillation: the HMM that guides is made from sentences that the language model itself writes, freely.

1. Sample from the model at the temperature of use, the whole distribution. Next to each token a projection of the
   distribution after it is kept, and the mean distribution over all places.
2. Tokens that were never drawn are tied with others of their class into one symbol, so the HMM is over the few thousand
   tokens that matter and still a distribution over all of them.
3. Cluster the projections (k-means): a token's first state is the cluster of what the model expects after it. This is
   the latent variable distillation of A. Liu, H. Zhang and G. Van den Broeck (2023), "Scaling up probabilistic circuits
   by latent variable distillation", with predictions in place of hidden layers.
4. Expectation maximisation in mini-batches, counts mixed with a share that falls linearly to 0.
5. Sample again, now guided by that HMM, and note what the model itself expects on the way: so the HMM learns of terms,
   of what follows them, and of the last words before the limit, all rare in free sentences. This is the idea of
   S. Ross, G. Gordon and D. Bagnell (2011), "A reduction of imitation learning … to no-regret online learning".
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
from equipoise.policy.load import Policy
from equipoise.policy.sample import Guide, SamplingConfig, invert_many, sample, weights

FEATURES = 96
OTHERS = 8
"""Draws of each next token, the one that is gone on with among them."""
HELD_OUT = 0.05
"""Share of the sentences that no parameter is fitted to."""
SOFT = 0.8
"""Share of the counts that comes from all draws of a token, not from the one that was gone on with."""
SMOOTHING = 1.0
"""Expected observations added to each distribution in the M step, once the sentences are counted."""


@dataclass(frozen=True)
class Recorded:
    """Sentences that the model wrote, freely or guided. tokens_BT, lengths_B, finished_B as in a Rollout; prompts_B the
    prompt that each follows; logprobs_BT of each token in nats; features_BTD projections of the distribution *before*
    each token; others_BTM draws from that distribution; mean_V the mean distribution over all places."""

    tokens_BT: Tensor
    lengths_B: Tensor
    finished_B: Tensor
    prompts_B: Tensor
    logprobs_BT: Tensor
    features_BTD: Tensor
    others_BTM: Tensor
    mean_V: Tensor


class Recorder:
    """Keeps what the model expected in each place. It draws as the sampler does, or as another guide does."""

    def __init__(
        self, vocabulary: int, sampling: SamplingConfig, device: torch.device, steering: Guide | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        projection_VD = torch.randn(vocabulary, FEATURES, generator=generator) / FEATURES**0.5
        self.projection_VD = projection_VD.to(device)
        self.sampling, self.steering = sampling, steering
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
        self.steered = recorder.steering.open(rows) if recorder.steering is not None else None
        self.features_TBD = torch.zeros(steps, rows, FEATURES, device=device)
        self.logprobs_TB = torch.zeros(steps, rows, device=device)
        self.others_TBM = torch.zeros(steps, rows, OTHERS, dtype=torch.int32, device=device)
        self.total_V = torch.zeros(vocabulary, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        for buffer in (self.features_TBD, self.logprobs_TB, self.others_TBM, self.total_V, self.step):
            buffer.zero_()
        if self.steered is not None:
            self.steered.start(prompts)

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, rows: Tensor | None = None) -> Tensor:
        probs_BV = weights(logits_BV, self.recorder.sampling)
        # Systematic sampling: OTHERS equidistant points, of which the uniform number itself is one.
        steps_M = torch.arange(OTHERS, device=uniform_B.device) / OTHERS
        points_BM = torch.remainder(uniform_B[:, None] + steps_M, 1.0)
        drawn_BM = invert_many(probs_BV, points_BM)
        token_B = drawn_BM[:, 0] if self.steered is None else self.steered.draw(logits_BV, uniform_B, rows)
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
        self.total_V += probs_BV.sum(0)  # finished rows among them: harmless, they only blur the mean a little
        self.step.add_(1).clamp_(max=len(self.logprobs_TB) - 1)
        return token_B

    def report(self) -> Mapping[str, Tensor]:
        return {
            "features": self.features_TBD.transpose(0, 1).half(),
            "logprobs": self.logprobs_TB.T.clone(),
            "others": self.others_TBM.transpose(0, 1).clone(),
        }


def record(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    count: int,
    seed: int,
    batch: int,
    say: Callable[[str], None],
    steering: Guide | None = None,
) -> Recorded:
    """About `count` sentences, equally many for each prompt. Raises NonFiniteLogits."""
    plain = SamplingConfig(sampling.temperature, 1.0, sampling.max_new_tokens)
    recorder = Recorder(policy.model.config.get_text_config().vocab_size, plain, policy.device, steering)
    generator = torch.Generator().manual_seed(seed)
    each = -(-count // len(prompts))
    which = [i for _ in range(each) for i in range(len(prompts))]
    parts: list[tuple[Tensor, ...]] = []
    mean_V = torch.zeros(len(recorder.projection_VD), dtype=torch.float64, device=policy.device)
    started, told = time.monotonic(), time.monotonic()
    for begin in range(0, len(which), batch):
        chosen = which[begin : begin + batch]
        filled = chosen + chosen[:1] * (min(batch, len(which)) - len(chosen))  # full batches, so one shape is recorded
        rollout = sample(policy, [prompts[i] for i in filled], plain, generator, guide=recorder)
        for state in recorder._states.values():
            mean_V += state.total_V
        parts.append(
            tuple(
                x[: len(chosen)]
                for x in (
                    rollout.tokens_BT,
                    rollout.lengths_B,
                    rollout.finished_B,
                    torch.tensor(filled, device=policy.device),
                    rollout.report["logprobs"],
                    rollout.report["features"],
                    rollout.report["others"],
                )
            )
        )
        done, now = min(begin + batch, len(which)), time.monotonic()
        if now - told > 20:
            left = (now - started) / done * (len(which) - done)
            say(f"distilling: {done:,} of {len(which):,} sentences, about {left:.0f} s left")
            told = now
    columns = [torch.cat(x) for x in zip(*parts, strict=True)]
    return Recorded(*[*columns, mean_V / mean_V.sum()])


def symbols(free: Recorded, class_V: NDArray[np.int32]) -> Tensor:
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
    """held_out: mean log-likelihood of held-out free sentences in nats per token; held_out_model: the language
    model's own. counts: from which EM can go on."""

    model: HMM
    counts: Counts
    held_out: float
    held_out_model: float


class Distillation:
    """Fits the HMM to free sentences, then, where there are any, also to guided ones."""

    def __init__(self, free: Recorded, symbol_V: Tensor, prompts: int, hidden: int, seed: int) -> None:
        device = free.tokens_BT.device
        self.free, self.symbol_V = free, symbol_V.to(device)
        self.shape = (prompts, hidden, int(symbol_V.max()) + 1)
        self.generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(free.lengths_B), generator=self.generator).to(device)
        held = max(1, int(len(order) * HELD_OUT))
        self.test, self.train = order[:held], order[held:]
        share_V = (free.mean_V + 1e-12).double()
        share_S = torch.zeros(self.shape[2], dtype=torch.float64, device=device).index_add_(0, self.symbol_V, share_V)
        self.base_S = (share_S / share_S.sum()).float()
        # A symbol's probability is shared among its tokens as the model does on the whole.
        self.within_V = (share_V / share_S[self.symbol_V]).log()

    def fit(self, passes: int) -> Distilled:
        """Clusters first, then EM on the free sentences."""
        data = self._sequences(self.free, hard=1 - SOFT, soft=SOFT).select(self.train)
        states_BT = _first_states(self.free, self.train, self.shape[1], self.generator)
        counts = hmm.from_states(data, states_BT, self.shape)
        model = hmm.maximise(counts, self.base_S, SMOOTHING)
        return self._em(model, counts, data, passes, 1.0)

    def refit(self, before: Distilled, guided: Recorded, passes: int) -> Distilled:
        """EM goes on with what the model expected in the course of guided sentences, beside the free ones."""
        free = self._sequences(self.free, hard=1 - SOFT, soft=SOFT).select(self.train)
        data = free.joined(self._sequences(guided, hard=0.0, soft=1.0))
        return self._em(before.model, before.counts, data, passes, 0.5)

    def _sequences(self, recorded: Recorded, hard: float, soft: float) -> Sequences:
        ones_B = torch.ones(len(recorded.lengths_B), device=self.symbol_V.device)
        tokens_BT, others_BTM = self.symbol_V[recorded.tokens_BT], self.symbol_V[recorded.others_BTM].int()
        return Sequences(
            tokens_BT, recorded.lengths_B, recorded.prompts_B, hard * ones_B, others_BTM, soft * ones_B
        )  # fmt: skip

    def _em(self, model: HMM, counts: Counts, data: Sequences, passes: int, share: float) -> Distilled:
        """Stepwise EM (O. Cappé and E. Moulines, 2009, JRSS B 71(3)): the counts of a part of the data, scaled to all
        of it, are mixed into the counts so far, with a share that falls from `share` to 0."""
        parts = max(1, min(10, len(data) // 500))
        total, n = passes * parts, 0
        for _ in range(passes):
            order = torch.randperm(len(data), generator=self.generator).to(self.symbol_V.device)
            for rows in order.chunk(parts):
                part = data.select(rows, scale=len(data) / len(rows))
                counts = counts.mixed(hmm.expected_counts(model, part), share * (1 - n / total))
                model = hmm.maximise(counts, self.base_S, SMOOTHING)
                n += 1
        return self._measured(model, counts)

    def _measured(self, model: HMM, counts: Counts) -> Distilled:
        free = self.free
        real_BT = torch.arange(free.tokens_BT.shape[1], device=free.lengths_B.device) < free.lengths_B[:, None]
        tokens = float(free.lengths_B[self.test].sum())
        data = self._sequences(free, hard=1.0, soft=0.0).select(self.test)
        within = float((self.within_V[free.tokens_BT] * real_BT)[self.test].sum())
        own = float((free.logprobs_BT.double() * real_BT)[self.test].sum())
        return Distilled(
            model, counts, (float(hmm.log_likelihoods(model, data).sum()) + within) / tokens, own / tokens
        )  # fmt: skip


def _first_states(free: Recorded, rows: Tensor, hidden: int, generator: torch.Generator) -> Tensor:
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
