"""What the policy (or the reference) says of sampled completions: log-probabilities, entropies, values.

Two ways to the same numbers: `padded` runs one row per completion, `packed` one row per batch as a token trie. Results
are flat over the N real completion tokens, row by row (`Rollout.tokens_N` order), in float32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from equipoise.policy import trie
from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout


class Scores(NamedTuple):
    """Each (N,) float32: log-probability of the token in nats, entropy of its distribution in nats, predicted return."""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor


def token_logprobs(logits_UV: Tensor, rows_N: Tensor, tokens_N: Tensor, temperature: float) -> Tensor:
    """(N,) log-probability of token n under row `rows_N[n]` of the logits, in float32.

    Logits are divided by the temperature, as in the sampler: the policy being optimised *is* the tempered one.
    """
    logits_UV = logits_UV.float() / temperature
    return logits_UV[rows_N, tokens_N] - torch.logsumexp(logits_UV, dim=-1)[rows_N]


def entropies(logits_UV: Tensor, temperature: float) -> Tensor:
    """(U,) entropy in nats of each row's distribution. A token masked to −inf counts 0, not nan."""
    log_p_UV = torch.log_softmax(logits_UV.float() / temperature, dim=-1)
    log_p_UV = log_p_UV.clamp(min=torch.finfo(torch.float32).min)  # 0 · −inf is nan, in the gradient too
    return -(log_p_UV.exp() * log_p_UV).sum(-1)


def score(
    policy: Policy, rollout: Rollout, temperature: float, *, packed: bool, reference: bool = False, entropy: bool = True
) -> Scores:
    """Score every completion token. `reference` uses the frozen model; `entropy=False` leaves zeros there.

    Gradients flow when grad mode is on. Raises nothing: a non-finite model gives non-finite scores, which the caller tests.
    """
    run = _packed if packed else _padded
    with policy.as_reference(reference) as model:
        logits_UV, hidden_UH, rows_N = run(policy, model, rollout)
    tokens_N = rollout.tokens_N.to(logits_UV.device)
    logprobs_N = token_logprobs(logits_UV, rows_N, tokens_N, temperature)
    entropy_N = entropies(logits_UV, temperature)[rows_N] if entropy else torch.zeros_like(logprobs_N)
    return Scores(logprobs_N, entropy_N, policy.value(hidden_UH)[rows_N])


def _packed(policy: Policy, model: Any, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    packed = trie.build(rollout.prompts, rollout.completions()).to(policy.device)
    # Samples of one prompt share the node that predicts their first token: its logits are computed once.
    nodes_U, rows_N = torch.unique(packed.predictors_N, return_inverse=True)
    if model.config._attn_implementation == TRIE_ATTENTION:
        attention = {"attention_mask": None, "paths_RL": packed.paths_RL, "places_M": packed.places_M}
    else:
        mask_MM = torch.zeros(len(packed.tokens_M), len(packed.tokens_M), dtype=policy.dtype, device=policy.device)
        mask_MM.masked_fill_(~packed.attends(), torch.finfo(policy.dtype).min)
        attention = {"attention_mask": mask_MM[None, None]}
    logits, hidden = policy.forward(
        model,
        input_ids=packed.tokens_M[None],
        position_ids=packed.depths_M[None],
        logits_to_keep=nodes_U,
        **attention,
    )
    return logits[0], hidden[0], rows_N


def _padded(policy: Policy, model: torch.nn.Module, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    rows = [list(p) + c for p, c in zip(rollout.prompts, rollout.completions(), strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=policy.device)
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    attention_mask = (torch.arange(width, device=policy.device)[None] < lengths[:, None]).long()
    positions = torch.arange(width, device=policy.device).expand_as(input_ids)
    logits, hidden = policy.forward(
        model, input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, logits_to_keep=0
    )
    # The token at place p+t is predicted at place p+t−1, p being the prompt's length.
    row_N, step_N = torch.nonzero(rollout.mask_BT.to(policy.device), as_tuple=True)
    prompt_lengths = torch.tensor([len(p) for p in rollout.prompts], device=policy.device)
    place_N = prompt_lengths[row_N] + step_N - 1
    return logits[row_N, place_N], hidden[row_N, place_N], torch.arange(len(row_N), device=policy.device)
