"""The first lines of every training run: which preset this machine can run, what was found, what was chosen, why."""

import math
import os
from dataclasses import replace
from typing import NamedTuple

import torch

from equipoise.policy.config import LLAMA_8B
from equipoise.policy.eightbit import NAMES
from equipoise.policy.hub import hub_access
from equipoise.policy.load import eight_bits, pick_device, pick_dtype
from equipoise.policy.source import resolve
from equipoise.ppo import machine as machines
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.presets import PRESETS
from equipoise.protocol.plural import plural

PROMPT_TOKENS = 64  # of the protocol's prompts in any chat template, rounded up

# Free on the GPU for Llama-3.1-8B at the guide's batch, with some room: 22.3 GB measured; in 8 bits 16.8 where all
# weights were on the GPU before they were rounded, and less since they are rounded one by one (`machine.need`: 14.2).
EIGHT_BIT_GB, BFLOAT16_GB = 19, 25


class Choice(NamedTuple):
    config: TrainConfig
    reasons: tuple[str, ...]
    """Lines that say what was chosen and why."""


def choose(machine: machines.Machine) -> Choice:
    """The best preset that can run here without asking for anything.

    The reasons are of the machine and of the preset: which model is trained, and on what, options may still decide."""
    if machine.gpu is None:
        return Choice(
            PRESETS["bundled-cpu"], ("no CUDA GPU: preset bundled-cpu, made for the bundled SmolLM2-135M on a CPU",)
        )
    if machine.gpu_free_gb < EIGHT_BIT_GB:
        needs = f"Llama-3.1-8B needs {EIGHT_BIT_GB} (8-bit) or {BFLOAT16_GB}"
        why = f"{machine.gpu_free_gb:.0f} GB free on the GPU, and {needs}"
    else:
        access = hub_access(LLAMA_8B)
        if access.available:
            eight = machine.gpu_free_gb < BFLOAT16_GB
            config = PRESETS["guide"]
            config = replace(config, policy=replace(config.policy, use_8bit=eight))
            note = f", with 8-bit base weights, since less than {BFLOAT16_GB} GB are free" if eight else ""
            return Choice(config, (f"a CUDA GPU and access to {LLAMA_8B}: preset guide, made for it{note}",))
        why = access.reason
    return Choice(PRESETS["bundled-gpu"], (f"{why}: preset bundled-gpu, made for the bundled SmolLM2-135M on a GPU",))


def notices(config: TrainConfig) -> list[str]:
    """What the user should know of the model's name, a line each; the network is not asked.

    Raises UserError, also where the task's sentences do not fit into the new tokens: no model could help."""
    config.task.check_new_tokens(config.sampling.max_new_tokens)
    return [f"note      {notice}" for notice in resolve(config.policy.model).notices]


def idle_gpus(device: str) -> list[str]:
    """A line about GPUs of this host that nobody uses, where nobody asked for a certain one."""
    if device not in ("auto", "cuda"):
        return []
    count, used = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if count <= used:
        return []
    return [f"gpus      {used} of the {count} that PyTorch sees: --gpus {count} shares the work among all"]


def preflight(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The configuration cut to this machine's memory, and what was found and chosen, a line each.

    Raises UserError where the run cannot fit."""
    here = machines.inspect_machine()
    source = resolve(config.policy.model)
    device = pick_device(config.policy.device)
    into = eight_bits(config.policy, device)
    dtype = pick_dtype(config.policy.dtype, device)
    rows = min(config.ppo.micro_batch_size, config.ppo.mini_batch_size)
    work = machines.Work(rows, config.ppo.batch_size, PROMPT_TOKENS, config.sampling.max_new_tokens)
    plan = machines.fit(config.policy, source, work, here.gpu_free_gb)
    needed, run = plan.need, config.run
    config = replace(
        config,
        policy=replace(config.policy, gradient_checkpointing=plan.gradient_checkpointing),
        ppo=replace(config.ppo, micro_batch_size=plan.rows if plan.rows < rows else config.ppo.micro_batch_size),
    )
    kept = run.keep_checkpoints or math.ceil(config.steps / run.save_every)
    fits = machines.check(needed, here, device, (run.output_dir, run.checkpoint_dir), kept + 1)
    how = (
        "all weights, frozen copy as reference"
        if config.policy.tuning == "full"
        else f"LoRA rank {config.policy.lora_rank}"
    )
    lines = [
        *here.lines(),
        f"model     {source.path_or_id} ({needed.parameters / 1e6:.0f} M parameters; "
        f"{needed.trained / 1e6:.1f} M trained: {how})",
        f"compute   {device}, {str(dtype).removeprefix('torch.')}{f', base weights in {NAMES[into]}' if into else ''}",
        *fits,
        *filter(None, [plan.line(rows)]),
        *idle_gpus(config.policy.device),
        f"task      {config.task.name}: prompt {config.prompt!r}, {plural(len(config.occupations), 'occupation')}",
        f"steps     {config.steps} of {plural(config.ppo.batch_size, 'sentence')}",
        f"files     {run.output_dir}/ {run.checkpoint_dir}/ {run.tensorboard_dir}/",
    ]
    return config, lines
