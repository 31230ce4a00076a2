"""How far a method's distribution is from the base model's: KL in nats per sentence, estimated from sentences.

For a sentence x drawn from the method, log q(x) − log p(x) is an unbiased estimate (k1): q is what the method samples
from under its own prompt, p the base model under the base prompt. Both at temperature 1 and without a nucleus, which
would make p zero somewhere; the sum runs over the tokens of the completion, the stop token included, or to the limit of
new tokens where it was cut off.
"""

from collections.abc import Callable, Sequence
from typing import Any

from equipoise.errors import UserError
from equipoise.methods.completions import Key, all_keys
from equipoise.methods.estimates import mean_over_occupations
from equipoise.methods.prompted import Prompted, uniforms
from equipoise.policy.config import SamplingConfig
from equipoise.policy.likelihood import completion_logprobs
from equipoise.policy.sample import sample
from equipoise.protocol.plural import plural
from equipoise.runs.ranks import ALONE, Ranks

ROWS = 16
"""Sentences that are scored at a time."""


def kl_to_base(
    writer: Prompted, base: Prompted, runs: int, say: Callable[[str], None], ranks: Ranks = ALONE
) -> dict[str, Any]:
    """{value, low, high, how}, from `runs` sentences of each occupation, drawn and scored by all ranks. Neither model
    needs to be loaded; both are unloaded afterwards. Raises, on all, UserError where the two do not share a vocabulary,
    and NonFiniteLogits."""
    sampling = SamplingConfig(1.0, 1.0, writer.sampling.max_new_tokens)
    keys = all_keys(runs, writer.task.names)
    writer.load(say, ranks)
    assert writer.policy is not None
    tokenizer = writer.policy.tokenizer
    drawn = writer.in_batches(keys, lambda part: _draw(writer, part, sampling), say, ranks)
    log_q = completion_logprobs(writer.policy, [writer.prompts[key.occupation] for key in keys], drawn, ROWS, ranks)
    if base.settings["weights"] == writer.settings["weights"]:
        base.policy = writer.policy
    else:
        writer.unload()
        base.load(say, ranks)
    assert base.policy is not None
    if base.policy.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{base.name} has another vocabulary than {writer.name}, so their sentences cannot be compared")
    log_p = completion_logprobs(base.policy, [base.prompts[key.occupation] for key in keys], drawn, ROWS, ranks)
    writer.unload()
    base.unload()
    differences = {key: q - p for key, q, p in zip(keys, log_q, log_p, strict=True)}
    return {
        **mean_over_occupations(differences),
        "how": f"k1: mean of log q − log p over {plural(len(keys), 'sentence')} of the method, {runs} of each "
        "occupation, drawn "
        f"at temperature 1 and top-p 1; p is {base.name} under the prompt {base.prompt.name}; 95 % normal interval, "
        "stratified by occupation",
    }


def _draw(writer: Prompted, keys: Sequence[Key], sampling: SamplingConfig) -> list[list[int]]:
    """The token ids of a completion for each key."""
    assert writer.policy is not None
    uniform_BT = uniforms(f"{writer.seed}/kl", keys, sampling.max_new_tokens)
    prompts = [writer.prompts[key.occupation] for key in keys]
    return sample(writer.policy, prompts, sampling, uniform_BT=uniform_BT).completions()
