"""Drawing tokens from logits: temperature, nucleus, inverse transform; and what a guide is that steers it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from equipoise.policy.config import SamplingConfig

# Mass of the likeliest CANDIDATES tokens nearly always exceeds top_p; sorting a whole vocabulary for it would take
# longer than the model's own forward pass on a CPU.
CANDIDATES = 512
CPU_ROWS = 8
"""On a CPU so many rows are drawn at a time: what is in between then stays in the cache and is not asked of the system
anew each time, which takes several times as long as the arithmetic."""


def draw(logits_BV: Tensor, uniform_B: Tensor, config: SamplingConfig, finite_B: Tensor | None = None) -> Tensor:
    """(B,) token ids by inversion: the first whose cumulative probability exceeds the uniform number in [0, 1).

    Probabilities are computed in float32 and accumulated in float64, in which 100,000 terms lose nothing that a sample
    could show. The nucleus of top_p is every token at least as likely as the last one needed to reach it, ties
    included. Non-finite logits give some valid id, never an out-of-range one; where `finite_B` (uint8) is given, 0 is
    put there for such rows.
    """
    if logits_BV.is_cuda and config.temperature > 0:
        from equipoise.policy.kernels import vocabulary

        return vocabulary.draw(logits_BV, uniform_B, config.temperature, config.top_p, finite_B)
    rows = len(logits_BV) if logits_BV.is_cuda else CPU_ROWS
    if finite_B is not None:
        note_finite(logits_BV, finite_B)
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    parts = zip(torch.split(logits_BV, rows), torch.split(uniform_B, rows), strict=True)
    return torch.cat([invert(weights(part_BV, config), part_B) for part_BV, part_B in parts])


def note_finite(logits_BV: Tensor, finite_B: Tensor) -> None:
    """Put 0 into `finite_B` (uint8) for rows whose logits are not all finite."""
    if logits_BV.is_cuda:
        from equipoise.policy.kernels import vocabulary

        vocabulary.note_finite(logits_BV, finite_B)
    else:
        finite_B &= torch.cat([part_BV.isfinite().all(-1) for part_BV in torch.split(logits_BV, CPU_ROWS)])


def weights(logits_BV: Tensor, config: SamplingConfig) -> Tensor:
    """(B, V) float32: each token's probability at a temperature above 0, 0 outside the nucleus; so with top_p below 1
    the sum is less than 1."""
    logits_BV = logits_BV.float()
    if config.temperature != 1:
        logits_BV = logits_BV / config.temperature
    probs_BV = torch.softmax(logits_BV, dim=-1)
    if config.top_p < 1:
        find = _threshold_by_bisection if probs_BV.is_cuda else _threshold_by_sorting
        least_B = find(probs_BV, config.top_p)
        probs_BV = torch.where(probs_BV >= least_B[:, None], probs_BV, 0.0)
    return probs_BV


def _threshold_by_sorting(probs_BV: Tensor, top_p: float) -> Tensor:
    """(B,) probability of the last token needed to reach top_p, likeliest first."""
    top_BK = probs_BV.topk(min(CANDIDATES, probs_BV.shape[-1]), dim=-1).values
    reached_BK = top_BK.double().cumsum(-1) >= top_p
    first_B = reached_BK.int().argmax(-1)
    least_B = top_BK.gather(-1, first_B[:, None]).squeeze(-1)
    wide = torch.nonzero(~reached_BK[:, -1]).squeeze(-1)
    if len(wide):
        top_BK = probs_BV[wide].sort(dim=-1, descending=True).values
        # A whole vocabulary may sum to a hair less than a top_p near 1: then all of it is the nucleus.
        short_B = (top_BK.double().cumsum(-1) < top_p).sum(-1).clamp(max=top_BK.shape[-1] - 1)
        least_B[wide] = top_BK.gather(-1, short_B[:, None]).squeeze(-1)
    return least_B


def _threshold_by_bisection(probs_BV: Tensor, top_p: float) -> Tensor:
    """The same without sorting or looking: the largest float32 t such that the tokens of probability ≥ t reach top_p.

    Non-negative floats are ordered as their bits are, so 31 halvings of the bits find it exactly.
    """
    low_B = torch.zeros(len(probs_BV), dtype=torch.int32, device=probs_BV.device)
    high_B = torch.full_like(low_B, 0x3F800001)  # just above 1.0
    for _ in range(31):
        middle_B = low_B + (high_B - low_B) // 2
        least_B1 = middle_B.view(torch.float32)[:, None]
        mass_B = torch.where(probs_BV >= least_B1, probs_BV, 0.0).sum(-1, dtype=torch.float64)
        enough_B = mass_B >= top_p
        low_B, high_B = torch.where(enough_B, middle_B, low_B), torch.where(enough_B, high_B, middle_B)
    return low_B.view(torch.float32)


def invert(weights_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """(B,) index k with probability weights[k] / sum(weights), never one of weight 0."""
    return invert_many(weights_BK, uniform_B[:, None]).squeeze(-1)


def invert_many(weights_BK: Tensor, uniform_BM: Tensor) -> Tensor:
    """(B, M) the same for several numbers a row."""
    if len(weights_BK) > CPU_ROWS and not weights_BK.is_cuda:
        parts = zip(torch.split(weights_BK, CPU_ROWS), torch.split(uniform_BM, CPU_ROWS), strict=True)
        return torch.cat([invert_many(part_BK, part_BM) for part_BK, part_BM in parts])
    cumulative_BK = weights_BK.double().cumsum(-1)
    total_B1 = cumulative_BK[:, -1:]
    # u·total can round up to total itself, past the last index; the largest double below it selects the last real one.
    point_BM = torch.minimum(uniform_BM * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    index_BM = torch.searchsorted(cumulative_BK, point_BM, right=True)
    return index_BM.clamp(max=weights_BK.shape[-1] - 1)


class GuideState(Protocol):
    """A guide at work on B completions. Its tensors lie on the policy's device and keep their addresses."""

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Begin B new completions, one for each prompt."""

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, rows: Tensor | None = None) -> Tensor:
        """(B,) the next token of each row, in place of `draw`. Called once a step. `rows` says which completions are
        still written, None that all B are there; finished ones among them go on being asked, and are ignored.

        Must be a function of tensors that never looks at a value, as it is recorded in a CUDA graph. That runs it
        before `start`."""

    def report(self) -> Mapping[str, Tensor]:
        """What to put into `Rollout.report`: copies, (B, …)."""


class Guide(Protocol):
    """Draws the tokens in place of `draw`: to steer what is written, or to note what the model thinks on the way."""

    def open(self, rows: int) -> GuideState:
        """A state for so many completions; the same one when asked again."""
