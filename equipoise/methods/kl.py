"""How far a method's distribution is from the base model's: KL in nats per sentence, estimated from sentences.

For a sentence x drawn from the method, log q(x) − log p(x) is an unbiased estimate (k1): q is what the method samples
from under its own prompt, p the base model under the base prompt. Both at temperature 1; q within the method's nucleus,
whose probabilities sum to 1, p without one, which would make it zero somewhere. The sum runs over the tokens of the
completion, the stop token included, or to the limit of new tokens where it was cut off.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from equipoise.errors import UserError
from equipoise.measures.decomposition import outcomes, outcomes_document
from equipoise.methods.completions import Key, all_keys
from equipoise.methods.estimates import mean_over_occupations
from equipoise.methods.prompted import Prompted, uniforms
from equipoise.policy.config import SamplingConfig
from equipoise.policy.likelihood import completion_logprobs
from equipoise.policy.prompt import sentences_of
from equipoise.policy.rollout import rollout_of
from equipoise.policy.sample import sample
from equipoise.protocol.plural import plural
from equipoise.protocol.reward import Event
from equipoise.protocol.task import Task
from equipoise.runs.ranks import ALONE, Ranks

ROWS = 16
"""Sentences that are scored at a time."""


def kl_to_base(
    writer: Prompted, base: Prompted, runs: int, say: Callable[[str], None], ranks: Ranks = ALONE
) -> dict[str, Any]:
    """`kl` as {value, low, high, how}, from `runs` sentences of each occupation, drawn and scored by all ranks, and
    `outcomes` of the very same ones (see `outcomes_of`). Neither model needs to be loaded; both are unloaded
    afterwards. Raises, on all, UserError where the two do not share a vocabulary, and NonFiniteLogits."""
    sampling = SamplingConfig(1.0, writer.sampling.top_p, writer.sampling.max_new_tokens)
    keys = all_keys(runs, writer.task.names)
    writer.load(say, ranks)
    assert writer.policy is not None
    tokenizer = writer.policy.tokenizer
    drawn = writer.in_batches(keys, lambda part: _draw(writer, part, sampling), say, ranks)
    prompts = [writer.prompts[key.occupation] for key in keys]
    log_q = completion_logprobs(writer.policy, prompts, drawn, ROWS, ranks, sampling)
    rollout, named = rollout_of([[]] * len(keys), drawn), [key.occupation for key in keys]
    texts = dict(zip(keys, sentences_of(tokenizer, rollout, named, writer.task), strict=True))
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
    within = "" if sampling.top_p == 1 else ", q being what is within"
    kl = {
        **mean_over_occupations(differences),
        "how": f"k1: mean of log q − log p over {plural(len(keys), 'sentence')} of the method, {runs} of each "
        f"occupation, drawn at temperature 1 and top-p {sampling.top_p:g}{within}; p is {base.name} under the prompt "
        f"{base.prompt.name}; 95 % normal interval, stratified by occupation",
    }
    return {"kl": kl, "outcomes": outcomes_of(texts, differences, writer.task)}


def outcomes_of(texts: Mapping[Key, str], log_ratios: Mapping[Key, float], task: Task) -> dict[str, Any]:
    """For each event what the sentences come to, pair by pair, as `decomposition.split` takes it."""
    events: tuple[Event, ...] = ("both", "strict")
    return {
        event: outcomes_document(
            outcomes(
                (task.match(text).first if task.complies(text, event) else None, log_ratios[key])
                for key, text in texts.items()
            )
        )
        for event in events
    }


def _draw(writer: Prompted, keys: Sequence[Key], sampling: SamplingConfig) -> list[list[int]]:
    """The token ids of a completion for each key."""
    assert writer.policy is not None
    uniform_BT = uniforms(f"{writer.seed}/kl", keys, sampling.max_new_tokens)
    prompts = [writer.prompts[key.occupation] for key in keys]
    return sample(writer.policy, prompts, sampling, uniform_BT=uniform_BT).completions()
