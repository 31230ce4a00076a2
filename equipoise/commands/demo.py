"""`equipoise demo`: what this is about, in a minute: a recorded run replayed, a model sampled, a small report."""

import importlib
import os
import sys
import threading
import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise import __version__
from equipoise.errors import UserError
from equipoise.options import parse
from equipoise.ppo.replay import RECORDED, Recorded, read_recorded, replay
from equipoise.protocol.lexicon import Piece
from equipoise.protocol.marking import legend, pieces
from equipoise.protocol.plural import plural
from equipoise.runs.calling import program
from equipoise.runs.console import LABEL, Console, Row, quiet
from equipoise.runs.files import write_json
from equipoise.runs.locks import LOCK, locked_folder
from equipoise.runs.ownership import look, marked

if TYPE_CHECKING:
    from equipoise.methods.prompted import Prompted
    from equipoise.methods.sample import Method

EACH = 3
"""Sentences of each occupation."""
RECORD = "demo.json"
"""What tells the folder of an earlier demo from somebody else's."""
HIDDEN_STATES, DISTILLED = 64, 5000
"""Of the packaged hidden Markov model."""
CANDIDATES = 2
"""Of each sentence of Ctrl-G: the likelier one reads better, and twice the time is seconds."""
NAMES = {"Prompt-Only": "untrained", "RLHF": "PPO", "Ctrl-G": "Ctrl-G"}
"""What a person reads in place of a method's label."""


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
    print(f"equipoise {__version__}: a training run, replayed; then the model itself, here and now", flush=True)
    print(f"replay: {run.describe()}; its times are shown", flush=True)
    threading.Thread(target=_load_ahead, daemon=True).start()
    replay(run, sys.stdout, config.replay_seconds if sys.stdout.isatty() else 0.0)
    console = Console(sys.stdout, 0, task=run.task, transient=True)
    console.say("from here on all is computed on this machine")
    live = Live(config, run, console)
    try:
        live.write_recorded()
        if code := live.sample():
            return code
        page = live.report()
    finally:
        console.close()
    live.close(page)
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
        raise UserError(f"{folder} is a file or a link, and no folder: choose another --output-dir")
    there = sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    if there and look(folder / RECORD, lambda _: False).state not in ("ours", "damaged"):
        raise UserError(
            f"{folder} holds {there[0]} and no demo made it (it has no {RECORD}): move it away, or choose another "
            "--output-dir"
        )


