"""`equipoise NAME ARGS`: finds the command, runs it, and turns what went wrong into one line and an exit code.

A command is a module with `main(argv: list[str]) -> int`, imported only when it is called: `score` never loads torch.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable

from equipoise import __version__
from equipoise.errors import LoneError, LostProcess, UserError
from equipoise.runs.launch import EXIT_LOST_PROCESS, is_first, launched, report

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("equipoise.commands.demo", "see it all in a minute, without training"),
    "train": ("equipoise.commands.train", "fine-tune a model with PPO; rerun to resume"),
    "generate": ("equipoise.commands.generate", "write a trained model's completions to a CSV"),
    "export": ("equipoise.commands.export", "write a checkpoint's model as a finished folder"),
    "sample": ("equipoise.commands.sample", "write the completions of any method, to compare"),
    "join": ("equipoise.commands.join", "put the parts of a completions file together"),
    "sft": ("equipoise.commands.sft", "fine-tune a model on compliant sentences, to compare"),
    "study": ("equipoise.commands.study", "write the completions of all methods on one model"),
    "evaluate": ("equipoise.commands.evaluate", "measure completion files: compliance, diversity, fluency, trade-off"),
    "report": ("equipoise.commands.report", "write what was measured as one HTML file with figures"),
    "prompts": ("equipoise.commands.prompts", "write a task's prompts as a data set for TRL, verl or OpenRLHF"),
    "task": ("equipoise.commands.task", "look at a task file before GPU hours are spent; --new writes one"),
    "score": ("equipoise.commands.score", "show the terms and the reward of sentences"),
    "doctor": ("equipoise.commands.doctor", "say what this machine can run, and why"),
    "sweep": ("equipoise.commands.sweep", "train seeds × settings and compare them in one table"),
    "bench": ("equipoise.commands.bench", "time PPO steps by phase"),
}
"""Each command with its module and its line in the help."""

SHARED = ("train", "bench", "generate", "sample", "sft", "study", "evaluate")
"""Those that several processes do together."""

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: what a shell reports of `cat` in `cat file | head -1`


def main(argv: list[str] | None = None) -> int:
    """Runs `equipoise` with `argv` (by default the process's) and returns its exit code."""
    return run_command(_dispatch, argv)


def run_command(command: Callable[[list[str]], int], argv: list[str] | None = None) -> int:
    """Calls `command(argv)` (by default the process's arguments) and returns its exit code.

    A UserError, a full disk and a missing right become one line on standard error and code 2, an interrupt code 130, a
    reader of standard output that went away code 141. Any other exception is a defect and keeps its traceback. Of
    several processes that work together, the first one says and returns it for all.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A sentence may hold what the terminal's encoding lacks; show an escape for it.
        sys.stdout.reconfigure(errors="backslashreplace")
    # No figure is shown on a screen. A shell within a notebook has the notebook's backend set, which matplotlib refuses
    # where it is not installed.
    os.environ["MPLBACKEND"] = "agg"
    try:
        try:
            code = command(_terms_accepted(sys.argv[1:] if argv is None else argv))
        except SystemExit as stop:  # a parser's, after printing its help
            if not isinstance(stop.code, int):
                raise
            code = stop.code
        if sys.stdout is not None:
            sys.stdout.flush()  # here and not at exit, where a broken pipe could no longer be caught
        return report(code)
    except UserError as error:
        alike = not isinstance(error, LoneError)
        if is_first() or not alike:
            _say(error)
        return report(EXIT_BAD_INPUT, alike)
    except LostProcess as error:
        _say(error)
        return report(EXIT_LOST_PROCESS, alike=False)
    except KeyboardInterrupt:
        if is_first():
            _say("interrupted")
        return report(EXIT_INTERRUPTED, alike=False)
    except BrokenPipeError:
        # What is still buffered goes nowhere, so that Python's own flush at exit stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in NO_ROOM | NO_RIGHT:
            raise
        alike = getattr(error, "told", False)
        if not alike:
            _say(_refused(error))
        return report(EXIT_BAD_INPUT, alike)


def _say(what: object) -> None:
    """In one line, on standard error."""
    print("equipoise:", " ".join(str(what).split()), file=sys.stderr)


def _refused(error: OSError) -> str:
    """The one line about a disk or a file that the system refuses, wherever that happened."""
    what = error.filename if isinstance(error.filename, str) else "a file"
    remedy = "make room" if error.errno in NO_ROOM else "get the right to read and write it, or name another"
    return f"cannot use {what} ({error.strerror}): {remedy}, then run the same command again"


def _terms_accepted(argv: list[str]) -> list[str]:
    """The command line without --accept-terms, which goes with any command: for this process and those it starts."""
    options = argv[: argv.index("--")] if "--" in argv else argv
    given = [i for i, word in enumerate(options) if word.lower().replace("_", "-") == "--accept-terms"]
    if given:
        from equipoise.policy.packaged import ACCEPT  # only here: `score` and the help do without models

        os.environ[ACCEPT] = "1"
    return [word for i, word in enumerate(argv) if i not in given]


def _dispatch(argv: list[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("--help", "-h"):
        print(_help())
        return 0
    if name == "--version":
        print(f"equipoise {__version__}")
        return 0
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        nearest = difflib.get_close_matches(name, [*COMMANDS, "--help", "--version"], n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]}?" if nearest else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"there is no {kind} {name!r}; {hint}")
    if launched() and name not in SHARED:
        raise UserError(f"`equipoise {name}` runs in one process: start it without torchrun")
    code: int = importlib.import_module(COMMANDS[name][0]).main(rest)
    return code


def _help() -> str:
    return "\n".join(
        [
            "usage: equipoise COMMAND [OPTIONS]",
            "",
            "PPO fine-tuning of language models toward balanced occupational descriptions.",
            "",
            *(f"  {name:<10} {line}" for name, (_, line) in COMMANDS.items()),
            "",
            "--accept-terms, with any command: the terms of use of the model that it names are accepted.",
            "`equipoise COMMAND --help` lists a command's options; `equipoise --version` prints the version.",
        ]
    )
