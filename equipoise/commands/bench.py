"""`equipoise bench`: where the time of a PPO step goes."""

import json

from equipoise import options
from equipoise.ppo.tool_config import BenchConfig


def main(argv: list[str]) -> int:
    """Print a line a step and one line of JSON last."""
    config = options.parse(
        BenchConfig, argv, BenchConfig(), prog="equipoise bench", description="Time PPO steps by phase."
    )
    from equipoise.ppo.bench import bench
    from equipoise.runs.console import quiet

    quiet()
    print(json.dumps(bench(config)))
    return 0
