"""`--help` with the options that most people need, `--help-all` with all of them."""

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import os
import shutil
import sys
import textwrap
from collections.abc import Collection
from typing import Annotated, Any, NoReturn, get_type_hints

import tyro

ALL = "--help-all"


def show(kind: type[Any], default: Any, shown: Collection[str] | None, *, prog: str, description: str) -> NoReturn:
    """Print the help of a dataclass's options, or of those in `shown` alone, and exit with code 0."""
    if shown is not None:
        description = f"{description} {ALL} lists the other options too."
    made, values = told(kind, default, shown)
    page = _Page()
    try:
        with contextlib.redirect_stdout(page):
            tyro.cli(
                made, args=["--help"], default=values, prog=prog, description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )  # fmt: skip
    finally:
        # tyro leaves the description on one line, which a terminal would break within words.
        width = max(40, shutil.get_terminal_size().columns - 1)
        print(page.getvalue().replace(description, textwrap.fill(description, width, break_on_hyphens=False)), end="")
    raise SystemExit(0)


def told(kind: type[Any], default: Any, shown: Collection[str] | None) -> tuple[type[Any], Any]:
    """(class, default) as `tyro.cli` takes them, whose help shows no options but those of the fields in `shown`; None
    shows all.

    Nested dataclasses are treated alike. The class is a subclass that serves to print help; in it each field has its
    docstring in one piece, which tyro would break where the source does.
    """
    hints, docs = get_type_hints(kind, include_extras=True), field_docs(kind)
    annotations, values = {}, {}
    for field in dataclasses.fields(kind):
        value, annotation = getattr(default, field.name), hints[field.name]
        if dataclasses.is_dataclass(annotation):
            annotation, value = told(type(value), value, shown)
        elif shown is not None and field.name not in shown:
            annotation = Annotated[annotation, tyro.conf.Suppress]
        elif field.name in docs:
            annotation = Annotated[annotation, tyro.conf.arg(help=docs[field.name])]
        annotations[field.name], values[field.name] = annotation, value
    body = {**values, "__annotations__": annotations, "__module__": kind.__module__}
    if kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("):  # what dataclasses write by themselves
        body["__doc__"] = kind.__doc__
    made: type[Any] = dataclasses.dataclass(frozen=True)(type(kind.__name__, (kind,), body))
    return made, made(**values)


def field_docs(kind: type[Any]) -> dict[str, str]:
    """The docstring below each field of a dataclass, on one line; none where there is no source to read."""
    docs: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                text = below.value.value if isinstance(below.value, ast.Constant) else None
                if isinstance(text, str):
                    docs[field.target.id] = " ".join(text.split())
    return docs


class _Page(io.StringIO):
    """What help is written to first; it looks like standard output, but is no terminal where no colours are wanted."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(sys.__stdout__, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return not os.environ.get("NO_COLOR") and sys.__stdout__ is not None and sys.__stdout__.isatty()
