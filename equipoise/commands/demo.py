"""`equipoise demo`: what this is about, in a minute: a recorded run replayed, a model sampled, a small report."""

import importlib
import os
import shlex
import sys
import threading
import webbrowser
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise import __version__
from equipoise.errors import UserError
from equipoise.options import parse
from equipoise.ppo.replay import RECORDED, Recorded, read_recorded, replay
from equipoise.protocol.lexicon import Piece
from equipoise.protocol.marking import legend, pieces
from equipoise.protocol.plural import plural
from equipoise.protocol.task import Task
from equipoise.runs.calling import program
from equipoise.runs.console import Console, Row, quiet
from equipoise.runs.files import write_json
from equipoise.runs.locks import LOCK, locked_folder
from equipoise.runs.ownership import look, marked

if TYPE_CHECKING:
    from equipoise.methods.prompted import Prompted

EACH = 3
"""Sentences of each occupation."""
RECORD = "demo.json"
"""What tells the folder of an earlier demo from somebody else's."""
HIDDEN_STATES, DISTILLED = 64, 5000
"""Of the packaged hidden Markov model."""


@dataclass(frozen=True)
class DemoConfig:
    """Where the demo's files go, and what it does with the report."""

    output_dir: Path = Path("demo")
    """Folder for the sentences and the report. That of an earlier demo is made anew."""
    browser: bool = True
    """Open the report in a browser, where there is a display and standard output is a terminal."""
    replay_seconds: float = 12.0
    """How long the recorded run is replayed on a terminal. Elsewhere its lines come at once."""
    model: str = "bundled"
    """What is sampled, under its prompt and with Ctrl-G. The packaged hidden Markov model is the bundled model's."""

    def __post_init__(self) -> None:
        if not 0 <= self.replay_seconds <= 600:
            raise UserError(f"--replay-seconds {self.replay_seconds:g} must lie between 0 and 600; 12 is usual")


def main(argv: list[str]) -> int:
    """Show it all. Returns the exit code; raises UserError."""
    config = parse(
        DemoConfig,
        argv,
        DemoConfig(),
        prog="equipoise demo",
        description="In a minute and without training: a recorded run is replayed, the bundled model is sampled as it "
        "is and with Ctrl-G, and a small report is written.",
    )
    quiet()
    folder = config.output_dir
    _check_folder(folder)
    with locked_folder(folder, f"a demo writes to {folder}: wait for it, or choose another --output-dir"):
        write_json(folder / RECORD, marked({"equipoise": __version__}))  # first of all: what lies beside it is ours
        return demo(config, read_recorded(RECORDED))


def demo(config: DemoConfig, run: Recorded) -> int:
    """The stages, one after the other. Returns the exit code; raises UserError."""
    console = Console(sys.stdout, len(run.steps), task=run.task, target_kl=run.record["config"]["ppo"]["target_kl"])
    console.say(f"equipoise {__version__}: a training run, replayed; then the model itself, here and now")
    console.say(f"replay: {run.describe()}")
    threading.Thread(target=_load_ahead, daemon=True).start()
    replay(run, console, config.replay_seconds if sys.stdout.isatty() else 0.0)

    console = Console(sys.stdout, 0, task=run.task, transient=True)
    console.say("from here on all is computed on this machine")
    files = {"RLHF": _write_recorded(config.output_dir / "rlhf.csv", run)}
    try:
        texts = {"RLHF": _first(run)}
        code = _sample(config, run.task, console, files, texts)
        if code:
            return code
        page = config.output_dir / "report.html"
        with console.stage("measuring the sentences and drawing the report"):
            _report(page, [*files.values()], run)
    finally:
        console.close()
    _close(console, config, run.task, texts, page)
    return 0


def _load_ahead() -> None:
    """Import what the next stage needs while the replay waits. What goes wrong here goes wrong there again."""
    with suppress(Exception):
        importlib.import_module("equipoise.methods.guided")


def _check_folder(folder: Path) -> None:
    """Raises UserError for a folder that holds anything and was not made by a demo."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"--output-dir {folder} is no folder: choose another")
    there = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if there and look(folder / RECORD, lambda _: False).state not in ("ours", "damaged"):
        raise UserError(
            f"{folder} holds {there[0]} and no demo made it (it has no {RECORD}): move it away, or choose another "
            "--output-dir"
        )


def _first(run: Recorded) -> dict[tuple[str, int], str]:
    """The recorded sentences of the trained model that are shown: of each occupation the first ones."""
    counts: dict[str, int] = {}
    found = {}
    for occupation, text in run.final:
        counts[occupation] = number = counts.get(occupation, 0) + 1
        if number <= EACH:
            found[occupation, number] = text
    return found


def _write_recorded(path: Path, run: Recorded) -> Path:
    """Those sentences as a file like any method's."""
    from equipoise.methods.completions import COMPARED, Completions, Key

    settings = {"Model": "recorded", "Label": "RLHF", "Method": "ppo", "Seed": run.summary["seed"], "recorded": True}
    with Completions(path, settings, run.task, EACH, True, COMPARED) as file:
        file.start({"command": run.record["command"]})
        file.append({Key(*key): text for key, text in _first(run).items()})
        file.finish()
    return path


