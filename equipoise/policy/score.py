"""What the policy (or the reference) says of sampled completions: log-probabilities, entropies, values.

Ways to the same numbers: `padded` runs one row per completion, `packed` one row per batch as a token trie, replayed
from a CUDA graph where there is a GPU; where neither suits the model, `plain` runs rows of one length together. Results
are flat over the N real completion tokens, row by row (`Rollout.tokens_N` order), in float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from equipoise.policy import plain, trie
from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.config import SamplingConfig
from equipoise.policy.draw import weights
from equipoise.policy.graphs import round_up, sent
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.policy.rooms import Room, bucket


class Scores(NamedTuple):
    """Each (N,) float32: log-probability of the token in nats, entropy of its distribution in nats, predicted
    return, and KL of its distribution to the reference's in nats, 0 unless it was asked for."""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor
    kl: Tensor


class Pack(NamedTuple):
    """A rollout as one trie: see `trie.Trie`, then the N tokens that are predicted. All on one device.

    For CUDA graphs M, N and L are padded: spare nodes lie in a place no row uses, spare tokens are predicted at node 0
    and not real.
    """

    tokens_M: Tensor
    depths_M: Tensor
    ends_M: Tensor
    places_M: Tensor
    paths_RL: Tensor
    predictors_N: Tensor
    targets_N: Tensor
    real_N: Tensor


def room_for(rollouts: Sequence[Rollout]) -> Room:
    """Room for the largest of them, so that all are of one shape."""
    needs = []
    for part in rollouts:
        nodes = len(trie.build(part.prompts, part.completions()).tokens_M)
        width = max(map(len, part.prompts)) + part.tokens_BT.shape[1]
        needs.append((bucket(nodes), bucket(int(part.lengths_B.sum())), round_up(width, 8)))
    return Room(*map(max, zip(*needs, strict=True)))


def pack(
    policy: Policy, rollout: Rollout, padded: bool | None = None, room: Room | None = None, once: bool = False
) -> Pack:
    """Lay a rollout out for `packed` scoring; padded for CUDA graphs by default where there are any: to `room`, or to
    one of the policy's that has room for it, or where it is seen but `once` to what it needs itself."""
    padded = policy.graphs.enabled if padded is None else padded
    width = round_up(max(map(len, rollout.prompts)) + rollout.tokens_BT.shape[1], 8) if padded else 0
    width = room.width if padded and room is not None else width
    made = trie.build(rollout.prompts, rollout.completions(), width)
    targets_N = rollout.tokens_N.cpu()
    if padded and room is None:
        room = Room(bucket(len(made.tokens_M)), bucket(len(targets_N)), width)
        room = room if once else policy.rooms.take(len(rollout), room, rollout.tokens_BT.numel())
        if room.width > width:
            width = room.width
            made = trie.build(rollout.prompts, rollout.completions(), width)
    parts = [made.tokens_M, made.depths_M, made.ends_M, made.places_M, made.paths_RL, made.predictors_N, targets_N]
    real_N = torch.ones(len(targets_N), dtype=torch.bool)
    if padded and room is not None:
        nodes, tokens = room.nodes, room.tokens
        sizes = [nodes, nodes, nodes, nodes, width, tokens, tokens]
        # No row reaches the last column, so a spare node that is put there gets no gradient and spoils none.
        spare = [0, 0, 0, width - 1, 0, 0, 0]
        parts = [pad(x, (0, n - x.shape[-1]), value=v) for x, n, v in zip(parts, sizes, spare, strict=True)]
        real_N = pad(real_N, (0, tokens - len(real_N)))
    return Pack(*sent([*parts, real_N], policy.device))


def token_logprobs(logits_NV: Tensor, tokens_N: Tensor, temperature: float) -> Tensor:
    """(N,) log-probability of token n under row n of the logits, in float32.

    Logits are divided by the temperature, as in the sampler: the policy being optimised *is* the tempered one.
    """
    logits_NV = logits_NV.float() / temperature
    return logits_NV.gather(-1, tokens_N[:, None]).squeeze(-1) - torch.logsumexp(logits_NV, dim=-1)


def entropies(logits_NV: Tensor, temperature: float) -> Tensor:
    """(N,) entropy in nats of each row's distribution. A token masked to −inf counts 0, not nan."""
    log_p_NV = torch.log_softmax(logits_NV.float() / temperature, dim=-1)
    log_p_NV = log_p_NV.clamp(min=torch.finfo(torch.float32).min)  # 0 · −inf is nan, in the gradient too
    return -(log_p_NV.exp() * log_p_NV).sum(-1)


