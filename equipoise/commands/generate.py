"""`equipoise generate`, and `python generate_rlhf.py`: the completions file of a trained model."""

import sys

from equipoise.commands.several import HELP, only_first_speaks, started
from equipoise.methods.generate import GenerateConfig, generate
from equipoise.methods.summary import summary
from equipoise.options import parse
from equipoise.protocol.plural import plural
from equipoise.runs.progress import Progress
from equipoise.runs.ranks import joined


def main(argv: list[str]) -> int:
    """Write or complete the file, print a summary, and return the exit code. Raises UserError for bad input.

    0 done, 3 non-finite numbers from the model, 128 + the number of the signal that stopped it (129, 130, 143).
    """
    code, argv = started(argv, ("-m", "equipoise", "generate"), "equipoise generate")
    if code is not None:
        return code

    def read() -> GenerateConfig:
        return parse(
            GenerateConfig,
            argv,
            GenerateConfig(),
            prog="equipoise generate",
            description="Write a model's sentences, n for each occupation, to a CSV. The same command again "
            f"continues. {HELP}",
        )

    with joined() as ranks:
        only_first_speaks(ranks)
        config = ranks.first_does(read)  # which may name a task file, and only the first one's host need have that
        with Progress(sys.stdout) as progress:
            outcome = generate(config, progress.say, progress)
    if outcome.texts and ranks.first:
        print(summary(outcome.texts, outcome.task))
    if outcome.status == "done" and ranks.first:
        print(f"{config.path} is complete: {plural(len(outcome.texts), 'row')}")
    return outcome.exit_code
