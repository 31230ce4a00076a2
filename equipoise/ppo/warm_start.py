"""Warm start: a short supervised stage on sentences the model wrote itself under the constraint, before PPO.

Where compliance is rare PPO has next to nothing to learn from in its first steps. These sentences show the policy what
is paid for without leaving the model's own language: samples that happen to comply, or continuations of forced terms.
They may also come from a file, such as the sentences of another method.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from equipoise.errors import UserError
from equipoise.policy.load import Policy
from equipoise.policy.sample import SamplingConfig, sample
from equipoise.ppo.supervised import BATCH, Example, examples_of, read_rows, supervise
from equipoise.protocol.lexicon import LEXICON
from equipoise.protocol.prompts import sentence
from equipoise.protocol.reward import strict_success


@dataclass(frozen=True)
class WarmStartConfig:
    warm_start: Literal["off", "forced", "samples"] = "off"
    """`forced` begins each sentence with one agentic and one communal term, every pair alike, and lets the model go on;
    `samples` keeps those of its free samples that comply, unchanged but rare."""
    warm_start_file: str = ""
    """Take the sentences from this completions file instead, of any method: those that succeed strictly."""
    warm_start_sentences: int = 256
    """Distinct sentences to learn from."""
    warm_start_epochs: int = 2
    warm_start_learning_rate: float = 1e-4
    warm_start_budget: int = 20_000
    """Samples drawn at most in search of them."""

    @property
    def wanted(self) -> bool:
        return self.warm_start != "off" or bool(self.warm_start_file)

    def __post_init__(self) -> None:
        if self.warm_start != "off" and self.warm_start_file:
            raise UserError(
                f"--warm-start {self.warm_start} makes sentences and --warm-start-file {self.warm_start_file} has "
                "them: give one of the two"
            )
        if self.warm_start_sentences < BATCH:
            raise UserError(f"warm-start-sentences {self.warm_start_sentences} must be at least {BATCH}")
        if self.warm_start_epochs < 1 or self.warm_start_learning_rate <= 0:
            raise UserError(
                f"warm-start-epochs {self.warm_start_epochs} must be at least 1 and warm-start-learning-rate "
                f"{self.warm_start_learning_rate} above 0: --warm-start off leaves the stage out"
            )


def collect(
    policy: Policy,
    config: WarmStartConfig,
    prompts: dict[str, list[int]],
    sampling: SamplingConfig,
    generator: torch.Generator,
    batch_size: int,
) -> list[Example]:
    """Strictly successful sentences, each once. `prompts` maps occupations to token ids.

    Raises UserError when the budget ends with fewer than `BATCH`.
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
    if len(examples) < BATCH:
        raise UserError(
            f"the warm start found {len(examples)} sentences in {drawn} samples and needs at least {BATCH}: "
            "use --warm-start forced, raise --warm-start-budget, or leave it off"
        )
    return list(examples.values())[: config.warm_start_sentences]


def read(
    path: Path, policy: Policy, config: WarmStartConfig, prompts: dict[str, list[int]], generator: torch.Generator
) -> list[Example]:
    """Strictly successful sentences of a completions file, each once, at most `config.warm_start_sentences`.

    Raises UserError for a file that is none, and for fewer than `BATCH` sentences.
    """
    found = examples_of(read_rows(path), policy.tokenizer, prompts, policy.stop_ids, "strict")
    examples = list({example.text: example for example in found.examples}.values())
    if len(examples) < BATCH:
        raise UserError(
            f"the warm start can learn from {len(examples)} sentences of {path} and needs at least {BATCH} "
            f"({found.describe()}): give another --warm-start-file"
        )
    chosen = torch.randperm(len(examples), generator=generator)[: config.warm_start_sentences]
    return [examples[i] for i in chosen.tolist()]


def warm_start(
    policy: Policy,
    config: WarmStartConfig,
    prompts: dict[str, list[int]],
    sampling: SamplingConfig,
    generator: torch.Generator,
    batch_size: int,
    *,
    packed: bool,
    say: Callable[[str], None],
) -> None:
    """The whole stage: find the sentences, learn from them. Raises UserError; NonFiniteError."""
    if config.warm_start_file:
        examples = read(Path(config.warm_start_file), policy, config, prompts, generator)
    else:
        examples = collect(policy, config, prompts, sampling, generator, batch_size)
    supervise(
        policy, examples, generator, epochs=config.warm_start_epochs, learning_rate=config.warm_start_learning_rate,
        packed=packed, say=lambda line: say(f"warm start: {line}"),
    )  # fmt: skip
