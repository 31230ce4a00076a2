"""The command that was typed, fit to be pasted into a shell again."""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TOLD = "EQUIPOISE_COMMAND"
"""The environment's variable in which a process that was started by another finds what was typed."""
MADE = "EQUIPOISE_MAKE"
"""The one in which the Makefile says what make was asked for: its goal and the variables set on its command line."""


def typed(
    argv: Sequence[str] | None = None,
    original: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What started this process: `equipoise …`, `python train_rlhf.py …`, `make train …`, each word quoted for a shell.

    By default of `sys.argv`, `sys.orig_argv` and `os.environ`. Of the two programs' own paths only the names are kept:
    a shell may have found them.
    """
    argv = sys.argv if argv is None else argv
    original = sys.orig_argv if original is None else original
    environment = os.environ if environment is None else environment
    if told := environment.get(TOLD):
        return told
    if made := environment.get(MADE):
        return _made(made, environment.get("ARGS", ""))
    name = Path(argv[0]).name if argv else ""
    if name == "equipoise" or not original:
        return shlex.join([name, *argv[1:]])
    return shlex.join([Path(original[0]).name, *original[1:]])


def _made(text: str, inherited: str) -> str:
    """make's command from its goal and MAKEOVERRIDES, in which make has put a backslash before spaces and backslashes
    and doubled each dollar sign of what was typed. `inherited`: ARGS of the environment."""
    words = [re.sub(r"\\(.)", r"\1", word, flags=re.S) for word in re.findall(r"(?:\\.|[^\\\s])+", text, re.S)]
    goal, given = words[0], [word.replace("$$", "$").partition("=") for word in words[1:]]
    command = " ".join(["make", goal, *(f"{name}={shlex.quote(value)}" for name, _, value in given)])
    from_line = any(name.rstrip(":?+") == "ARGS" for name, _, _ in given)
    return f"ARGS={shlex.quote(inherited)} {command}" if inherited and not from_line else command
