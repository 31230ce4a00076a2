"""`equipoise sweep`: train seeds × settings and compare them in one table."""

from equipoise import options
from equipoise.ppo.tool_config import SweepConfig


def main(argv: list[str]) -> int:
    """Run what is missing and print the table. 0, or the exit code of a run that was stopped by a signal, or 3 if
    one ended because of non-finite values, or 1 if one failed otherwise."""
    config = options.parse(
        SweepConfig, argv, SweepConfig(), prog="equipoise sweep", description=(__doc__ or "").partition("\n")[0]
    )
    from equipoise.methods.target import prepared
    from equipoise.ppo.sweep import sweep
    from equipoise.runs.console import quiet

    quiet()
    return sweep(config, prepared)
