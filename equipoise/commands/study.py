"""`equipoise study`: all methods on one model."""

import sys

from equipoise.methods.study import StudyConfig, study
from equipoise.options import parse
from equipoise.runs.progress import Progress


def main(argv: list[str]) -> int:
    """Make or continue the study, and return the exit code. Raises UserError for bad input."""
    config = parse(
        StudyConfig,
        argv,
        StudyConfig(),
        prog="equipoise study",
        description="Write the sentences of all methods, at equal numbers and settings. The same command continues.",
    )
    from equipoise.runs.console import quiet

    quiet()
    with Progress(sys.stdout) as progress:
        outcome = study(config, progress.say, progress, progress.begin)
    print(f"{config.output_dir}/study.json lists the files: equipoise report {config.output_dir} compares them")
    return outcome.exit_code
