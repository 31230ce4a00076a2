"""`equipoise train`; `train_rlhf.py` at the root comes here too."""

from equipoise.ppo.doctor import preflight, quiet
from equipoise.ppo.presets import configure
from equipoise.ppo.train import train


def main(argv: list[str]) -> int:
    """Train. Returns the exit code (see `Outcome`); raises UserError."""
    quiet()
    config, reasons, overwrite = configure(argv)
    config, lines = preflight(config)
    for line in (*reasons, *lines):
        print(line, flush=True)
    return train(config, overwrite=overwrite).exit_code
