"""Command-line options from frozen dataclasses, and the YAML file that sets their defaults."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar

import tyro

from equipoise import short_help
from equipoise.documents import read_yaml
from equipoise.errors import UserError
from equipoise.protocol.task import Task, read_task

Config = TypeVar("Config")


def _task_option(optional: bool) -> Any:
    """How `--task FILE` is read and shown. Raises UserError for a file that is no task."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FILE",
        instance_from_str=lambda given: read_task(given[0]),
        is_instance=lambda value: isinstance(value, Task) or (optional and value is None),
        str_from_instance=lambda task: [task.name if task is not None else "the one on record"],
    )


TaskOption = Annotated[Task, _task_option(False)]
"""A field that `--task FILE` sets: a task file, or the name of a packaged task."""
OptionalTask = Annotated[Task | None, _task_option(True)]
"""The same where None stands for the task that is on record with a model or a file."""


def parse(
    kind: type[Config],
    argv: list[str],
    default: Config,
    *,
    prog: str,
    description: str,
    common: Collection[str] = (),
) -> Config:
    """`default` with the options in `argv` applied; nested dataclasses share one flat space of options.

    `--help` prints and exits; where `common` names fields it shows those alone, and `--help-all` shows all.
    Raises UserError, in one line, for an unknown option or a value of the wrong kind.
    """
    argv = spelled(argv)
    if {"--help", "-h", short_help.ALL} & set(argv):
        shown = common if common and short_help.ALL not in argv else None
        short_help.show(kind, default, shown, prog=prog, description=description)
    _refuse_values(argv, default)
    errors = io.StringIO()
    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"  # tyro wraps its messages to the terminal; one line is wanted here
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind,
                args=argv,
                default=default,
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit:
        told = _first_message(errors.getvalue(), [name for name, _ in _all_fields(default)])
        raise UserError(f"{told}; {prog} --help lists the options") from None
    finally:
        if width is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = width


def spelled(argv: Sequence[str], aliases: Mapping[str, str] | None = None) -> list[str]:
    """The command line with its options spelled as they are listed: `--BATCH_SIZE` is `--batch-size`. `aliases`: other
    names of options, without dashes. What comes after a bare `--` is no option."""
    words: list[str] = []
    for i, word in enumerate(argv):
        if word == "--":
            return [*words, *argv[i:]]
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.lower().replace("_", "-")
            word = f"--{(aliases or {}).get(name, name)}{equals}{value}"
        words.append(word)
    return words


def _all_fields(config: Any) -> Iterator[tuple[str, Any]]:
    """(option without dashes, value) of every field, those in groups included."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Task):
            yield from _all_fields(value)
        else:
            yield field.name.replace("_", "-"), value


_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def _refuse_values(argv: Sequence[str], default: Any) -> None:
    """Raises UserError, with what to write instead, where an option that is on or off is given a value."""
    switches = {f"--{name}" for name, value in _all_fields(default) if isinstance(value, bool)}
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        value = value if equals else next(iter(argv[i + 1 : i + 2]), "")
        if name in switches and (equals or value.lower() in _YES + _NO):
            off = value.lower() in _NO
            raise UserError(
                f"{name} takes no value, and was given {value!r}: write {'--no-' if off else '--'}{name[2:]}"
            )


def _nearest(given: str, names: Sequence[str]) -> list[str]:
    """The options that may be meant by a word that is none: one spelled alike, or those with these initials."""
    if not given.startswith("-") and "=" not in given:
        return []
    (word,) = spelled([f"--{given.lstrip('-').partition('=')[0]}"])
    initials = ["".join(part[0] for part in name.split("-")) for name in names]
    return difflib.get_close_matches(word[2:], names, n=1, cutoff=0.7) or [
        name for name, short in zip(names, initials, strict=True) if "-" in name and short == word[2:]
    ]


def _first_message(box: str, names: Sequence[str]) -> str:
    """tyro draws a box; its first paragraph is the message, and a line after "Perhaps you meant" the nearest option."""
    # Its rules and sides are line-drawing characters where standard output can show them, else ASCII or nothing.
    lines = [line.strip("│| \t") for line in box.splitlines()[1:]]
    lines = [line for line in lines if line.strip("╭╮╰╯─+-")]
    # What a dataclass refuses is told as "Error parsing <the dataclass>: …".
    message = re.sub(r"^Error parsing (?!-)[\w.]+: ", "", next(iter(lines), "the options could not be read"))
    if message.startswith("Missing from") and len(lines) > 1:
        message = f"missing: {lines[1].strip().split('  ')[0]}"
    for i, line in enumerate(lines):
        if line.startswith("Perhaps you meant") and i + 1 < len(lines):
            return f"{message.rstrip('.')}; perhaps you meant {lines[i + 1].split()[0].rstrip(',')}"
    unknown = re.match(r"Unrecognized options: ([^,\s]+)", message)
    meant = _nearest(unknown[1], ["help", *names]) if unknown else []
    if meant:
        return f"{message.rstrip('.')}; perhaps you meant {' or '.join(f'--{name}' for name in meant)}"
    return plainly(message.rstrip("."))


_PLAIN = (
    (r"(?:invalid literal for int\(\) with base 10|invalid int value): (.*)", r"{0} {1} is no whole number"),
    (r"(?:could not convert string to float|invalid float value): (.*)", r"{0} {1} is no number"),
    (r"ignored explicit argument (.*)", r"{0} takes no value, and was given {1}: write {0}"),
)


def plainly(message: str) -> str:
    """What a parser says of a value that cannot be, in words that a reader knows."""
    for pattern, words in _PLAIN:
        if found := re.fullmatch(rf"(?:Error parsing|argument) (-\S+): {pattern}", message):
            return words.format(*found.groups())
    return message


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, nested as the dataclasses are or flat. Raises UserError."""
    document = read_yaml(path, "the configuration")
    if not isinstance(document, Mapping):
        raise UserError(f"{path} holds no settings: write one `name: value` a line")
    return underscored(document, str(path))


