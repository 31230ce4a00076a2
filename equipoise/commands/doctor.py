"""`equipoise doctor`, and the first lines of every training run: what was found, what was chosen, and why."""

from equipoise.commands.several import asked
from equipoise.commands.train import GUIDE_NAMES, configure


def main(argv: list[str]) -> int:
    """Print what `train` with the same options, `--gpus` among them, would find and choose, and do nothing."""
    processes, argv = asked(argv, "equipoise doctor", GUIDE_NAMES)
    config, reasons, _ = configure(argv, prog="equipoise doctor")
    from equipoise.ppo.preflight import notices, preflight
    from equipoise.runs.console import quiet

    quiet()
    print("\n".join((*reasons, *notices(config), *preflight(config, processes)[1])))
    return 0
