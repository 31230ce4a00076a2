"""Warm start: a short supervised stage on sentences the model wrote itself under the constraint, before PPO.

Where compliance is rare PPO has next to nothing to learn from in its first steps. These sentences show the policy what
is paid for without leaving the model's own language: samples that happen to comply, or continuations of forced terms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from equipoise.errors import UserError
from equipoise.policy.load import Policy
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import SamplingConfig, sample
from equipoise.policy.score import score
from equipoise.ppo.optimizer import MasterAdam
from equipoise.protocol.lexicon import LEXICON
from equipoise.protocol.prompts import sentence
from equipoise.protocol.reward import strict_success

FEWEST = 16
"""Sentences of one optimizer step, and so the fewest worth learning from."""


@dataclass(frozen=True)
class WarmStartConfig:
    warm_start: Literal["off", "forced", "samples"] = "off"
    """`forced` begins each sentence with one agentic and one communal term, every pair alike, and lets the model go on;
    `samples` keeps those of its free samples that comply, unchanged but rare."""
    warm_start_sentences: int = 256
    """Distinct sentences to learn from."""
    warm_start_epochs: int = 2
    warm_start_learning_rate: float = 1e-4
    warm_start_budget: int = 20_000
    """Samples drawn at most in search of them."""

    def __post_init__(self) -> None:
        if self.warm_start_sentences < FEWEST:
            raise UserError(f"warm-start-sentences {self.warm_start_sentences} must be at least {FEWEST}")
        if self.warm_start_epochs < 1 or self.warm_start_learning_rate <= 0:
            raise UserError(
                f"warm-start-epochs {self.warm_start_epochs} must be at least 1 and warm-start-learning-rate "
                f"{self.warm_start_learning_rate} above 0: --warm-start off leaves the stage out"
            )


class Example(NamedTuple):
    occupation: str
    prompt: list[int]
    completion: list[int]
    text: str


def collect(
    policy: Policy,
    config: WarmStartConfig,
    prompts: dict[str, list[int]],
    sampling: SamplingConfig,
    generator: torch.Generator,
    batch_size: int,
) -> list[Example]:
    """Strictly successful sentences, each once. `prompts` maps occupations to token ids.

    Raises UserError when the budget ends with fewer than `FEWEST`.
    """
    examples: dict[str, Example] = {}
    occupations = sorted(prompts)
    pairs = [(a, c) for a in LEXICON.agentic for c in LEXICON.communal]
    order = torch.randperm(2 * len(pairs) * len(occupations), generator=generator).tolist()
    drawn = 0
    while len(examples) < config.warm_start_sentences and drawn < config.warm_start_budget:
        chosen, forced = [], []
        for number in range(drawn, drawn + batch_size):
            case = order[number % len(order)]
            chosen.append(occupations[case % len(occupations)])
            agentic, communal = pairs[case // len(occupations) % len(pairs)]
            terms = (agentic, communal) if case // len(occupations) < len(pairs) else (communal, agentic)
            text = f" {terms[0]} and {terms[1]}" if config.warm_start == "forced" else ""
            forced.append(list(policy.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else [])
        starts = [prompts[o] + f for o, f in zip(chosen, forced, strict=True)]
        rollout = sample(policy, starts, sampling, generator)
        drawn += batch_size
        finished = rollout.finished_B.tolist()
        for occupation, start, tokens, done in zip(chosen, forced, rollout.completions(), finished, strict=True):
            completion = start + tokens
            text = sentence(occupation, policy.tokenizer.decode(completion, skip_special_tokens=True))
            if done and strict_success(text):
                examples.setdefault(text, Example(occupation, prompts[occupation], completion, text))
    if len(examples) < FEWEST:
        raise UserError(
            f"the warm start found {len(examples)} sentences in {drawn} samples and needs at least {FEWEST}: "
            "use --warm-start forced, raise --warm-start-budget, or leave it off"
        )
    return list(examples.values())[: config.warm_start_sentences]


def as_rollout(examples: Sequence[Example]) -> Rollout:
    width = max(len(e.completion) for e in examples)
    tokens = torch.tensor([e.completion + [0] * (width - len(e.completion)) for e in examples])
    lengths = torch.tensor([len(e.completion) for e in examples])
    return Rollout([e.prompt for e in examples], tokens, lengths, torch.ones(len(examples), dtype=torch.bool))


def supervise(
    policy: Policy,
    examples: Sequence[Example],
    config: WarmStartConfig,
    generator: torch.Generator,
    *,
    packed: bool,
    say: Callable[[str], None],
) -> None:
    """Minimise the token-mean cross-entropy of the completions, `FEWEST` at a time, with an optimizer of its own."""
    optimizer = MasterAdam(policy.trained(), betas=(0.9, 0.999), eps=1e-8)
    optimizer.set_learning_rates(config.warm_start_learning_rate, 0.0)
    for epoch in range(config.warm_start_epochs):
        total, count = 0.0, 0
        for rows in torch.randperm(len(examples), generator=generator).split(FEWEST):
            part = as_rollout([examples[i] for i in rows.tolist()])
            logprobs = score(policy, part, 1.0, packed=packed, entropy=False).logprobs
            (-logprobs.mean()).backward()
            optimizer.step(1.0)
            total, count = total - float(logprobs.detach().sum()), count + len(logprobs)
        say(f"warm start: epoch {epoch + 1} of {config.warm_start_epochs}, {total / count:.3f} nats per token")
