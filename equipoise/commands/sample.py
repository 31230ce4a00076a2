"""`equipoise sample`: one method's completions file."""

import sys

from equipoise.methods.estimates import beside_the_study
from equipoise.methods.sample import SampleConfig, sample
from equipoise.methods.summary import summary
from equipoise.options import parse
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
        print(summary(outcome.texts))
    if outcome.status == "done":
        if config.method == "sft":
            print(beside_the_study(list(outcome.texts.values())))
        print(f"{config.output} is complete: {len(outcome.texts)} rows")
    return outcome.exit_code
