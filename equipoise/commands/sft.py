"""`equipoise sft`: supervised fine-tuning on compliant sentences."""

import sys

from equipoise.commands.several import HELP, only_first_speaks, started
from equipoise.errors import NonFiniteError
from equipoise.methods.generate import NONFINITE_EXIT
from equipoise.methods.sft import SftConfig, sft
from equipoise.options import parse
from equipoise.runs.console import quiet
from equipoise.runs.progress import Progress
from equipoise.runs.ranks import joined


def main(argv: list[str]) -> int:
    """Train, and return the exit code: 0 done, 3 non-finite numbers. Raises UserError for bad input."""
    code, argv = started(argv, ("-m", "equipoise", "sft"), "equipoise sft")
    if code is not None:
        return code

    def read() -> SftConfig:
        return parse(
            SftConfig,
            argv,
            SftConfig(),
            prog="equipoise sft",
            description="Fine-tune a model on the compliant sentences of a completions file (--data FILE), or on its "
            f"own (--data forced). {HELP}",
        )

    with joined() as ranks:
        only_first_speaks(ranks)
        config = ranks.first_does(read)  # which may name a task file, and only the first one's host need have that
        quiet()
        with Progress(sys.stdout) as progress:
            try:
                sft(config, progress.say)
            except NonFiniteError as error:
                progress.say(f"stopped: {error}")
                return NONFINITE_EXIT
    return 0
