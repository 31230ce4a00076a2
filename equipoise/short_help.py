"""`--help` with the options that most people need, `--help-all` with all of them."""

import dataclasses
from collections.abc import Collection
from typing import Annotated, Any, get_type_hints

import tyro

ALL = "--help-all"


def shortened(kind: type[Any], default: Any, shown: Collection[str]) -> tuple[type[Any], Any]:
    """(class, default) as `tyro.cli` takes them, whose help shows no options but those of the fields in `shown`.

    Nested dataclasses are shortened too. The class is a subclass, in which tyro still finds the docstrings of the
    fields; it serves to print help.
    """
    hints = get_type_hints(kind, include_extras=True)
    annotations, values = {}, {}
    for field in dataclasses.fields(kind):
        value, annotation = getattr(default, field.name), hints[field.name]
        if dataclasses.is_dataclass(annotation):
            annotation, value = shortened(type(value), value, shown)
        elif field.name not in shown:
            annotation = Annotated[annotation, tyro.conf.Suppress]
        annotations[field.name], values[field.name] = annotation, value
    body = {**values, "__annotations__": annotations, "__module__": kind.__module__}
    if kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("):  # what dataclasses write by themselves
        body["__doc__"] = kind.__doc__
    made: type[Any] = dataclasses.dataclass(frozen=True)(type(kind.__name__, (kind,), body))
    return made, made(**values)
