"""`equipoise sample`: one method's completions file."""

import sys

from equipoise.commands.several import HELP, only_first_speaks, started
from equipoise.methods.estimates import first_look
from equipoise.methods.sample import SampleConfig, sample
from equipoise.methods.summary import summary
from equipoise.options import parse
from equipoise.protocol.plural import plural
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.progress import Progress
from equipoise.runs.ranks import joined


def main(argv: list[str]) -> int:
    """Write or complete the file, print a summary, and return the exit code as `equipoise generate` does."""
    code, argv = started(argv, ("-m", "equipoise", "sample"), "equipoise sample")
    if code is not None:
        return code

    def read() -> SampleConfig:
        return parse(
            SampleConfig,
            argv,
            SampleConfig(),
            prog="equipoise sample",
            description="Write a method's sentences, n for each occupation, to a CSV. The same command again "
            f"continues. {HELP}",
        )

    with joined() as ranks:
        only_first_speaks(ranks)
        config = ranks.first_does(read)  # which may name a task file, and only the first one's host need have that
        with Progress(sys.stdout) as progress:
            outcome = sample(config, progress.say, progress)
    if outcome.texts and ranks.first:
        print(summary(outcome.texts, outcome.task))
    if outcome.status == "done" and ranks.first:
        if config.method == "sft" and outcome.task == PROTOCOL:  # beside what the public study reports
            print(first_look(list(outcome.texts.values()), outcome.task))
        print(f"{config.path} is complete: {plural(len(outcome.texts), 'row')}")
    return outcome.exit_code