def underscored(settings: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """The settings by the names that Python has for them. Raises UserError, naming `where`, for one given twice."""
    out: dict[str, Any] = {}
    for given, value in settings.items():
        name = str(given).replace("-", "_")
        if name in out:
            raise UserError(f"{where}: {given} is given twice, with - and with _; remove one of the two")
        out[name] = value
    return out


def flat(config: Any, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`settings` of the dataclass `config` without their groups. Raises UserError, naming `where`, for a setting that
    does not exist, and for one that is given twice."""
    out: dict[str, Any] = {}
    for name, value in _leaves(config, settings, where):
        if name in out:
            raise UserError(f"{where}: {name} is given twice; remove one of the two")
        out[name] = value
    return out


def apply(config: Config, settings: Mapping[str, Any], where: str) -> Config:
    """A copy of the dataclass `config` with `settings`. An unknown name or wrong value is a UserError naming `where`.

    The settings become options and are read as a command line is, all at once: a file can hold nothing that options
    could not, and two settings that must fit each other are judged only as a pair.
    """
    argv = [
        word for name, value in flat(config, settings, where).items() for word in _words(config, name, value, where)
    ]
    try:
        return parse(type(config), argv, config, prog="equipoise", description="")
    except UserError as error:
        raise UserError(f"{where}: {str(error).removesuffix('; equipoise --help lists the options')}") from None


def _leaves(config: Any, settings: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """(name, value) of every setting, those in groups included. Raises UserError for one that does not exist."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    groups = [group for group in fields.values() if dataclasses.is_dataclass(group)]
    for given, value in settings.items():
        name = str(given).replace("-", "_")
        if dataclasses.is_dataclass(fields.get(name)) and isinstance(value, Mapping):
            yield from _leaves(fields[name], value, where)
        elif any(hasattr(group, name) for group in groups) or (name in fields and fields[name] not in groups):
            yield name, value
        elif name in fields:
            raise UserError(f"{where}: {given} is a group of settings, not {value!r}")
        else:
            raise UserError(f"{where}: there is no setting {given!r}; --help lists them (without the dashes)")


def _words(config: Any, name: str, value: Any, where: str) -> list[str]:
    """The setting as words of a command line: a list, where several values may be given, as its option repeated."""
    if isinstance(value, list) and any(isinstance(getattr(each, name, None), tuple) for each in _holders(config)):
        return [_as_option(config, name, each, where) for each in value]
    return [_as_option(config, name, value, where)]


def _holders(config: Any) -> tuple[Any, ...]:
    return (config, *(getattr(config, field.name) for field in dataclasses.fields(config)))


def _as_option(config: Any, name: str, value: Any, where: str) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, Task):
        raise UserError(f"{where}: {name} is a task; name its file")
    if not isinstance(value, (str, int, float, NoneType)):
        raise UserError(f"{where}: {name} is {value!r}, expected a single value")
    if isinstance(value, bool):
        if any(isinstance(getattr(holder, name, None), bool) for holder in _holders(config)):
            return f"--{'' if value else 'no-'}{flag}"
        value = "on" if value else "off"  # YAML reads the bare words so; where no yes or no is wanted they were words
    return f"--{flag}={value}"
