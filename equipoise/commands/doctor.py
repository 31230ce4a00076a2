"""`equipoise doctor`, and the first lines of every training run: what was found, what was chosen, and why."""

from equipoise.commands.train import configure


def main(argv: list[str]) -> int:
    """Print what `train` with the same options would find and choose, and do nothing."""
    config, reasons, _ = configure(argv, prog="equipoise doctor")
    from equipoise.ppo.preflight import notices, preflight
    from equipoise.runs.console import quiet

    quiet()
    print("\n".join((*reasons, *notices(config), *preflight(config)[1])))
    return 0
