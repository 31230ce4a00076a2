"""`equipoise bench`: where the time of a PPO step goes."""

import json

from equipoise import options
from equipoise.ppo.bench import BenchConfig, bench
from equipoise.runs.console import quiet


def main(argv: list[str]) -> int:
    """Print a line a step and one line of JSON last."""
    quiet()
    config = options.parse(
        BenchConfig, argv, BenchConfig(), prog="equipoise bench", description="Time PPO steps by phase."
    )
    print(json.dumps(bench(config)))
    return 0
