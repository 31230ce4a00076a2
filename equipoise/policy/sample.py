"""Sampling from exactly the policy that is scored.

The decode loop is our own: `model.generate` under autocast was measured to sample a policy whose KL to the reference
came out negative. One uniform number per (completion, token), drawn in advance, decides everything, so the result
depends neither on how rows are batched nor on which finished rows have been dropped.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.config import SamplingConfig
from equipoise.policy.decode import StaticDecoder
from equipoise.policy.draw import Guide, GuideState, draw
from equipoise.policy.graphs import round_up
from equipoise.policy.load import Policy
from equipoise.policy.plain import PlainReader, cache_argument
from equipoise.policy.rollout import Rollout
from equipoise.runs.ranks import Ranks


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

    Raises NonFiniteLogits. On a GPU `decode` does the same from CUDA graphs; what follows here is the plain twin.
    """
    assert (generator is None) != (uniform_BT is None), "one source of random numbers"
    device, steps = policy.device, config.max_new_tokens
    if uniform_BT is None:
        uniform_BT = torch.rand(len(prompts), steps, generator=generator, dtype=torch.float64)
    uniform_BT = uniform_BT.to(device)
    static = policy.graphs.enabled and policy.model.config._attn_implementation == TRIE_ATTENTION
    if static and policy.ways.shared and _fits(policy, prompts, steps):
        return sample_static(policy, prompts, config, uniform_BT, guide)
    state = guide.open(len(prompts)) if guide is not None else None
    if state is not None:
        state.start(prompts)
    reader = _reader(policy, prompts, steps)
    tokens_BT, taken_B, finished_B = _decode_plainly(policy, reader, config, uniform_BT, state)
    report = state.report() if state is not None else {}
    return Rollout([list(p) for p in prompts], tokens_BT, taken_B, finished_B, report)


def sample_dealt(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    config: SamplingConfig,
    generator: torch.Generator,
    ranks: Ranks,
) -> Rollout:
    """`sample` in pieces of neighbouring rows, dealt out to the ranks; all of it, on the CPU, on every one of them. All
    draw everybody's random numbers, so that their generators stay alike.

    Raises NonFiniteLogits, on all where one does.
    """
    uniform_BT = torch.rand(len(prompts), config.max_new_tokens, generator=generator, dtype=torch.float64)

    def written(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = [prompts[i] for i in rows.tolist()]
        rollout = sample(policy, own, config, uniform_BT=uniform_BT[rows]).cpu()
        return rollout.tokens_BT, rollout.lengths_B, rollout.finished_B

    pieces = [rows for rows in ranks.runs(torch.arange(len(prompts))) if len(rows)]
    tokens, lengths, finished = zip(*ranks.deal(pieces, written), strict=True)
    return Rollout([list(p) for p in prompts], torch.cat(tokens), torch.cat(lengths), torch.cat(finished))


def _fits(policy: Policy, prompts: Sequence[Sequence[int]], steps: int) -> bool:
    """Whether no row can become longer than those for which the fast ways were compared with the plain one."""
    return max(map(len, prompts)) + steps <= policy.ways.tokens


def _reader(policy: Policy, prompts: Sequence[Sequence[int]], steps: int) -> "SharedReader | PlainReader":
    fits = _fits(policy, prompts, steps)
    if policy.ways.shared and fits:
        return SharedReader(policy, prompts)
    return PlainReader(policy, prompts, cached=policy.ways.cached and fits)


class SharedReader:
    """B rows that have read their prompts of at most P tokens, and go on a token at a time.

    `logits_BV`: of the next token. Each distinct prompt is run once and its cache copied to its rows; `mask_BP` says
    where a row's cache holds a token.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]]) -> None:
        device = policy.device
        distinct = sorted({tuple(p) for p in prompts})
        place = {p: i for i, p in enumerate(distinct)}
        prompt_of_B = torch.tensor([place[tuple(p)] for p in prompts], device=device)
        lengths_U = torch.tensor([len(p) for p in distinct], device=device)
        width = int(lengths_U.max())
        ids_UP = torch.tensor([[*p, *[0] * (width - len(p))] for p in distinct], device=device)
        mask_UP = (torch.arange(width, device=device)[None] < lengths_U[:, None]).long()
        cache = DynamicCache(config=policy.model.config)
        self.argument = cache_argument(policy.model)
        logits_UPV = policy.model(
            input_ids=ids_UP,
            attention_mask=mask_UP,
            position_ids=torch.arange(width, device=device).expand_as(ids_UP),
            **{self.argument: cache},
            use_cache=True,
            logits_to_keep=torch.arange(int(lengths_U.min()) - 1, width, device=device),
        ).logits
        logits_UV = logits_UPV[torch.arange(len(distinct), device=device), lengths_U - lengths_U.min()]
        cache.batch_select_indices(prompt_of_B)
        self.policy, self.cache = policy, cache
        self.logits_BV = logits_UV[prompt_of_B]
        self.mask_BP, self.position_B = mask_UP[prompt_of_B], lengths_U[prompt_of_B]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.cache.batch_select_indices(rows)
        self.mask_BP, self.position_B = self.mask_BP[rows], self.position_B[rows]

    def read(self, token_B: Tensor) -> Tensor:
        """(B, V) logits after one more token of each row."""
        self.mask_BP = torch.cat([self.mask_BP, torch.ones_like(self.mask_BP[:, :1])], dim=1)
        logits_BV: Tensor = self.policy.model(
            input_ids=token_B[:, None],
            attention_mask=self.mask_BP,
            position_ids=self.position_B[:, None],
            **{self.argument: self.cache},
            use_cache=True,
        ).logits[:, -1]
        self.position_B = self.position_B + 1
        return logits_BV


def _decode_plainly(
    policy: Policy,
    reader: SharedReader | PlainReader,
    config: SamplingConfig,
    uniform_BT: Tensor,
    state: GuideState | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) tokens, (B,) how many were drawn, (B,) whether the last is a stop token. Raises NonFiniteLogits."""
    logits_BV = reader.logits_BV
    device, steps, count = policy.device, config.max_new_tokens, len(logits_BV)
    stops = torch.tensor(policy.stop_ids, device=device)
    tokens_BT = torch.zeros(count, steps, dtype=torch.long, device=device)
    taken_B = torch.zeros(count, dtype=torch.long, device=device)
    finished_B = torch.zeros(count, dtype=torch.bool, device=device)
    rows = torch.arange(count, device=device)  # which completion each row of the cache belongs to
    for t in range(steps):
        if not bool(logits_BV.isfinite().all()):
            raise NonFiniteLogits(f"non-finite logits while sampling token {t + 1}")
        if state is None:
            token = draw(logits_BV, uniform_BT[rows, t], config)
        else:
            token = state.draw(logits_BV, uniform_BT[rows, t], rows)
        policy.together.share_(token)
        live = ~finished_B[rows]
        tokens_BT[rows, t] = torch.where(live, token, 0)
        taken_B[rows] += live
        finished_B[rows] |= live & torch.isin(token, stops)
        running = torch.nonzero(~finished_B[rows]).squeeze(-1)
        if t + 1 == steps or len(running) == 0:
            break
        if len(running) <= 0.8 * len(rows):  # copying the cache costs as much as carrying a few finished rows along
            reader.keep(running)
            rows, token = rows[running], token[running]
        logits_BV = reader.read(token)
    return tokens_BT, taken_B, finished_B


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
