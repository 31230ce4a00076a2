"""Named configurations, which of them this machine can run, and what the command line makes of them."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from equipoise import options
from equipoise.errors import UserError
from equipoise.policy.hub import hub_access
from equipoise.policy.load import PolicyConfig
from equipoise.policy.source import LLAMA_8B
from equipoise.ppo.evaluate import EvaluationConfig
from equipoise.ppo.machine import Machine, look
from equipoise.ppo.run import RunConfig
from equipoise.ppo.train import TrainConfig
from equipoise.ppo.update import PPOConfig

# Seconds on a GPU: the untrained model's rates, an evaluation at every checkpoint, the closing summary.
MEASURED = EvaluationConfig(base_samples=5000, eval_sentences=260, final_sentences=1000)

PRESETS = {
    # The guide, to the letter: its model, its prompt, its numbers.
    "guide": TrainConfig(
        preset="guide",
        prompt="study",
        policy=PolicyConfig(model=LLAMA_8B, tuning="lora"),
        evaluation=MEASURED,
    ),
    # The guide's numbers on a model that needs neither access nor a large card, and the prompt that can be learnt from.
    "bundled-gpu": TrainConfig(
        preset="bundled-gpu",
        prompt="describe",
        policy=PolicyConfig(model="bundled", tuning="full"),
        evaluation=MEASURED,
        run=RunConfig(keep_checkpoints=3),
    ),
    # Minutes on two cores: adapters instead of all weights, which take a larger learning rate, and half the epochs. Of
    # 3e-4 and 1e-3 (reward 0.87 and 0.89 after 20 steps), the smaller kept more variety and the larger was faster.
    # A checkpoint of the adapters takes a fraction of a second, so there is one after every step.
    "bundled-cpu": TrainConfig(
        preset="bundled-cpu",
        prompt="describe",
        steps=30,
        policy=PolicyConfig(model="bundled", tuning="lora"),
        evaluation=EvaluationConfig(eval_sentences=60, final_sentences=100),
        ppo=PPOConfig(ppo_epochs=2, learning_rate=5e-4, warmup_steps=3),
        run=RunConfig(save_every=10, save_minutes=0.0, keep_checkpoints=2, sample_every=10),
    ),
}


# Free on the GPU for Llama-3.1-8B at the guide's batch: measured 16.8 GB (while loading) and 22.3, and some room.
EIGHT_BIT_GB, BFLOAT16_GB = 19, 25


class Choice(NamedTuple):
    config: TrainConfig
    reasons: tuple[str, ...]
    """Lines that say what was chosen and why."""


def preset(name: str) -> TrainConfig:
    """The preset of that name. Raises UserError."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: choose {', '.join(PRESETS)}")
    return PRESETS[name]


def choose(machine: Machine) -> Choice:
    """The best preset that can run here without asking for anything."""
    if machine.gpu is None:
        return Choice(
            PRESETS["bundled-cpu"], ("no CUDA GPU: training the bundled SmolLM2-135M on the CPU (preset bundled-cpu)",)
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
            note = f"8-bit base weights, since less than {BFLOAT16_GB} GB are free" if eight else "bfloat16"
            return Choice(config, (f"a CUDA GPU and access to {LLAMA_8B}: preset guide, {note}",))
        why = access.reason
    return Choice(
        PRESETS["bundled-gpu"], (f"training the bundled SmolLM2-135M on the GPU (preset bundled-gpu): {why}",)
    )


DESCRIPTION = (
    "Fine-tune a language model with PPO. Without options: what this machine can run. The same command again continues "
    "the run. Also: --preset NAME (guide, bundled-gpu, bundled-cpu), --config FILE.yaml for defaults, --overwrite to "
    "start anew."
)


def configure(argv: list[str]) -> tuple[TrainConfig, list[str], bool]:
    """(configuration, lines that say why, whether to start anew) from the command line. Raises UserError."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    first.add_argument("--overwrite", action="store_true")
    try:
        own, rest = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; train_rlhf.py --help lists the options") from None
    settings = options.read_file(own.config) if own.config else {}
    in_file = settings.pop("preset", None)
    if own.preset is not None:
        config, reasons = preset(own.preset), [f"preset    {own.preset}, as asked"]
    elif in_file is not None:
        config, reasons = preset(str(in_file)), [f"preset    {in_file}, as {own.config} says"]
    elif "--help" in rest or "-h" in rest:
        config, reasons = preset("bundled-cpu"), []
    else:
        choice = choose(look())
        config = choice.config
        reasons = [
            f"preset    {'; '.join(choice.reasons)}. Another: --preset guide | bundled-gpu | bundled-cpu, --model NAME"
        ]
    config = options.apply(config, settings, str(own.config)) if settings else config
    return (
        options.parse(TrainConfig, rest, config, prog="train_rlhf.py", description=DESCRIPTION),
        reasons,
        own.overwrite,
    )