def _sample(
    config: DemoConfig,
    task: Task,
    console: Console,
    files: dict[str, Path],
    texts: dict[str, Mapping[tuple[str, int], str]],
) -> int:
    """Sentences of the untrained model, and of the same model with Ctrl-G. Returns the exit code."""
    with console.stage("loading PyTorch"):
        from equipoise.methods.ctrlg.config import CtrlGConfig
        from equipoise.methods.guided import Guided
        from equipoise.methods.prompted import Prompted
        from equipoise.policy.config import PolicyConfig, SamplingConfig

        policy, common = PolicyConfig(config.model), {"prompt": None, "seed": 0, "batch_size": len(task.names)}
        plain = Prompted(policy, sampling=SamplingConfig(1.0, 0.95, 32), task=task, **common)
    with console.stage(f"{plain.name}, untrained"):
        plain.load(console.say)
    files["Prompt-Only"] = config.output_dir / "prompt-only.csv"
    code = _write(plain, files["Prompt-Only"], "prompt-only", console, texts)
    if code:
        return code
    guidance = CtrlGConfig(hidden_states=HIDDEN_STATES, distil_sentences=DISTILLED)
    guided = Guided(policy, guidance, sampling=SamplingConfig(1.0, 1.0, 32), task=task, **common)
    guided.policy, guided.may_distil = plain.policy, False
    with console.stage("Ctrl-G: building automaton and look-ahead"):
        guided.load(console.say)
    files["Ctrl-G"] = config.output_dir / "ctrl-g.csv"
    return _write(guided, files["Ctrl-G"], "ctrlg", console, texts)


def _write(
    writer: "Prompted",
    path: Path,
    method: str,
    console: Console,
    texts: dict[str, Mapping[tuple[str, int], str]],
) -> int:
    from equipoise.methods.completions import COMPARED, Completions, all_keys
    from equipoise.methods.generate import Caller, tell_of_batch, write_all
    from equipoise.methods.sample import LABELS
    from equipoise.runs.signals import StopSignals

    label = LABELS[method]
    settings: dict[str, Any] = {"Model": writer.name, "Label": label, "Method": method, "Seed": 0, **writer.settings}
    keys = all_keys(EACH, writer.task.names)
    with (
        console.stage(f"{label}: {plural(len(keys), 'sentence')}") as stage,
        StopSignals(tell_of_batch) as stop,
        Completions(path, settings, writer.task, EACH, True, COMPARED) as file,
    ):
        outcome = write_all(writer, file, keys, Caller(stop, lambda line: None, stage))
    texts[label] = {(key.occupation, key.run_id): text for key, text in outcome.texts.items()}
    return outcome.exit_code


def _report(page: Path, files: list[Path], run: Recorded) -> None:
    from equipoise.evaluation.assemble import report
    from equipoise.evaluation.config import ReportConfig

    report(ReportConfig(tuple(map(str, files)), page, run=(run.folder,)), lambda line: None)


NAMES = {"Prompt-Only": "untrained", "RLHF": "PPO", "Ctrl-G": "Ctrl-G"}


def _close(
    console: Console, config: DemoConfig, task: Task, texts: Mapping[str, Mapping[tuple[str, int], str]], page: Path
) -> None:
    """The sentences side by side, where everything is, and what to do next."""
    occupation = task.names[0]
    rows: list[Row] = [("terms", [*legend(task.labels), Piece(f" in the first sentences about: {occupation}")])]
    for label, name in NAMES.items():
        own = [text for (about, _), text in texts[label].items() if about == occupation]
        rows += [(name if i == 0 else "", pieces(text, task.lexicon)) for i, text in enumerate(own)]
    for label, name in NAMES.items():
        found = [*texts[label].values()]
        both, strict = sum(task.match(t).complete for t in found), sum(map(task.strict, found))
        origin = "recorded" if label == "RLHF" else "sampled now"
        told = f"{name}: {task.all_classes} in {both} of {len(found)} sentences, strict success in {strict}; {origin}"
        rows.append(("shares" if name == "untrained" else "", [Piece(told)]))
    console.table([*rows, ("report", [Piece(str(page))])])
    opened = config.browser and _has_display() and webbrowser.open(page.resolve().as_uri())
    if opened:
        console.say("  (opened in a browser)")
    for command in ("train", shlex.join(["sample", "--method", "ctrlg", "--n", "25"]), "study"):
        console.say(f"  {'next' if command == 'train' else '':<11}{program()} {command}")


def _has_display() -> bool:
    """Whether someone looks at a screen that can show a page: never in a pipe, a test, CI, or over a plain ssh."""
    ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    screen = sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return sys.stdout.isatty() and not ci and "PYTEST_CURRENT_TEST" not in os.environ and bool(screen)
