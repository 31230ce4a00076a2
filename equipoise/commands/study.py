"""`equipoise study`: all methods on one model."""

import sys

from equipoise.commands.several import HELP, only_first_speaks, started
from equipoise.methods.study import StudyConfig, study
from equipoise.options import parse
from equipoise.runs.console import quiet
from equipoise.runs.progress import Progress
from equipoise.runs.ranks import joined


def main(argv: list[str]) -> int:
    """Make or continue the study, and return the exit code. Raises UserError for bad input."""
    code, argv = started(argv, ("-m", "equipoise", "study"), "equipoise study")
    if code is not None:
        return code

    def read() -> StudyConfig:
        return parse(
            StudyConfig,
            argv,
            StudyConfig(),
            prog="equipoise study",
            description="Write the sentences of all methods, at equal numbers and settings. The same command "
            f"continues. {HELP}",
        )

    with joined() as ranks:
        only_first_speaks(ranks)
        config = ranks.first_does(read)  # which may name a task file, and only the first one's host need have that
        quiet()
        with Progress(sys.stdout) as progress:
            outcome = study(config, progress.say, progress, progress.begin)
    print(f"{config.output_dir}/study.json lists the files: equipoise report {config.output_dir} compares them")
    return outcome.exit_code
