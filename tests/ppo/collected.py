"""Sentences collected from a tiny model."""

from collections.abc import Sequence
from pathlib import Path

import torch

from equipoise.learning.collect import (
    collect,
)
from equipoise.learning.search import Search
from equipoise.learning.supervised import Example, as_rollout
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.load import Policy, load_policy
from equipoise.policy.prompt import prompt_ids
from equipoise.policy.score import score
from equipoise.protocol.task import PROTOCOL
from tests.default import OCCUPATIONS, PROMPTS

JOBS = OCCUPATIONS[:5]


def load(model: Path, tuning: str = "lora") -> Policy:
    torch.manual_seed(0)
    return load_policy(PolicyConfig(str(model), tuning, dtype="float32", device="cpu"), PROMPTS["raw"])  # type: ignore[arg-type]


def gather(
    policy: Policy, kind: str, *, sentences: int = 48, budget: int = 20_000, seed: int = 0, tokens: int = 12
) -> list[Example]:
    wanted = Search(forced=kind == "forced", sentences=sentences, budget=budget)
    prompts = {job: prompt_ids(policy.tokenizer, PROMPTS["raw"], job, PROTOCOL) for job in JOBS}
    generator = torch.Generator().manual_seed(seed)
    return collect(policy, wanted, PROTOCOL, prompts, SamplingConfig(max_new_tokens=tokens), generator, 64)


def mean_logprob(policy: Policy, examples: Sequence[Example], reference: bool = False) -> float:
    with torch.no_grad():
        return float(score(policy, as_rollout(examples), 1.0, packed=True, reference=reference).logprobs.mean())
