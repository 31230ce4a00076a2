"""`--gpus N` and `--processes N`: a command started again in several processes, of which only the first one speaks."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from equipoise import options
from equipoise.errors import UserError
from equipoise.runs.console import quiet
from equipoise.runs.launch import launch, processes_of
from equipoise.runs.ranks import Ranks
from equipoise.short_help import ALL

HELP = "--gpus N shares the work among N GPUs, --processes N among N processes on the CPU."


def started(
    argv: list[str], command: Sequence[str], prog: str, names: Mapping[str, str] | None = None
) -> tuple[int | None, list[str]]:
    """(exit code of the processes that were asked for, None where this one does the work; the other options).

    `command`: what Python is to be called with, before the options. Raises UserError."""
    processes, rest = asked(argv, prog, names)
    if processes == 1 or {"--help", "-h", ALL} & set(rest):
        return None, rest
    print(f"processes {processes} are started, and share the work", flush=True)
    return launch([*command, *rest], processes), rest


def asked(argv: list[str], prog: str, names: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    """(processes that are asked for, the other options). Raises UserError."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--gpus", type=int)
    own.add_argument("--processes", type=int)
    try:
        found, rest = own.parse_known_args(options.spelled(argv, names or {}))
    except argparse.ArgumentError as error:
        raise UserError(f"{options.plainly(str(error))}; {prog} --help lists the options") from None
    return processes_of(found.gpus, found.processes), rest


def only_first_speaks(ranks: Ranks) -> None:
    """Have the other processes print nothing but errors."""
    if not ranks.first:
        quiet()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
