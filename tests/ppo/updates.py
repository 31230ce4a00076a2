"""Updates of a tiny policy by experience made up for it."""

import torch
from torch import Tensor

from equipoise.learning.optimizer import MasterAdam
from equipoise.policy.attention import TRIE_ATTENTION
from equipoise.policy.config import SamplingConfig
from equipoise.policy.load import Policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.sample import sample
from equipoise.policy.score import score
from equipoise.policy.ways import Ways
from equipoise.ppo.config import PPOConfig
from equipoise.ppo.experience import Experience
from equipoise.ppo.update import Update, UpdateStats
from tests.tiny import bare_policy, perturb

PROMPTS = [[1, 2, 3], [4], [1, 2, 3], [2, 2], [4], [1, 2], [3], [1, 2, 3]]
CONFIG = PPOConfig(batch_size=8, mini_batch_size=4, micro_batch_size=4, ppo_epochs=2, target_kl=1e9, max_grad_norm=1e9)
ALL = [torch.arange(8)]


def update(
    policy: Policy,
    optimizer: MasterAdam,
    experience: Experience,
    batches: list[torch.Tensor],
    config: PPOConfig,
    temperature: float,
    *,
    packed: bool,
    limit: RowLimit | None = None,
) -> UpdateStats:
    limit = limit or RowLimit(config.micro_batch_size)
    return Update(policy, optimizer, experience, batches, config, temperature, packed, limit).finish()


def policy_of(lora: bool = False) -> Policy:
    return perturb(bare_policy(stops=(0, 3), attention=TRIE_ATTENTION, lora=lora), 0.1)


def experience_of(policy: Policy, *, drift: float = 0.0, seed: int = 0) -> Experience:
    """A batch the policy sampled, with made-up advantages and returns. `drift`: how far the policy has moved since."""
    rollout = sample(policy, PROMPTS, SamplingConfig(max_new_tokens=6), torch.Generator().manual_seed(seed))
    mask, generator = rollout.mask_BT, torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        scores = score(policy, rollout, 1.0, packed=False)

    def spread(flat: Tensor) -> Tensor:
        return torch.zeros(mask.shape).masked_scatter(mask, flat)

    def noise() -> Tensor:
        return torch.where(mask, torch.randn(mask.shape, generator=generator), 0.0)

    values = spread(scores.values)
    experience = Experience(rollout, spread(scores.logprobs), values, values + 0.5 * noise(), noise())
    if drift:
        perturb(policy, drift, seed=5)
    return experience


def optimizer_of(policy: Policy, lr: float = 1e-3) -> MasterAdam:
    optimizer = MasterAdam(policy.trained(), betas=(0.9, 0.999), eps=1e-5)
    optimizer.set_learning_rates(lr, lr)
    return optimizer


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.trained().items()}


def gradient_of(
    experience: Experience,
    rows: Tensor,
    config: PPOConfig = CONFIG,
    *,
    packed: bool = True,
    lora: bool = False,
    ways: Ways | None = None,
) -> dict[str, Tensor]:
    """The gradient that an optimizer step on these rows would use."""
    policy = policy_of(lora)
    policy.ways = ways or Ways()
    optimizer = optimizer_of(policy)
    stats = update(policy, optimizer, experience, [rows], config, 1.0, packed=packed)
    assert stats.updates == 1
    # After one step Adam's first moment is a tenth of the gradient, which nothing here clips.
    return {n.removesuffix(".exp_avg"): 10 * x for n, x in optimizer.state()[1].items() if n.endswith(".exp_avg")}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm()) <= 2e-5 * float(tensor.norm()) + 1e-7, name
