"""`equipoise train`; `train_rlhf.py` at the root comes here too."""

import argparse
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from equipoise import options
from equipoise.commands.several import HELP, only_first_speaks, started
from equipoise.errors import UserError
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.presets import PRESETS, additions, for_model, for_task, preset
from equipoise.protocol.task import PROTOCOL, Task, read_task
from equipoise.runs.console import loading, quiet
from equipoise.runs.ranks import joined
from equipoise.short_help import ALL

# torch and transformers, which take seconds to load, are imported only once the command line has been read.


def main(argv: list[str]) -> int:
    """Train, in as many processes as are asked for. Returns the exit code (see `Outcome`); raises UserError."""
    code, argv = started(argv, ("-m", "equipoise", "train"), "equipoise train", GUIDE_NAMES)
    if code is not None:
        return code
    with joined() as ranks:
        only_first_speaks(ranks)

        def decide() -> tuple[TrainConfig, bool]:
            config, reasons, overwrite = configure(argv)
            return announced(config, reasons, ranks.size, overwrite), overwrite

        config, overwrite = ranks.first_does(decide)
        from equipoise.ppo.train import train

        return train(config, overwrite=overwrite).exit_code


def announced(config: TrainConfig, reasons: Sequence[str], processes: int, overwrite: bool) -> TrainConfig:
    """The configuration cut to this machine, and with the sentences of the target that it begins with, if there is one;
    after the first lines of a run: `reasons`, then what was found and chosen for so many processes, something being on
    the screen all the while.

    Raises UserError where the run cannot fit, or cannot have its target, or not begin: unless it is to `overwrite` what
    another began.
    """
    quiet()
    print("\n".join(reasons), flush=True)  # before anything of a machine or a network is asked
    with loading("looking at model and machine"):
        from equipoise.ppo.preflight import notices, preflight

        for line in notices(config):
            print(line, flush=True)
        config, found = preflight(config, processes)
        importlib.import_module("equipoise.ppo.train")  # as long as something moves
    print("\n".join(found), flush=True)
    return _with_target(config, overwrite)


def _with_target(config: TrainConfig, overwrite: bool) -> TrainConfig:
    """With the sentences of the target that the warm start begins with, if it has one. Raises UserError."""
    if config.warm_start.target == "off":
        return config
    from equipoise.methods.target import prepared
    from equipoise.ppo.claim import as_begun

    return prepared(config if overwrite else as_begun(config))


DESCRIPTION = (
    "Fine-tune a language model with PPO. Without options: what this machine can run. The same command again continues "
    "the run. Also: --preset NAME (guide, bundled-gpu, varied, near, even, bundled-cpu), --config FILE.yaml for "
    f"defaults, --overwrite to start anew, --algorithm grpo, rloo or reinforce++. {HELP}"
)


COMMON = (
    *("task", "prompt", "model", "tuning", "use_8bit", "steps", "seed", "batch_size", "mini_batch_size", "ppo_epochs"),
    *("learning_rate", "target_kl", "kl_coef", "diversity_weight", "strict_bonus", "warm_start", "on_alert"),
    *("output_dir", "checkpoint_dir", "save_every"),
)
"""The twenty options that `--help` shows."""


class CommandLine(NamedTuple):
    """What a command line says, before it is known what it says it of."""

    preset: str | None
    config: Path | None
    task: Task
    settings: Mapping[str, Any]
    """Of the configuration file."""
    overwrite: bool
    options: Sequence[str]
    """All others, those of the script first: of one given twice the last counts."""
    sources: Sequence[str]
    """Lines that say which options came from where."""
    prog: str
    """What was called."""
    script: Mapping[str, str]
    """The constants of the script that are among the options, by the option."""


def configure(
    argv: list[str], edited: Mapping[str, Any] | None = None, prog: str = "equipoise train"
) -> tuple[TrainConfig, list[str], bool]:
    """(configuration, lines that say why, whether to start anew) from the command line. Raises UserError.

    `prog`: what was called, for messages.
    `edited`: constants of train_rlhf.py that its user has changed, by the name they have there. They count as options
    that were given; those on the command line win over them.
    """
    line = _read(argv, edited or {}, prog)
    if line.preset is not None:
        config, reasons = preset(line.preset), [f"preset    {line.preset}, as asked"]
    elif "preset" in line.settings:
        named = str(line.settings["preset"])
        config, reasons = preset(named), [f"preset    {named}, as {line.config} says"]
    elif {"--help", "-h", ALL} & set(line.options):
        config, reasons = preset("bundled-cpu"), []
    else:
        _any_preset(line)
        with loading("looking at this machine"):
            from equipoise.ppo.machine import inspect_machine
            from equipoise.ppo.preflight import choose

            choice = choose(inspect_machine())
        config = choice.config
        reasons = [f"preset    {'; '.join(choice.reasons)}. Another: --preset {' | '.join(PRESETS)}, --model NAME"]
    config, changes = _complete(config, line)
    return config, [*reasons, *line.sources, *changes, *additions(config)], line.overwrite


def _read(argv: Sequence[str], edited: Mapping[str, Any], prog: str) -> CommandLine:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    first.add_argument("--task", type=str)
    first.add_argument("--overwrite", action="store_true")
    try:
        own, rest = first.parse_known_args(options.spelled(argv, GUIDE_NAMES))
    except argparse.ArgumentError as error:
        raise UserError(f"{options.plainly(str(error))}; {prog} --help lists the options") from None
    settings = options.read_file(own.config) if own.config else {}
    named = own.task or settings.get("task")
    task = PROTOCOL if named is None else read_task(str(named))
    on_line = {word.partition("=")[0] for word in rest if word.startswith("--")}
    script, sources, names = [], [], {}
    for name, value in edited.items():
        (flag,) = options.spelled([f"--{name}"], GUIDE_NAMES)
        if flag not in on_line:
            script.append(f"{flag}={value}")
            names[flag] = name
            sources.append(f"option    {flag} {value}, from {name} in train_rlhf.py")
        else:
            sources.append(f"option    {flag} from the command line, not {name} = {value} of train_rlhf.py")
    return CommandLine(own.preset, own.config, task, settings, own.overwrite, [*script, *rest], sources, prog, names)


GUIDE_NAMES = {"training-steps": "steps"}
"""Names of the guide's constants that are not those of options but for their spelling."""


def _any_preset(line: CommandLine) -> None:
    """Raise UserError for what no preset could make of the command line, before it is looked which one can run."""
    errors = []
    for config in PRESETS.values():
        try:
            _complete(config, line)
            return
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _complete(config: TrainConfig, line: CommandLine) -> tuple[TrainConfig, list[str]]:
    """A preset with task, file and options, and lines that say what the task had to change of it."""
    config, changes = for_task(config, line.task)
    settings = {name: value for name, value in line.settings.items() if name not in ("preset", "task")}
    config = options.apply(config, settings, str(line.config)) if settings else config
    words, description = list(line.options), f"{DESCRIPTION} Defaults shown: those of the preset {config.preset}."
    try:
        parsed = options.parse(TrainConfig, words, config, prog=line.prog, description=description, common=COMMON)
    except UserError as error:
        blamed = [name for flag, name in line.script.items() if re.search(rf"(?<!\w){flag[2:]}\b(?!-)", str(error))]
        raise UserError(f"{error} (from {' and '.join(blamed)} in train_rlhf.py)" if blamed else error) from None
    given = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    given |= {name.replace("-", "_") for name in settings}
    parsed, told = for_model(parsed, given)
    return parsed, [*(why for name, why in changes.items() if name not in given), *told]
