"""`equipoise sft`: supervised fine-tuning on compliant sentences."""

import sys

from equipoise.errors import NonFiniteError
from equipoise.methods.generate import NONFINITE_EXIT
from equipoise.methods.sft import SftConfig, sft
from equipoise.options import parse
from equipoise.runs.progress import Progress


def main(argv: list[str]) -> int:
    """Train, and return the exit code: 0 done, 3 non-finite numbers. Raises UserError for bad input."""
    config = parse(
        SftConfig,
        argv,
        SftConfig(),
        prog="equipoise sft",
        description="Fine-tune a model on the compliant sentences of a completions file (--data FILE), or on its own "
        "(--data forced).",
    )
    from equipoise.runs.console import quiet

    quiet()
    with Progress(sys.stdout) as progress:
        try:
            sft(config, progress.say)
        except NonFiniteError as error:
            progress.say(f"stopped: {error}")
            return NONFINITE_EXIT
    return 0
