"""`equipoise train`; `train_rlhf.py` at the root comes here too."""

import argparse
from pathlib import Path

from equipoise import options
from equipoise.errors import UserError
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.machine import inspect_machine
from equipoise.ppo.preflight import choose, preflight
from equipoise.ppo.presets import PRESETS, for_task, preset
from equipoise.ppo.train import train
from equipoise.protocol.task import PROTOCOL, read_task
from equipoise.runs.console import quiet


def main(argv: list[str]) -> int:
    """Train. Returns the exit code (see `Outcome`); raises UserError."""
    quiet()
    config, reasons, overwrite = configure(argv)
    config, lines = preflight(config)
    for line in (*reasons, *lines):
        print(line, flush=True)
    return train(config, overwrite=overwrite).exit_code


DESCRIPTION = (
    "Fine-tune a language model with PPO. Without options: what this machine can run. The same command again continues "
    "the run. Also: --preset NAME (guide, bundled-gpu, varied, bundled-cpu), --config FILE.yaml for defaults, "
    "--overwrite to start anew."
)


def configure(argv: list[str]) -> tuple[TrainConfig, list[str], bool]:
    """(configuration, lines that say why, whether to start anew) from the command line. Raises UserError."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    first.add_argument("--task", type=str)
    first.add_argument("--overwrite", action="store_true")
    try:
        own, rest = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; train_rlhf.py --help lists the options") from None
    settings = options.read_file(own.config) if own.config else {}
    in_file = settings.pop("preset", None)
    named = own.task or settings.pop("task", None)
    settings.pop("task", None)
    task = PROTOCOL if named is None else read_task(str(named))
    if own.preset is not None:
        config, reasons = preset(own.preset), [f"preset    {own.preset}, as asked"]
    elif in_file is not None:
        config, reasons = preset(str(in_file)), [f"preset    {in_file}, as {own.config} says"]
    elif "--help" in rest or "-h" in rest:
        config, reasons = preset("bundled-cpu"), []
    else:
        choice = choose(inspect_machine())
        config = choice.config
        reasons = [f"preset    {'; '.join(choice.reasons)}. Another: --preset {' | '.join(PRESETS)}, --model NAME"]
    config, changes = for_task(config, task)
    config = options.apply(config, settings, str(own.config)) if settings else config
    return (
        options.parse(TrainConfig, rest, config, prog="train_rlhf.py", description=DESCRIPTION),
        [*reasons, *changes],
        own.overwrite,
    )
