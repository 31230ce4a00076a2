"""Whether a file is this program's own. Nothing else is replaced or deleted, whatever it is named.

Records are JSON objects that say `"written_by": "equipoise"`, first of all, so that a damaged one is known by its first
bytes. Those of earlier versions, which do not say it, are known by their exact shape.
"""

import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from equipoise.documents import parse_json
from equipoise.errors import UserError

WRITTEN_BY = {"written_by": "equipoise"}
OWNER = "records.json"
"""Where a folder of checkpoints says whose it is."""
_BEGINS = b'{"written_by":"equipoise"'


class Found(NamedTuple):
    """What lies where a record is expected."""

    state: Literal["absent", "ours", "damaged", "foreign"]
    """`damaged`: ours by its first bytes, but not to be read. `foreign`: anything else, links among it."""
    document: dict[str, Any]
    """Empty unless it is ours."""


def marked(document: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the field that makes it this program's."""
    return {**WRITTEN_BY, **document}


def look(path: Path, shape: Callable[[Mapping[str, Any]], bool], begins: bytes = b"") -> Found:
    """What lies at `path`. `shape` tells a record that an earlier version wrote, `begins` its first bytes but for white
    space. Raises UserError for a file that cannot be read."""
    try:
        if not os.path.lexists(path):
            return Found("absent", {})
        if not stat.S_ISREG(path.lstat().st_mode):
            return Found("foreign", {})
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): make it readable or choose another folder") from None
    try:
        document = parse_json(data)
    except ValueError:
        start = b"".join(data[:200].split())
        ours = start.startswith(_BEGINS) or bool(begins and start.startswith(begins))
        return Found("damaged" if ours else "foreign", {})
    if not isinstance(document, dict):
        return Found("foreign", {})
    if document.get("written_by") == WRITTEN_BY["written_by"]:
        return Found("ours", document)
    return Found("ours", document) if shape(document) else Found("foreign", {})


def has_provenance(document: Mapping[str, Any]) -> bool:
    """Whether the document says of itself what `runs.records.provenance` does."""
    texts = all(isinstance(document.get(name), str) for name in ("command", "equipoise", "python"))
    return texts and isinstance(document.get("versions"), Mapping)


def is_run(document: Mapping[str, Any]) -> bool:
    """The shape of `run.json` in the folder of a trained model, before records were marked."""
    return isinstance(document.get("config"), Mapping) and has_provenance(document)


def read_run_record(folder: Path) -> Found:
    """`run.json` in the folder of a training."""
    return look(folder / "run.json", is_run, b'{"config":{')


_CHECKPOINTS_OWN = re.compile(r"checkpoint-[0-9]+|nonfinite")


def refuse_checkpoints_own(folder: Path, option: str, checkpoints: Path | None = None) -> None:
    """Raises UserError where `folder` is, or lies in, a folder that a run makes for a checkpoint: in `checkpoints`, or
    beside a run's record of its checkpoints."""
    place = folder.resolve()
    for path in (place, *place.parents):
        beside = checkpoints is not None and path.parent == checkpoints.resolve()
        if _CHECKPOINTS_OWN.fullmatch(path.name) and (beside or os.path.lexists(path.parent / OWNER)):
            raise UserError(
                f"{folder} is where training keeps its {path.name}, and nothing else may lie there: choose another "
                f"{option}"
            )
