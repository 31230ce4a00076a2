"""What a report is made of: a finished evaluation, a study, or completions files that are evaluated first."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from equipoise.documents import read_json
from equipoise.errors import UserError
from equipoise.evaluation import stored
from equipoise.evaluation.config import EvaluateConfig
from equipoise.evaluation.evaluate import evaluate
from equipoise.evaluation.files import prepared, write
from equipoise.evaluation.inputs import told
from equipoise.evaluation.results import Evaluation
from equipoise.evaluation.runs import CURVES
from equipoise.runs.progress import Progress

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
    study: Mapping[str, Any] = field(default_factory=dict)
    runs: Sequence[Path] = ()
    """Folders of training runs that the study names."""


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
        return Given(None, tuple(paths))
    folder = Path(folders[0])
    if (folder / "evaluation.json").exists():
        return Given(folder, ())
    if (folder / STUDY).exists():
        study = _read_study(folder / STUDY)
        files = tuple(str(path) for path in _completions(study, folder))
        if not files:
            raise UserError(f"{folder / STUDY} names no completions file that exists: run the study to its end")
        return Given(None, files, study, _trained(study))
    raise UserError(
        f"{folder} holds neither evaluation.json nor {STUDY}: give the --output of `equipoise evaluate` or "
        "`equipoise study`, or completions files"
    )


def measured(
    given: Given, config: EvaluateConfig, say: Callable[[str], None], progress: Callable[[int, int], None] | None
) -> Source:
    """The finished evaluation, or one made now with `config` and written to its `output`. Raises UserError.

    `progress`: told how many texts are done, of how many; by default a bar of its own.
    """
    if given.folder is not None:
        evaluation = stored.read(given.folder)
        if config.task is not None and config.task != evaluation.task:
            raise UserError(
                f"{given.folder} was measured by another task ({told(evaluation.task, config.task)}): "
                "leave --task out, or give the completions files to measure them by it"
            )
        return Source(evaluation, given.folder / "rows.csv", given.study)
    with Progress(sys.stderr, unit="texts") as bar:
        evaluation, rows, judged = evaluate(config, say, progress or bar)
    with prepared(config.output):
        write(config.output, evaluation, rows, judged)
    return Source(evaluation, config.output / "rows.csv", given.study)


def _read_study(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): run the study again") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is not as `equipoise study` writes it: run the study again")
    return document


def _completions(study: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Every completions file that the study's methods name and that exists."""
    methods = study.get("methods")
    for entry in methods.values() if isinstance(methods, Mapping) else ():
        name = entry.get("completions") if isinstance(entry, Mapping) else None
        if isinstance(name, str) and (folder / name).is_file():
            yield folder / name


def _trained(study: Mapping[str, Any]) -> list[Path]:
    """The folder of the model trained with PPO, where the study had one and its curves are still there."""
    settings = study.get("settings")
    folder = settings.get("trained") if isinstance(settings, Mapping) else None
    return [Path(folder)] if isinstance(folder, str) and (Path(folder) / CURVES).is_file() else []


def unfinished(study: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(method, what happened) of the study's methods that are not done."""
    methods = study.get("methods")
    entries = methods.items() if isinstance(methods, Mapping) else ()
    told = [(str(name), str(entry.get("status"))) for name, entry in entries if isinstance(entry, Mapping)]
    return [(name, status) for name, status in told if status != "done"]
