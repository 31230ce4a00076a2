"""`equipoise sample`: one method's completions file."""

import sys

from equipoise.methods.estimates import first_look
from equipoise.methods.sample import SampleConfig, sample
from equipoise.methods.summary import summary
from equipoise.options import parse
from equipoise.protocol.plural import plural
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.progress import Progress


def main(argv: list[str]) -> int:
    """Write or complete the file, print a summary, and return the exit code as `equipoise generate` does."""
    config = parse(
        SampleConfig,
        argv,
        SampleConfig(),
        prog="equipoise sample",
        description="Write a method's sentences, n for each occupation, to a CSV. The same command again continues.",
    )
    with Progress(sys.stdout) as progress:
        outcome = sample(config, progress.say, progress)
    if outcome.texts:
        print(summary(outcome.texts, outcome.task))
    if outcome.status == "done":
        if config.method == "sft" and outcome.task == PROTOCOL:  # beside what the public study reports
            print(first_look(list(outcome.texts.values()), outcome.task))
        print(f"{config.path} is complete: {plural(len(outcome.texts), 'row')}")
    return outcome.exit_code
