"""What the processes of `test_ranks` do, alone or under torchrun: `python -m tests.gpu.members WORK FOLDER SHAPE LAYERS
DTYPE`. What they came to is written into the folder, under the number of processes and the rank."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from equipoise.policy import shapes
from equipoise.policy.config import PolicyConfig, SamplingConfig
from equipoise.policy.load import Policy, load_policy
from equipoise.policy.memory import RowLimit
from equipoise.policy.prompt import render_prompts
from equipoise.policy.rollout import Rollout
from equipoise.policy.sample import sample
from equipoise.policy.score import score
from equipoise.policy.verify import settle
from equipoise.ppo.config import PPOConfig, TrainConfig
from equipoise.ppo.experience import Experience
from equipoise.ppo.state import State
from equipoise.ppo.step import ppo_step
from equipoise.ppo.training import Training, new_optimizer
from equipoise.ppo.update import Update
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.ranks import Ranks, joined

STEPS = 20


def made(config: TrainConfig, ranks: Ranks) -> Training:
    """A policy with adapters that do something, the same on all ranks."""
    torch.manual_seed(0)
    policy = load_policy(config.policy, PROTOCOL.prompt("describe"), ranks)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # zeros would hide the adapters
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    prompts = render_prompts(policy.tokenizer, PROTOCOL.prompt("describe"), PROTOCOL, "").ids
    settle(policy, list(prompts.values()), config.sampling.max_new_tokens)
    state = State.begin(config, RowLimit(config.ppo.micro_batch_size))
    training = Training(config, policy, new_optimizer(config, policy, ranks), state, prompts, ranks=ranks)
    return training


def recorded(folder: Path, policy: Policy, prompts: list[list[int]]) -> Rollout:
    """A rollout, sampled by whoever comes first."""
    path = folder / "rollout.safetensors"
    if not path.exists():
        drawn = sample(policy, prompts, SamplingConfig(), torch.Generator().manual_seed(2)).cpu()
        save_file({"tokens": drawn.tokens_BT, "lengths": drawn.lengths_B, "finished": drawn.finished_B}, path)
    found = load_file(path)
    return Rollout(prompts, found["tokens"], found["lengths"], found["finished"])


def gradients(folder: Path, training: Training) -> None:
    """The gradient of one mini-batch of 32 recorded completions."""
    policy, optimizer, ranks = training.policy, training.optimizer, training.ranks
    names = list(training.prompts)
    rollout = recorded(folder, policy, [training.prompts[names[i % len(names)]] for i in range(32)])
    old = torch.zeros(rollout.mask_BT.shape)
    with torch.no_grad():
        old[rollout.mask_BT] = score(policy, rollout, 1.0, packed=False).logprobs.cpu()
    ranks.share_(old)
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(3))
    advantages = torch.where(rollout.mask_BT, noise, 0.0)
    experience = Experience(rollout, old, torch.zeros_like(old), advantages, advantages)
    config = PPOConfig(batch_size=32, mini_batch_size=32, micro_batch_size=32, ppo_epochs=1)
    for _ in range(2):  # recorded, then replayed
        optimizer.zero_grad()
        update = Update(policy, optimizer, experience, [torch.arange(32)], config, 1.0, True, RowLimit(32), ranks)
        update.launch()
    save_file({"gradient": optimizer.take().cpu()}, folder / f"gradients-{ranks.size}-{ranks.rank}.safetensors")


def steps(folder: Path, training: Training) -> None:
    """The masters after some steps."""
    for _ in range(STEPS):
        step = ppo_step(training)
        assert step.problem is None, step.problem
    assert step.timings["ranks/size"] == training.ranks.size
    training.ranks.agree(STEPS, training.optimizer.digest())
    weights = {name: tensor.cpu().contiguous() for name, tensor in training.optimizer.state()[0].items()}
    save_file(weights, folder / f"steps-{training.ranks.size}-{training.ranks.rank}.safetensors")


def main(work: str, folder: Path, shape: str, layers: int, dtype: str) -> None:
    shapes.SHAPES[shape]["num_hidden_layers"] = layers
    with joined() as ranks:
        config = TrainConfig(
            prompt="describe",
            policy=PolicyConfig(model=f"shape:{shape}", dtype=dtype),
            ppo=PPOConfig(batch_size=32, mini_batch_size=16, micro_batch_size=16, target_kl=1e9),
        )
        training = made(config, ranks)
        {"gradients": gradients, "steps": steps}[work](folder, training)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
