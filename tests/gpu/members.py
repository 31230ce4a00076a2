"""What the processes of `test_ranks` do, alone or under torchrun: `python -m tests.gpu.members WORK FOLDER SHAPE LAYERS
DTYPE`, with `+` between several works on one model, the shape being one with random weights or `bundled`. What they
came to is written into the folder, under the number of processes and the rank."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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
from equipoise.runs.pieces import PieceSum
from equipoise.runs.ranks import Ranks, joined
from equipoise.runs.tensors import Deferred

STEPS = 20


def made(config: TrainConfig, ranks: Ranks, like: Policy | None = None) -> Training:
    """A policy with adapters that do something, the same on all ranks; `like`: with the weights of that one."""
    torch.manual_seed(0)
    policy = load_policy(config.policy, PROTOCOL.prompt("describe"), ranks)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # zeros would hide the adapters
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    if like is not None:
        for parameter, other in zip(policy.model.parameters(), like.model.parameters(), strict=True):
            parameter.data.copy_(other.data)
    prompts = render_prompts(policy.tokenizer, PROTOCOL.prompt("describe"), PROTOCOL, "").ids
    settle(policy, list(prompts.values()), config.sampling.max_new_tokens)
    state = State.begin(config, RowLimit(config.ppo.micro_batch_size))
    return Training(config, policy, new_optimizer(config, policy, ranks), state, prompts, ranks=ranks)


def recorded(folder: Path, policy: Policy, prompts: list[list[int]], name: str) -> tuple[Rollout, Tensor]:
    """A rollout, sampled by whoever comes first, and its log-probabilities as computed by the first of that name."""
    path, scored = folder / "rollout.safetensors", folder / f"scores-{name}.safetensors"
    if not path.exists():
        drawn = sample(policy, prompts, SamplingConfig(), torch.Generator().manual_seed(2)).cpu()
        save_file({"tokens": drawn.tokens_BT, "lengths": drawn.lengths_B, "finished": drawn.finished_B}, path)
    found = load_file(path)
    rollout = Rollout(prompts, found["tokens"], found["lengths"], found["finished"])
    if not scored.exists():
        old = torch.zeros(rollout.mask_BT.shape)
        with torch.no_grad():
            old[rollout.mask_BT] = score(policy, rollout, 1.0, packed=False).logprobs.cpu()
        save_file({"old": old}, scored)
    return rollout, load_file(scored)["old"]


def gradients(folder: Path, training: Training) -> None:
    """The gradient of one mini-batch of 32 recorded completions in one piece, if this is one process, and in two; in
    bfloat16, and with the same weights in float32."""
    config = training.config
    exactly = replace(config, policy=replace(config.policy, dtype="float32"))
    for each in (training, made(exactly, training.ranks, training.policy)):
        for pieces in range(training.ranks.size, 3):
            gradient(folder, each, training.ranks.cut_into(pieces), each.config.policy.dtype)


def gradient(folder: Path, training: Training, ranks: Ranks, name: str) -> None:
    policy, optimizer = training.policy, training.optimizer
    names = list(training.prompts)
    rollout, old = recorded(folder, policy, [training.prompts[names[i % len(names)]] for i in range(32)], name)
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(3))
    advantages = torch.where(rollout.mask_BT, noise, 0.0)
    experience = Experience(rollout, old, torch.zeros_like(old), advantages, advantages)
    config = PPOConfig(batch_size=32, mini_batch_size=32, micro_batch_size=32, ppo_epochs=1)
    for _ in range(2):  # recorded, then replayed
        optimizer.zero_grad()
        update = Update(policy, optimizer, experience, [torch.arange(32)], config, 1.0, True, RowLimit(32), ranks)
        update.launch()
    file = folder / f"{name}-{ranks.pieces}-{ranks.size}-{ranks.rank}.safetensors"
    save_file({"gradient": optimizer.take().cpu()}, file)


def cut(folder: Path, training: Training) -> None:
    """The gradient of the recorded completions in float32, with every layer cut over the processes."""
    ranks, plain = training.ranks, {"fused": False, "cuda_graphs": False}
    policy = replace(training.config.policy, dtype="float32", tensor_parallel=ranks.size, **plain)
    sharing = made(replace(training.config, policy=policy), ranks.sharing_layers(ranks.size))
    gradient(folder, sharing, sharing.ranks, "cut-float32")


def steps(folder: Path, training: Training) -> None:
    """The masters after some steps."""
    for _ in range(STEPS):
        step = ppo_step(training)
        assert step.problem is None, step.problem
    assert step.timings["ranks/size"] == training.ranks.size
    training.ranks.agree(STEPS, training.optimizer.digest())
    weights = {name: tensor.cpu().clone() for name, tensor in training.optimizer.state()[0].items()}
    save_file(weights, folder / f"steps-{training.ranks.size}-{training.ranks.rank}.safetensors")


def states(training: Training) -> dict[str, Tensor]:
    """On rank 0 the masters and moments of all ranks, on the CPU; nothing elsewhere."""
    optimizer, found = training.optimizer, dict[str, Tensor]()

    def gather(ask: Callable[[Any], Any]) -> None:
        for part in optimizer.state(ask=ask):
            for name, held in part.items():
                found[name] = (held.read().view(held.shape) if isinstance(held, Deferred) else held).cpu().clone()

    training.ranks.first_asks(gather, optimizer.reply)
    return found


def given(folder: Path, training: Training) -> None:
    """Masters and moments after steps with gradients that are given: two pieces, whatever the number of processes."""
    optimizer, ranks = training.optimizer, training.ranks.cut_into(2)
    optimizer.ranks = ranks
    optimizer.set_learning_rates(1e-3, 1e-2)
    for step in range(3):
        pieces = PieceSum(ranks)
        for piece in ranks.mine:
            generator = torch.Generator(training.policy.device).manual_seed(10 * step + piece)
            for group in optimizer.groups.values():
                for gradient in group.split(group.grads).values():
                    gradient.normal_(generator=generator)
            optimizer.set_aside(pieces)
        optimizer.add_up(pieces)
        print(f"norm {optimizer.norms()[0].item():.9g}", flush=True)
        optimizer.step(1e9)
    write(folder, "given", training)


def full(folder: Path, training: Training) -> None:
    """Masters and moments after whole steps, saved and put back with others in between."""
    for _ in range(STEPS // 4):
        step = ppo_step(training)
        assert step.problem is None, step.problem
    optimizer, ranks = training.optimizer, training.ranks
    ranks.agree(1, optimizer.digest())
    write(folder, "full", training)
    saved = states(training)
    ppo_step(training)
    moments = {name: x for name, x in saved.items() if name.endswith((".exp_avg", ".exp_avg_sq", ".step"))}
    optimizer.load_state(saved, moments)
    write(folder, "restored", training)


def write(folder: Path, name: str, training: Training) -> None:
    """All states by rank 0, and by each the weights that its model computes with."""
    ranks = training.ranks
    used = {f"used.{name}": p.detach().cpu().clone() for name, p in training.policy.trained().items()}
    save_file(states(training) | used, folder / f"{name}-{ranks.size}-{ranks.rank}.safetensors")


def main(work: str, folder: Path, shape: str, layers: int, dtype: str) -> None:
    if shape in shapes.SHAPES:
        shapes.SHAPES[shape]["num_hidden_layers"] = layers
    with joined() as ranks:
        config = TrainConfig(
            prompt="describe",
            policy=PolicyConfig(
                model=f"shape:{shape}" if shape in shapes.SHAPES else shape,
                tuning="full" if "given" in work else "lora",
                dtype=dtype,  # type: ignore[arg-type]
            ),
            ppo=PPOConfig(batch_size=32, mini_batch_size=16, micro_batch_size=16, target_kl=1e9),
        )
        training = made(config, ranks)
        for each in work.split("+"):
            {"gradients": gradients, "cut": cut, "steps": steps, "given": given, "full": full}[each](folder, training)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
