"""`equipoise report`: everything that was measured, as one HTML file with its figures and tables beside it."""

from equipoise.evaluation.config import ReportConfig
from equipoise.options import parse
from equipoise.protocol.marking import printable


def main(argv: list[str]) -> int:
    """Write the report and say where it is. Returns the exit code; raises UserError."""
    config = parse(
        ReportConfig,
        argv,
        ReportConfig(),
        prog="equipoise report",
        description="Write what was measured as one HTML file, with its figures and tables in a folder beside it.",
    )
    # Only here: `--help` and a mistyped option need not wait for it.
    from equipoise.evaluation.assemble import report
    from equipoise.ppo.tracking.attach import attach, check_followed

    if config.track:
        check_followed(config.run)

    for line in report(config, lambda text: print(printable(text), flush=True)):
        print(printable(line))
    for folder in config.run if config.track else ():
        for line in attach(folder, config.output):
            print(printable(line))
    return 0
