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
from equipoise.ppo.config import PPOConfig, TrainConfig
from equipoise.ppo.idle import idle
from equipoise.ppo.machine import GB
from equipoise.ppo.presets import PRESETS
from equipoise.protocol.plural import plural
from equipoise.runs.launch import SHUTDOWN, seconds_to_end

PROMPT_TOKENS = 64  # of the protocol's prompts in any chat template, rounded up

# Free on the GPU for Llama-3.1-8B at the guide's batch, with some room: 22.3 GB measured, and in 8 bits, which are
# rounded while the weights are read, 14.6 (benchmarks/RESULTS.md); a plan fills no more than `machine.MARGIN` of it.
EIGHT_BIT_GB, BFLOAT16_GB = 16, 25


SAVING_GB_PER_SECOND = 0.5
"""Hashed and flushed to a disk as most machines have: cautious, as what is at stake is the whole step."""


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
    """What the user should know of the model's name, and of options that do nothing, a line each; the network is not
    asked.

    Raises UserError, also where the task's sentences do not fit into the new tokens: no model could help."""
    config.task.check_new_tokens(config.sampling.max_new_tokens)
    return [f"note      {notice}" for notice in (*idle(config), *resolve(config.policy.model).notices)]


def idle_gpus(device: str, used: int) -> list[str]:
    """A line about GPUs of this host that nobody uses, where nobody asked for a certain one."""
    if device not in ("auto", "cuda"):
        return []
    count = torch.cuda.device_count()
    if count <= used:
        return []
    return [f"gpus      {used} of the {count} that PyTorch sees: --gpus {count} shares the work among all"]


def slow_to_save(checkpoint: int) -> list[str]:
    """A line where several processes would be killed before a checkpoint of so many bytes is written. Raises
    UserError."""
    seconds, given = math.ceil(checkpoint / GB / SAVING_GB_PER_SECOND), seconds_to_end()
    if seconds <= given:
        return []
    enough = 60 * math.ceil(2 * seconds / 60)
    return [
        f"saving    a checkpoint of {checkpoint / GB:.1f} GB takes some {seconds} s, and torchrun and --gpus kill "
        f"their processes {given} s after a signal: set {SHUTDOWN[0]}={enough}, or give torchrun --shutdown-timeout "
        f"{enough} (torch 2.12 or newer)"
    ]


def algorithm(ppo: PPOConfig) -> str:
    """What turns the sentences of a step into an update, in a few words."""
    grouped = f", groups of {ppo.group_size} of one occupation" if ppo.group_size > 1 else ""
    return f"{ppo.method.title}{grouped}"


def preflight(config: TrainConfig, processes: int = 1) -> tuple[TrainConfig, list[str]]:
    """The configuration cut to this machine's memory, and what was found and chosen, a line each. So many `processes`
    share the run; how many of them are on this machine the environment says where they were started elsewhere too.

    Raises UserError where the run cannot fit."""
    here = machines.inspect_machine()
    source = resolve(config.policy.model)
    device = pick_device(config.policy.device)
    into = eight_bits(config.policy, device)
    dtype = pick_dtype(config.policy.dtype, device)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    dealers = max(1, processes // config.policy.tensor_parallel)
    pieces = config.ppo.pieces or dealers
    piece = -(-config.ppo.mini_batch_size // pieces)
    rows = min(config.ppo.micro_batch_size, piece)
    work = machines.Work(
        *(rows, config.ppo.batch_size, PROMPT_TOKENS, config.sampling.max_new_tokens),
        *(dealers, piece, -(-pieces // dealers)),
        average=config.ppo.average_weights > 0,
        values=config.ppo.value_hidden,
    )
    plan = machines.fit(config.policy, source, work, here.gpu_free_gb)
    needed, run = plan.need, config.run
    config = replace(
        config,
        policy=replace(config.policy, gradient_checkpointing=plan.gradient_checkpointing),
        ppo=replace(config.ppo, micro_batch_size=plan.rows if plan.rows < rows else config.ppo.micro_batch_size),
    )
    kept = run.keep_checkpoints or math.ceil(config.steps / run.save_every)
    fits = machines.check(needed, here, device, (run.output_dir, run.checkpoint_dir), kept + 1, local)
    how = (
        "all weights, frozen copy as reference" + (f", optimizer in {processes} slices" if processes > 1 else "")
        if config.policy.tuning == "full"
        else f"LoRA rank {config.policy.lora_rank}"
        + (f", layers cut over {processes} processes" if config.policy.tensor_parallel > 1 else "")
    )
    lines = [
        *here.lines(),
        f"model     {source.path_or_id} ({needed.parameters / 1e6:.0f} M parameters; "
        f"{needed.trained / 1e6:.1f} M trained: {how})",
        f"compute   {device}, {str(dtype).removeprefix('torch.')}{f', base weights in {NAMES[into]}' if into else ''}",
        *fits,
        *filter(None, [plan.line(rows)]),
        *slow_to_save(needed.checkpoint),
        *idle_gpus(config.policy.device, local),
        f"task      {config.task.name}: prompt {config.prompt!r}, {plural(len(config.occupations), 'occupation')}",
        f"steps     {config.steps} of {plural(config.ppo.batch_size, 'sentence')}, {algorithm(config.ppo)}",
        f"files     {run.output_dir}/ {run.checkpoint_dir}/ {run.tensorboard_dir}/",
    ]
    return config, lines
