"""Sampling from exactly the policy that is scored.

The decode loop is our own: `model.generate` under autocast was measured to sample a policy whose KL to the reference
came out negative. One uniform number per (completion, token), drawn in advance, decides everything, so the result
depends neither on how rows are batched nor on which finished rows have been dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from equipoise.errors import UserError
from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.decode import StaticDecoder
from equipoise.policy.graphs import round_up
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout


@dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 1.0
    """Divides the logits, in sampling and scoring alike. 0 takes the likeliest token (generation only)."""
    top_p: float = 1.0
    """Nucleus: only the likeliest tokens whose mass reaches top_p are drawn. Training is unbiased at 1, the whole
    policy; the protocol's generation uses 0.95."""
    max_new_tokens: int = 32
    """A completion that has not stopped by then is cut off."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature {self.temperature} makes no distribution: use 0 (greedy) or more, 1.0 by default"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"top-p {self.top_p} is not in (0, 1]: use 1 for the whole distribution, 0.95 for the study's"
            )
        if self.max_new_tokens < 1:
            raise UserError(f"max-new-tokens {self.max_new_tokens} must be at least 1; the protocol uses 32")


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
        finite_B &= torch.cat([part_BV.isfinite().all(-1) for part_BV in torch.split(logits_BV, rows)])
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    parts = zip(torch.split(logits_BV, rows), torch.split(uniform_B, rows), strict=True)
    return torch.cat([invert(weights(part_BV, config), part_B) for part_BV, part_B in parts])


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


class NonFiniteLogits(RuntimeError):
    """The model produced nan or infinite logits while sampling; nothing of that batch can be used."""


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    generator: torch.Generator | None = None,
    *,
    uniform_BT: Tensor | None = None,
    guide: Guide | None = None,
) -> Rollout:
    """One completion per prompt (repeat a prompt for several). `generator` is a CPU generator: the same seed draws the
    same numbers on every device. Instead of it, `uniform_BT` gives the numbers: (B, max_new_tokens) float64 in [0, 1).
    A `guide` draws in place of `draw`.

    Each distinct prompt is run once and its cache copied to its rows. Raises NonFiniteLogits. On a GPU `decode` does
    the same from CUDA graphs; what follows here is the plain twin.
    """
    assert (generator is None) != (uniform_BT is None), "one source of random numbers"
    device, steps = policy.device, config.max_new_tokens
    if uniform_BT is None:
        uniform_BT = torch.rand(len(prompts), steps, generator=generator, dtype=torch.float64)
    uniform_BT = uniform_BT.to(device)
    if policy.graphs.enabled and policy.model.config._attn_implementation == TRIE_ATTENTION:
        return sample_static(policy, prompts, config, uniform_BT, guide)
    state = guide.open(len(prompts)) if guide is not None else None
    if state is not None:
        state.start(prompts)
    distinct = sorted({tuple(p) for p in prompts})
    place = {p: i for i, p in enumerate(distinct)}
    prompt_of_B = torch.tensor([place[tuple(p)] for p in prompts], device=device)
    lengths_U = torch.tensor([len(p) for p in distinct], device=device)
    width = int(lengths_U.max())
    ids_UP = torch.tensor([[*p, *[0] * (width - len(p))] for p in distinct], device=device)
    mask_UP = (torch.arange(width, device=device)[None] < lengths_U[:, None]).long()
    stops = torch.tensor(policy.stop_ids, device=device)

    cache = DynamicCache(config=policy.model.config)
    logits_UPV = policy.model(
        input_ids=ids_UP,
        attention_mask=mask_UP,
        position_ids=torch.arange(width, device=device).expand_as(ids_UP),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.arange(int(lengths_U.min()) - 1, width, device=device),
    ).logits
    logits_UV = logits_UPV[torch.arange(len(distinct), device=device), lengths_U - lengths_U.min()]
    cache.batch_select_indices(prompt_of_B)
    logits_BV, mask_BP, lengths_B = logits_UV[prompt_of_B], mask_UP[prompt_of_B], lengths_U[prompt_of_B]

    tokens_BT = torch.zeros(len(prompts), steps, dtype=torch.long, device=device)
    taken_B = torch.zeros(len(prompts), dtype=torch.long, device=device)
    finished_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    rows = torch.arange(len(prompts), device=device)  # which completion each row of the cache belongs to
    for t in range(steps):
        if not bool(logits_BV.isfinite().all()):
            raise NonFiniteLogits(f"non-finite logits while sampling token {t + 1}")
        if state is None:
            token = draw(logits_BV, uniform_BT[rows, t], config)
        else:
            token = state.draw(logits_BV, uniform_BT[rows, t], rows)
        live = ~finished_B[rows]
        tokens_BT[rows, t] = torch.where(live, token, 0)
        taken_B[rows] += live
        finished_B[rows] |= live & torch.isin(token, stops)
        running = torch.nonzero(~finished_B[rows]).squeeze(-1)
        if t + 1 == steps or len(running) == 0:
            break
        if len(running) <= 0.8 * len(rows):  # copying the cache costs as much as carrying a few finished rows along
            cache.batch_select_indices(running)
            rows, token, mask_BP = rows[running], token[running], mask_BP[running]
        mask_BP = torch.cat([mask_BP, torch.ones_like(mask_BP[:, :1])], dim=1)
        logits_BV = policy.model(
            input_ids=token[:, None],
            attention_mask=mask_BP,
            position_ids=(lengths_B[rows] + t)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    report = state.report() if state is not None else {}
    return Rollout([list(p) for p in prompts], tokens_BT, taken_B, finished_B, report)


def sample_static(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    uniform_BT: Tensor,
    guide: Guide | None = None,
) -> Rollout:
    """`sample` through a `StaticDecoder`, kept for the next call of the same size. Raises NonFiniteLogits."""
    width = round_up(max(map(len, prompts)), 16)
    rows = len(prompts) if len(prompts) <= 64 else round_up(len(prompts), 64)
    key = (rows, width, config, guide)
    decoder = policy.decoders.get(key)
    if decoder is None:
        decoder = policy.decoders[key] = StaticDecoder(policy, rows, width, config, guide)
    spare = rows - len(prompts)
    filled = [*prompts, *[prompts[0]] * spare]
    rollout, finite = decoder(filled, torch.cat([uniform_BT, uniform_BT[:1].expand(spare, -1)]))
    if not finite:
        raise NonFiniteLogits("non-finite logits while sampling")
    return rollout.select(torch.arange(len(prompts), device=policy.device))
