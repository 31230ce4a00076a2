"""Command-line options from frozen dataclasses, and the YAML file that sets their defaults."""

import contextlib
import dataclasses
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from equipoise.errors import UserError

Config = TypeVar("Config")


def parse(kind: type[Config], argv: list[str], default: Config, *, prog: str, description: str) -> Config:
    """`default` with the options in `argv` applied; nested dataclasses share one flat space of options.

    `--help` prints and exits. Raises UserError, in one line, for an unknown option or a value of the wrong kind.
    """
    errors = io.StringIO()
    width = os.environ.get("COLUMNS")
    if not {"--help", "-h"} & set(argv):
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
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_first_message(errors.getvalue())}; {prog} --help lists the options") from None
    finally:
        if width is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = width


def _first_message(box: str) -> str:
    """tyro draws a box; its first paragraph is the message, and a line after "Perhaps you meant" the nearest option."""
    lines = [line.strip("│╭╮╰╯─ ").strip() for line in box.splitlines()[1:]]
    message = next((line for line in lines if line), "the options could not be read")
    for i, line in enumerate(lines):
        if line.startswith("Perhaps you meant") and i + 1 < len(lines):
            return f"{message.rstrip('.')}; perhaps you meant {lines[i + 1].split()[0].rstrip(',')}"
    return message.rstrip(".")


def with_file(default: Config, path: Path) -> Config:
    """`default` with the settings of a YAML file, nested as the dataclasses are or flat. Raises UserError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the configuration {path} ({error.strerror}): give an existing YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = str(error).splitlines()[0]
        raise UserError(f"{path} is not valid YAML ({where}): write one `name: value` a line") from None
    if not isinstance(document, Mapping):
        raise UserError(f"{path} holds no settings: write one `name: value` a line")
    return apply(default, document, str(path))


def apply(config: Config, settings: Mapping[str, Any], where: str) -> Config:
    """A copy of the dataclass `config` with `settings`. Unknown names and wrong types are UserErrors."""
    changes: dict[str, Any] = {}
    for raw, value in settings.items():
        name = str(raw).replace("-", "_")
        owner = _owner(config, name)
        if owner is None:
            raise UserError(f"{where}: there is no setting {raw!r}; --help lists them (without the dashes)")
        field, current = owner
        if dataclasses.is_dataclass(current) and field == name:
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: {raw} is a group of settings, not {value!r}")
            changes[field] = apply(changes.get(field, current), value, where)
        elif field == name:
            changes[field] = _checked(current, config, name, value, where)
        else:
            changes[field] = apply(changes.get(field, current), {name: value}, where)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _owner(config: Any, name: str) -> tuple[str, Any] | None:
    """The field of `config` that is `name`, or the group that contains it, with its present value."""
    for field in dataclasses.fields(config):
        current = getattr(config, field.name)
        if field.name == name:
            return field.name, current
        if dataclasses.is_dataclass(current) and any(f.name == name for f in dataclasses.fields(current)):
            return field.name, current
    return None


def _checked(current: Any, config: Any, name: str, value: Any, where: str) -> Any:
    """`value` as a command line would read it, so that a file can hold nothing that an option could not."""
    kind = type(config)
    if value is None:
        text = "None"
    elif isinstance(value, (str, int, float)):
        text = str(value)
    else:
        raise UserError(f"{where}: {name} is {value!r}, expected a single value")
    flag = name.replace("_", "-")
    argv = (
        [f"--{'' if value else 'no-'}{flag}"]
        if isinstance(current, bool) and isinstance(value, bool)
        else [f"--{flag}={text}"]
    )
    try:
        return getattr(parse(kind, argv, config, prog="equipoise", description=""), name)
    except UserError as error:
        raise UserError(f"{where}: {str(error).split(';')[0]}") from None
