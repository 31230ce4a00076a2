"""The screen at the end of a run, from records."""

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path
from struct import pack

import pytest

from equipoise.ppo.closing import before_and_after, curve, next_steps, show
from equipoise.ppo.replay import RECORDED, read_recorded
from equipoise.ppo.run_config import RunConfig
from equipoise.ppo.summary import FINAL, UNTRAINED, sentences
from equipoise.ppo.train import train
from equipoise.protocol.marking import in_marks, printable
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.calling import program
from equipoise.runs.console import Console
from tests.ppo.small import results, small_config
from tests.runs.test_console import environment, read_terminal, without_escapes
from tests.tiny import tiny_folder

BEFORE = [
    "The architect was a man of vision, who had been working on plans for the new museum downtown since early spring",
    "The architect was tired.",
    "The architect was a woman with a caring heart.",
]
AFTER = [
    "The architect was confident and compassionate, always ready to help the team.",
    "The architect was bold, caring and decisive in all that she set out to do.",
    "The architect was loyal to her clients and ambitious in her designs.",
]


def records(folder: Path, rewards: list[float]) -> RunConfig:
    output = folder / "out"
    output.mkdir()
    rows = [{"step": i + 1, "reward/mean": r, "compliance/both": 0.5} for i, r in enumerate(rewards)]
    (output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, texts in (("untrained", BEFORE), ("final", [*AFTER, "The architect was a fourth."])):
        lines = [{"occupation": "artist", "run_id": 1, "text": "The artist was bold."}] if name == "final" else []
        lines += [{"occupation": "architect", "run_id": i + 1, "text": text} for i, text in enumerate(texts)]
        (output / f"{name}_sentences.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunConfig(str(output), str(folder / "checkpoints"), str(folder / "runs"))


SUMMARY = dict(read_recorded(RECORDED).summary)
CHILD = """
import json, sys
from equipoise.ppo.closing import show
from equipoise.ppo.run_config import RunConfig
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.console import Console
console = Console(sys.stdout, 3, task=PROTOCOL)
with console.stage("training"):
    pass
console.close()
print("END OF BAR")
show(console, PROTOCOL, json.loads(sys.argv[1]), RunConfig(*sys.argv[2:5]))
"""


def on_terminal(run: RunConfig, columns: int, **env: str) -> list[str]:
    """The lines of the screen, on a terminal so wide."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, pack("HHHH", 24, columns, 0, 0))
    # From the folder that holds the run's, whose names are short there.
    command = [sys.executable, "-c", CHILD, json.dumps(SUMMARY), "out", "checkpoints", "runs"]
    where, variables = Path(run.output_dir).parent, environment(**env)
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=variables, cwd=where)
    os.close(theirs)
    seen = b""
    while chunk := read_terminal(ours):
        seen += chunk
    os.close(ours)
    assert process.wait(timeout=60) == 0, seen.decode()
    return seen.decode().replace("\r\n", "\n").split("END OF BAR\n")[1].splitlines()


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
ENVIRONMENTS = {"colours": {}, "NO_COLOR": {"NO_COLOR": "1"}, "dumb": {"TERM": "dumb"}, "C": ASCII}


@pytest.mark.parametrize("env", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
@pytest.mark.parametrize("columns", [80, 200])
def test_nothing_wraps_within_the_screen(tmp_path: Path, columns: int, env: dict[str, str]) -> None:
    run = records(tmp_path, [0.2, 0.5, 0.9])
    lines = on_terminal(run, columns, **env)
    plain = [without_escapes(line) for line in lines]
    commands = next(i for i, line in enumerate(plain) if line.startswith("  next"))
    assert max(map(len, plain[:commands])) <= columns
    assert max(map(len, plain[:commands])) > (0.75 * columns if columns == 80 else 100), "the width is used"
    # A text goes on below its own beginning, and is whole.
    together = re.sub(r"\s+", " ", " ".join(plain))
    marked = not {"NO_COLOR", "TERM"} & env.keys()
    assert env is not ASCII or "".join(lines).isascii()
    for text in (*BEFORE, *AFTER):
        cut = PROTOCOL.lexicon.pieces(text)
        assert ("".join(p.text for p in cut) if marked else in_marks(cut)) in together
    assert all(line.startswith(" " * 13) or re.match(r"  \S", line) for line in plain[1:])
    assert any("\x1b[1;38;5;33m" in line for line in lines) == marked


def test_an_encoding_without_blocks_gets_a_plain_curve(tmp_path: Path) -> None:
    run = records(tmp_path, [0.0, 1.0])
    assert curve(Path(run.output_dir), "utf-8") == "▁█ 0.00 to 1.00"
    assert curve(Path(run.output_dir), "ascii") == "_# 0.00 to 1.00"
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show(Console(raw, 2), PROTOCOL, SUMMARY, run)
    raw.flush()
    assert b"_# 0.00 to 1.00" in raw.buffer.getvalue()  # type: ignore[attr-defined]


def test_three_sentences_of_one_occupation_before_and_after(tmp_path: Path) -> None:
    run = records(tmp_path, [0.2])
    rows = [(label, in_marks(text)) for label, text in before_and_after(PROTOCOL, Path(run.output_dir))]
    assert rows[0] == ("terms", "[agentic] {communal} in the first sentences about: architect")
    assert [label for label, _ in rows[1:]] == ["before", "", "", "after", "", ""]
    assert rows[3][1] == "The architect was a woman with a {caring} heart."
    assert rows[5][1] == "The architect was [bold], {caring} and [decisive] in all that she set out to do."
    (Path(run.output_dir) / "untrained_sentences.jsonl").unlink()  # of a run of an earlier version
    assert before_and_after(PROTOCOL, Path(run.output_dir)) == []


def test_the_next_commands_name_the_folders_in_use() -> None:
    assert next_steps(RunConfig()) == [
        f"{program()} generate",
        f"{program()} report rlhf_llama3_completions.csv --run rlhf_llama3_7b_output",
        "tensorboard --logdir runs",
    ]
    own = next_steps(RunConfig("my out/", "c", "my runs"))
    assert shlex.split(own[0])[-5:] == ["generate", "--model", "my out/", "--output", "my out_completions.csv"]
    assert shlex.split(own[1])[-4:] == ["report", "my out_completions.csv", "--run", "my out/"]
    assert shlex.split(own[2]) == ["tensorboard", "--logdir", "my runs"]


def test_the_program_is_called_as_a_shell_here_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = Path(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert program() == f"{shlex.quote(str(python))} -m equipoise"
    monkeypatch.chdir(python.parent.parent)
    assert program() == f"{python.parent.name}/{python.name} -m equipoise"
    called = subprocess.run([*shlex.split(program()), "--version"], capture_output=True, text=True, check=True)
    assert called.stdout.startswith("equipoise ")
    for name in ("python", "equipoise"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert program() == f"{python.parent.name}/{python.name} -m equipoise", "another installation's"


def test_a_run_keeps_sentences_of_the_untrained_model_and_is_otherwise_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_folder(tmp_path / "model")
    for name, count in (("with", 40), ("without", 0)):
        train(small_config(model, tmp_path / name, final_sentences=count, steps=2))
    shown = capsys.readouterr().out
    kept, final = (sentences(tmp_path / "with" / "out" / name) for name in (UNTRAINED, FINAL))
    assert [occupation for occupation, _ in kept] == [PROTOCOL.names[0]] * 3 and len(final) == 40
    about = [text for occupation, text in final if occupation == PROTOCOL.names[0]]
    assert about and not {text for _, text in kept} & set(about)
    for text in (*(text for _, text in kept), *about):
        assert printable(text) in shown
    assert not (tmp_path / "without" / "out" / UNTRAINED).exists()
    with_them, without = (results(tmp_path / name, 2) for name in ("with", "without"))
    assert with_them == without
