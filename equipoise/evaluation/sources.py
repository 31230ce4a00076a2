"""What a report is made of: a finished evaluation, a study, or completions files that are evaluated first."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.errors import UserError
from equipoise.evaluation import results
from equipoise.evaluation.command import Progress, write
from equipoise.evaluation.evaluate import EvaluateConfig, evaluate
from equipoise.evaluation.results import Evaluation

STUDY = "study.json"


class Source(NamedTuple):
    """An evaluation and its rows.csv; `study` is study.json, empty where there is none."""

    evaluation: Evaluation
    rows: Path
    study: Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """What the paths of a command line are."""

    folder: Path | None
    """A finished evaluation."""
    files: tuple[str, ...]
    """Completions files otherwise, as NAME=FILE where the name is known."""
    study: Mapping[str, Any]


def recognise(paths: Sequence[str]) -> Given:
    """What `paths` are, before anything takes long. Raises UserError."""
    if not paths:
        raise UserError(
            "nothing to report on: give the folder of `equipoise evaluate` or `equipoise study`, or completions files"
        )
    folders = [path for path in paths if Path(path).is_dir()]
    if folders and len(paths) > 1:
        raise UserError(f"{folders[0]} is a folder: give it alone, or give the completions files")
    for path in paths:
        if not Path(path).exists() and not ("=" in path and Path(path.partition("=")[2]).is_file()):
            raise UserError(f"{path} does not exist: give an evaluation folder, a study folder or completions files")
    if not folders:
        return Given(None, tuple(paths), {})
    folder = Path(folders[0])
    if (folder / "evaluation.json").exists():
        return Given(folder, (), {})
    if (folder / STUDY).exists():
        study = _read_study(folder / STUDY)
        files = tuple(f"{name}={path}" for name, path in _completions(study, folder))
        if not files:
            raise UserError(f"{folder / STUDY} names no completions file that exists: run the study to its end")
        return Given(None, files, study)
    raise UserError(
        f"{folder} holds neither evaluation.json nor {STUDY}: give the --output of `equipoise evaluate` or "
        "`equipoise study`, or completions files"
    )


def measured(given: Given, config: EvaluateConfig, say: Callable[[str], None]) -> Source:
    """The finished evaluation, or one made now with `config` and written to its `output`. Raises UserError."""
    if given.folder is not None:
        return Source(results.read(given.folder), given.folder / "rows.csv", given.study)
    evaluation, rows, judged = evaluate(config, say, Progress())
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {config.output} ({error.strerror}): choose another --output") from None
    write(config.output, evaluation, rows, judged)
    return Source(evaluation, config.output / "rows.csv", given.study)


def _read_study(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): run the study again") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is not as `equipoise study` writes it: run the study again")
    return document


def _completions(study: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Path]]:
    """(method, file) of every completions file that the study's methods name and that exists."""
    methods = study.get("methods", {})
    entries = methods.items() if isinstance(methods, Mapping) else ((_name(entry), entry) for entry in methods)
    for name, entry in entries:
        for text in dict.fromkeys(_texts(entry)):
            if text.endswith(".csv") and (folder / text).is_file():
                yield name, folder / text


def _name(entry: Any) -> str:
    return str(next((entry[key] for key in ("name", "method", "label") if key in entry), "method"))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
