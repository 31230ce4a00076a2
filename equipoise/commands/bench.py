"""`equipoise bench`: where the time of a PPO step goes."""

import argparse
import json

from equipoise import options
from equipoise.errors import UserError
from equipoise.ppo.presets import preset
from equipoise.ppo.tool_config import BenchConfig


def main(argv: list[str]) -> int:
    """Print a line a step and one line of JSON last."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    try:
        own, rest = first.parse_known_args(options.spelled(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; equipoise bench --help lists the options") from None
    default = BenchConfig() if own.preset is None else BenchConfig(train=preset(own.preset))
    config = options.parse(BenchConfig, rest, default, prog="equipoise bench", description="Time PPO steps by phase.")
    from equipoise.ppo.bench import bench
    from equipoise.runs.console import quiet

    quiet()
    print(json.dumps(bench(config)))
    return 0