def exact_kl(logits_NV: Tensor, reference_NV: Tensor, temperature: float) -> Tensor:
    """(N,) KL in nats of each row's distribution to the reference's, over the whole vocabulary: the expectation of
    log π − log π_ref over the next token (Rao-Blackwellised: A. Amini, T. Vieira and R. Cotterell 2025, "Better
    Estimation of the KL Divergence Between Language Models"). A token masked to −inf in the policy counts 0."""
    least = torch.finfo(torch.float32).min
    log_p_NV = torch.log_softmax(logits_NV.float() / temperature, dim=-1).clamp(min=least)
    log_q_NV = torch.log_softmax(reference_NV.float() / temperature, dim=-1).clamp(min=least)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def score(
    policy: Policy,
    rollout: Rollout,
    temperature: float,
    *,
    packed: bool,
    reference: bool = False,
    entropy: bool = True,
    kl: bool = False,
    recorded: bool = True,
) -> Scores:
    """Score every completion token. `reference` uses the frozen model; `entropy=False` leaves zeros there, and so does
    `kl=False`. The KL has a gradient by the policy, not by the reference. `recorded=False` records no graph, for a
    batch that is seen once. Where the model's numbers are not those of the way that is asked for (`policy.ways`), a
    plainer one is taken.

    Gradients flow when grad mode is on. Raises nothing: a non-finite model gives non-finite scores, which the caller
    tests.
    """
    groups = packs(policy, rollout) if packed else None
    if groups is not None and len(groups) > 1:
        parts = [
            _score_packed(policy, rollout.select(rows), temperature, (reference, entropy, kl), recorded)
            for rows in groups
        ]
        return Scores(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    if groups is not None:
        return _score_packed(policy, rollout, temperature, (reference, entropy, kl), recorded)
    compute, base_NV = _compute(policy, rollout), None
    if kl:
        with torch.no_grad(), policy.as_reference() as model:
            base_NV = compute(policy, model, rollout)[0]
    with policy.as_reference(reference) as model:
        logits_NV, hidden_NH = compute(policy, model, rollout)
    tokens_N = rollout.tokens_N.to(policy.device)
    return _scores(policy, logits_NV, hidden_NH, tokens_N, temperature, entropy, base_NV)


@torch.no_grad()
def nucleus_mass(policy: Policy, rollout: Rollout, sampling: SamplingConfig) -> Tensor:
    """(N,) log of the probability that the policy's nucleus holds where each completion token was drawn, 0 at top-p 1.
    What is sampled from the nucleus has a probability larger by its inverse."""
    if sampling.top_p >= 1:
        return torch.zeros(int(rollout.lengths_B.sum()), device=policy.device)
    groups = packs(policy, rollout)
    if groups is not None:
        parts = [_forward_pack(policy, pack(policy, rollout.select(rows), padded=False), False)[0] for rows in groups]
    else:
        with policy.as_reference(False) as model:
            parts = [_compute(policy, rollout)(policy, model, rollout)[0]]
    rows = [weights(rows_NV, sampling) for part in parts for rows_NV in torch.split(part, 256)]
    return torch.cat([row_NV.sum(-1, dtype=torch.float64).log() for row_NV in rows])


def _compute(policy: Policy, rollout: Rollout) -> Callable[[Policy, Any, Rollout], tuple[Tensor, Tensor]]:
    """How rows that are not packed are computed."""
    return _padded if policy.ways.padded and not _too_long(policy, rollout) else plain.forward


def packs(policy: Policy, rollout: Rollout) -> list[Tensor] | None:
    """The rows of each pack that scores part of the rollout, in order; None where the model's rows must not be
    packed."""
    if not policy.ways.packed or _too_long(policy, rollout):
        return None
    everything = torch.arange(len(rollout))
    return [everything] if math.isinf(policy.ways.nodes) else _cut(rollout, everything, policy.ways.nodes)


def _cut(rollout: Rollout, rows: Tensor, most: float) -> list[Tensor]:
    """Rows in halves of halves, until each part's pack has no more than `most` nodes. A single row is never cut."""
    part = rollout.select(rows)
    if len(rows) == 1 or len(trie.build(part.prompts, part.completions()).tokens_M) <= most:
        return [rows]
    return [group for half in rows.tensor_split(2) for group in _cut(rollout, half, most)]


def _too_long(policy: Policy, rollout: Rollout) -> bool:
    """Whether a row is longer than those for which the ways were compared."""
    if math.isinf(policy.ways.tokens):
        return False
    lengths = rollout.lengths_B.tolist()
    return any(len(p) + n > policy.ways.tokens for p, n in zip(rollout.prompts, lengths, strict=True))


def _score_packed(
    policy: Policy, rollout: Rollout, temperature: float, asked: tuple[bool, bool, bool], recorded: bool
) -> Scores:
    if torch.is_grad_enabled():
        return score_pack(policy, pack(policy, rollout, padded=False), temperature, *asked)
    batch = pack(policy, rollout, once=not recorded)
    key = ("score", temperature, *asked)

    def function(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(score_pack(policy, Pack(*x), temperature, *asked))

    outputs = policy.graphs(key, function, *batch) if recorded else function(*batch)
    n = int(rollout.lengths_B.sum())
    return Scores(*(x[:n].clone() for x in outputs))


def score_pack(
    policy: Policy, batch: Pack, temperature: float, reference: bool, entropy: bool, kl: bool = False
) -> Scores:
    """The same for a pack, spare tokens included. A function of tensors alone, so it can be recorded."""
    base_NV = None
    if kl:
        with torch.no_grad():
            base_NV = _forward_pack(policy, batch, True)[0]
    logits_NV, hidden_NH = _forward_pack(policy, batch, reference)
    return _scores(policy, logits_NV, hidden_NH, batch.targets_N, temperature, entropy, base_NV)


def _forward_pack(policy: Policy, batch: Pack, reference: bool) -> tuple[Tensor, Tensor]:
    """(N, V) logits and (N, H) hidden states at the tokens that predict."""
    with policy.as_reference(reference) as model:
        logits, hidden = policy.forward(
            model,
            input_ids=batch.tokens_M[None],
            position_ids=batch.depths_M[None],
            logits_to_keep=batch.predictors_N,
            **_attention(policy, model, batch),
        )
    return logits.squeeze(0), hidden.squeeze(0)  # selecting would fill zeros in, on the way back


def _scores(
    policy: Policy,
    logits_NV: Tensor,
    hidden_NH: Tensor,
    tokens_N: Tensor,
    temperature: float,
    entropy: bool,
    base_NV: Tensor | None,
) -> Scores:
    values_N = policy.value(hidden_NH)
    kl_N = torch.zeros_like(values_N) if base_NV is None else exact_kl(logits_NV, base_NV, temperature)
    if logits_NV.is_cuda:
        from equipoise.policy.kernels import vocabulary

        return Scores(*vocabulary.logprobs(logits_NV, tokens_N, temperature, entropy), values_N, kl_N)
    logprobs_N = token_logprobs(logits_NV, tokens_N, temperature)
    entropy_N = entropies(logits_NV, temperature) if entropy else torch.zeros_like(logprobs_N)
    return Scores(logprobs_N, entropy_N, values_N, kl_N)


def _attention(policy: Policy, model: Any, batch: Pack) -> dict[str, Any]:
    if model.config._attn_implementation == TRIE_ATTENTION:
        # Any mask of four dimensions keeps transformers from making one of its own.
        unused = torch.zeros(1, 1, 1, 1, device=policy.device)
        return {"attention_mask": unused, "paths_RL": batch.paths_RL, "places_M": batch.places_M}
    size = len(batch.tokens_M)
    # Spare nodes end at 0 and would attend to nothing: each sees itself, whence no softmax over nothing.
    attends_MM = trie.attends(batch.ends_M) | torch.eye(size, dtype=torch.bool, device=policy.device)
    mask_MM = torch.zeros(size, size, dtype=policy.dtype, device=policy.device)
    return {"attention_mask": mask_MM.masked_fill(~attends_MM, torch.finfo(policy.dtype).min)[None, None]}


def _padded(policy: Policy, model: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
    rows = [list(p) + c for p, c in zip(rollout.prompts, rollout.completions(), strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=policy.device)
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    attention_mask = (torch.arange(width, device=policy.device)[None] < lengths[:, None]).long()
    inputs: dict[str, Any] = {"attention_mask": attention_mask}
    if model.config._attn_implementation == TRIE_ATTENTION:  # not every other model takes them; these are the default
        inputs |= {"position_ids": torch.arange(width, device=policy.device).expand_as(input_ids), "logits_to_keep": 0}
    logits, hidden = policy.forward(model, input_ids=input_ids, **inputs)
    # The token at place p+t is predicted at place p+t−1, p being the prompt's length.
    row_N, step_N = torch.nonzero(rollout.mask_BT.to(policy.device), as_tuple=True)
    prompt_lengths = torch.tensor([len(p) for p in rollout.prompts], device=policy.device)
    place_N = prompt_lengths[row_N] + step_N - 1
    return logits[row_N, place_N], hidden[row_N, place_N]