class Live:
    """What is computed here: sentences, files, report."""

    def __init__(self, config: DemoConfig, run: Recorded, console: Console) -> None:
        self.config, self.run, self.task, self.console = config, run, run.task, console
        self.files: dict[str, Path] = {}
        """Of each method by its label."""
        self.texts: dict[str, dict[tuple[str, int], str]] = {}
        """Its sentences, by occupation and number."""

    def write_recorded(self) -> None:
        """Of the trained model's recorded sentences the first of each occupation, as a file like any method's."""
        from equipoise.methods.completions import COMPARED, Completions, Key

        counts: dict[str, int] = {}
        texts: dict[tuple[str, int], str] = {}
        for occupation, text in self.run.final:
            counts[occupation] = number = counts.get(occupation, 0) + 1
            if number <= EACH:
                texts[occupation, number] = text
        path, seed = self.config.output_dir / "rlhf.csv", self.run.summary["seed"]
        settings = {"Model": "recorded", "Label": "RLHF", "Method": "ppo", "Seed": seed, "recorded": True}
        with Completions(path, settings, self.task, EACH, True, COMPARED) as file:
            file.start({"command": self.run.record["command"]})
            file.append({Key(*key): text for key, text in texts.items()})
            file.finish()
        self.files["RLHF"], self.texts["RLHF"] = path, texts

    def sample(self) -> int:
        """Sentences of the untrained model, and of the same model with Ctrl-G. Returns the exit code."""
        task, console = self.task, self.console
        with console.stage("loading PyTorch"):
            from equipoise.methods.ctrlg.config import CtrlGConfig
            from equipoise.methods.guided import Guided
            from equipoise.methods.prompted import Prompted
            from equipoise.policy.config import PolicyConfig, SamplingConfig

            policy, batch = PolicyConfig(self.config.model), len(task.names)
            nucleus, all_of_it = SamplingConfig(1.0, 0.95, 32), SamplingConfig(1.0, 1.0, 32)
            plain = Prompted(policy, prompt=None, sampling=nucleus, seed=0, batch_size=batch, task=task)
        with console.stage(f"{plain.name}, untrained"):
            plain.load(console.say)
        if code := self._write(plain, "prompt-only"):
            return code
        guidance = CtrlGConfig(hidden_states=HIDDEN_STATES, distil_sentences=DISTILLED, candidates=CANDIDATES)
        try:
            with console.stage("Ctrl-G: building automaton and look-ahead"):
                guided = Guided(policy, guidance, prompt=None, sampling=all_of_it, seed=0, batch_size=batch, task=task)
                guided.policy, guided.may_distil = plain.policy, False
                guided.load(console.say)
        except UserError as error:  # another model than the one that the packaged HMM is of
            console.say(f"Ctrl-G is left out: {error}")
            return 0
        return self._write(guided, "ctrlg")

    def _write(self, writer: "Prompted", method: "Method") -> int:
        from equipoise.methods.completions import COMPARED, Completions, all_keys
        from equipoise.methods.generate import Caller, tell_of_batch, write_all
        from equipoise.methods.sample import LABELS
        from equipoise.runs.signals import StopSignals

        label, keys = LABELS[method], all_keys(EACH, self.task.names)
        path = self.config.output_dir / f"{method}.csv"
        settings = {"Model": writer.name, "Label": label, "Method": method, "Seed": 0, **writer.settings}
        with (
            self.console.stage(f"{label}: {plural(len(keys), 'sentence')}") as stage,
            StopSignals(tell_of_batch) as stop,
            Completions(path, settings, self.task, EACH, True, COMPARED) as file,
        ):
            outcome = write_all(writer, file, keys, Caller(stop, _unseen, stage))
        if outcome.status != "done":
            self.console.say(f"stopped in {label}'s sentences; the same command begins again")
        self.files[label] = path
        self.texts[label] = {(key.occupation, key.run_id): text for key, text in outcome.texts.items()}
        return outcome.exit_code

    def report(self) -> Path:
        """Write the report and say where it is."""
        with self.console.stage("measuring the sentences and drawing the report") as stage:
            from equipoise.evaluation.assemble import report
            from equipoise.evaluation.config import ReportConfig

            page, files = self.config.output_dir / "report.html", tuple(map(str, self.files.values()))
            report(ReportConfig(files, page, run=(self.run.folder,), judge=(self.config.model,)), _unseen, stage)
        return page

    def close(self, page: Path) -> None:
        """The sentences side by side, where everything is, and what to do next."""
        task, occupation = self.task, self.task.names[0]
        rows: list[Row] = [("terms", [*legend(task.labels), Piece(f" in the first sentences about: {occupation}")])]
        shown = {label: name for label, name in NAMES.items() if label in self.texts}
        for label, name in shown.items():
            own = [text for (about, _), text in self.texts[label].items() if about == occupation]
            rows += [(name if i == 0 else "", pieces(text, task.lexicon)) for i, text in enumerate(own)]
        for label, name in shown.items():
            found = [*self.texts[label].values()]
            both, strict = sum(task.match(t).complete for t in found), sum(map(task.strict, found))
            origin = "recorded" if label == "RLHF" else "sampled now"
            told = f"{name}: {task.all_classes} in {both} of {len(found)}, strict success in {strict}; {origin}"
            rows.append(("shares" if name == "untrained" else "", [Piece(told)]))
        self.console.table(rows)
        opened = self.config.browser and _has_display() and webbrowser.open(page.resolve().as_uri())
        self.console.say(f"  {'report':<{LABEL + 2}}{page}{' (opened in a browser)' if opened else ''}")
        for i, command in enumerate(("train", "sample --method ctrlg --n 25", "study")):
            self.console.say(f"  {'next' if i == 0 else '':<{LABEL + 2}}{program()} {command}")


def _unseen(line: str) -> None:
    """A notice that the stage's own line says enough of."""


def _has_display() -> bool:
    """Whether someone looks at a screen that can show a page: never in a pipe, a test, CI, or over a plain ssh."""
    ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    screen = sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return sys.stdout.isatty() and not ci and "PYTEST_CURRENT_TEST" not in os.environ and bool(screen)
