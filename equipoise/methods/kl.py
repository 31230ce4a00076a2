"""How far a method's distribution is from the base model's: KL in nats per sentence, estimated from sentences.

For a sentence x drawn from the method, log q(x) − log p(x) is an unbiased estimate (k1): q is what the method samples
from under its own prompt, p the base model under the base prompt. Both at temperature 1 and without a nucleus, which
would make p zero somewhere; the sum runs over the tokens of the completion, the stop token included, or to the limit of
new tokens where it was cut off.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from equipoise.errors import UserError
from equipoise.methods.completions import Key, all_keys
from equipoise.methods.estimates import mean_over_occupations
from equipoise.methods.prompted import Prompted, uniforms
from equipoise.policy.config import SamplingConfig
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import sample
from equipoise.policy.score import score

ROWS = 16
"""Sentences that are scored at a time."""


def kl_to_base(writer: Prompted, base: Prompted, runs: int, say: Callable[[str], None]) -> dict[str, Any]:
    """{value, low, high, how}, from `runs` sentences of each occupation. Neither model needs to be loaded; both are
    unloaded afterwards. Raises UserError where the two do not share a vocabulary, NonFiniteLogits."""
    sampling = SamplingConfig(1.0, 1.0, writer.sampling.max_new_tokens)
    keys = all_keys(runs)
    if writer.policy is None:
        writer.load()
    assert writer.policy is not None
    tokenizer = writer.policy.tokenizer
    rollouts = writer.in_parts(keys, lambda part: [_draw(writer, part, sampling)], say)
    # Cut anew, so that the parts do not depend on how much memory there was to draw them.
    drawn = [row for rollout in rollouts for row in rollout.completions()]
    log_q = _logprobs(writer.policy, [writer.prompts[key.occupation] for key in keys], drawn)
    if base.settings["weights"] == writer.settings["weights"]:
        base.policy = writer.policy
    else:
        writer.unload()
        base.load()
    assert base.policy is not None
    if base.policy.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{base.name} has another vocabulary than {writer.name}, so their sentences cannot be compared")
    log_p = _logprobs(base.policy, [base.prompts[key.occupation] for key in keys], drawn)
    writer.unload()
    base.unload()
    differences = {key: q - p for key, q, p in zip(keys, log_q, log_p, strict=True)}
    return {
        **mean_over_occupations(differences),
        "how": f"k1: mean of log q − log p over {len(keys)} sentences of the method, {runs} of each occupation, drawn "
        f"at temperature 1 and top-p 1; p is {base.name} under the prompt {base.prompt.name}; 95 % normal interval, "
        "stratified by occupation",
    }


def _draw(writer: Prompted, keys: Sequence[Key], sampling: SamplingConfig) -> Rollout:
    assert writer.policy is not None
    uniform_BT = uniforms(f"{writer.seed}/kl", keys, sampling.max_new_tokens)
    return sample(writer.policy, [writer.prompts[k.occupation] for k in keys], sampling, uniform_BT=uniform_BT).cpu()


@torch.no_grad()
def _logprobs(policy: Policy, prompts: Sequence[Sequence[int]], completions: Sequence[list[int]]) -> list[float]:
    """Log-probability of each completion after its prompt, in nats."""
    sums = [0.0] * len(prompts)
    # Rows of one prompt together: a pack holds it once, and `require` is three times as long as what is scored.
    order = sorted(range(len(prompts)), key=lambda i: list(prompts[i]))
    for first in range(0, len(order), ROWS):
        rows = order[first : first + ROWS]
        part = [completions[i] for i in rows]
        lengths_B = torch.tensor([len(c) for c in part])
        tokens_BT = torch.zeros(len(part), int(lengths_B.max()), dtype=torch.long)
        for row, completion in zip(tokens_BT, part, strict=True):
            row[: len(completion)] = torch.tensor(completion)
        rollout = Rollout([prompts[i] for i in rows], tokens_BT, lengths_B, torch.ones(len(part), dtype=torch.bool))
        # On a GPU every new shape would be recorded as a graph for a single use.
        packed = not policy.graphs.enabled
        flat = score(policy, rollout, 1.0, packed=packed, entropy=False).logprobs.double().cpu()
        for i, logprobs in zip(rows, flat.split(lengths_B.tolist()), strict=True):
            sums[i] = float(logprobs.sum())
    return sums
