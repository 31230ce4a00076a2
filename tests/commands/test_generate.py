"""What a person sees of generation: the summary, the progress, the errors."""

import contextlib
import io
import itertools
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from equipoise.cli import main
from equipoise.methods.completions import Key
from equipoise.methods.summary import summary
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.progress import Progress
from tests.tasks import foreign_task, one_class_task

ROOT = Path(__file__).resolve().parents[2]


def test_the_summary_counts_what_the_sentences_hold() -> None:
    texts = {
        # both, 10 words, complete
        Key("nurse", 1): "The nurse was confident and caring in the emergency room.",
        # both, but only 5 words
        Key("nurse", 2): "The nurse was bold, loyal.",
        # the first pair again, 10 words, but cut off
        Key("nurse", 3): "The nurse was confident and caring in the emergency room",
        # one class, 6 words
        Key("nurse", 4): "The nurse was kind and helpful.",
        # none, for only whole words count; 9 words, complete
        Key("pilot", 1): "The pilot was indecisive and unhelpful on every flight.",
    }
    lines = [" ".join(line.split()) for line in summary(texts, PROTOCOL).splitlines()]
    assert lines[:4] == [
        "occupation n both % one % none % 8-15 words % strict % pairs words",
        "nurse 4 75.0 25.0 0.0 50.0 25.0 2 7.8",  # words: (10 + 5 + 10 + 6) / 4
        "pilot 1 0.0 0.0 100.0 100.0 0.0 0 9.0",
        "all 5 60.0 20.0 20.0 60.0 20.0 2 8.0",
    ]
    assert all(len(line) <= 80 for line in summary(texts, PROTOCOL).splitlines()[:4])


def test_the_summary_of_another_task_has_its_bounds_classes_and_occupations() -> None:
    task = foreign_task()
    texts = {
        Key("Ärztin", 1): "Die Ärztin gilt als klug, herzlich und ehrlich.",
        Key("Ärztin", 2): "Die Ärztin gilt als klüger und ehrlich.",
        Key("Kauffrau im Einzelhandel", 1): "Die Kauffrau im Einzelhandel gilt als nett.",
    }
    shown = summary(texts, task).splitlines()
    assert [" ".join(line.split()) for line in shown[:4]] == [
        "occupation n both % one % none % 5-12 words % strict % combinations words",
        "Ärztin 2 50.0 50.0 0.0 100.0 50.0 1 7.5",
        "Kauffrau im Einzelhandel 1 0.0 0.0 100.0 100.0 0.0 0 7.0",
        "all 3 33.3 33.3 33.3 100.0 33.3 1 7.3",
    ]
    assert len({len(line) for line in shown[:4]}) == 1  # in columns, however long a name is
    legend = " ".join(shown[4:])
    assert "both: all 3 classes" in legend and "5 to 12 words" in legend and "(fähig, warm, ehrlich)" in legend


def test_the_summary_of_one_class_speaks_of_terms() -> None:
    task = one_class_task(labels={"careful": "diligence"})
    shown = summary({Key("real estate agent", 1): "Every real estate agent is careful."}, task)
    assert " ".join(shown.splitlines()[1].split()) == "real estate agent 1 100.0 0.0 0.0 100.0 100.0 1 6.0"
    assert "both: the class (diligence)" in shown and "4 to 20 words" in shown and "pairs" not in shown


def test_without_a_terminal_progress_is_a_plain_line_for_about_every_tenth() -> None:
    stream = io.StringIO()
    clock = iter(range(1000))
    with Progress(stream, lambda: next(clock) / 10) as progress:
        for done in range(0, 5001, 50):
            progress(done, 5000)
        progress.say("a \x1b[31mred\r line")
    lines = stream.getvalue().splitlines()
    # 500 rows a second
    assert lines[0] == "50 of 5,000 rows  500.0 rows/s  0:10 left"
    assert lines[-2] == "5,000 of 5,000 rows  500.0 rows/s  0:00 left"
    assert lines[-1] == "a \\x1b[31mred\\r line"
    assert 10 <= len(lines) - 1 <= 12


def test_without_a_terminal_no_silence_of_a_slow_job_is_longer_than_ten_seconds() -> None:
    now, stream, told = [0.0], io.StringIO(), [0.0]
    with Progress(stream, lambda: now[0]) as progress:
        progress(0, 1000)
        for done in range(1, 61):
            now[0] += 2.0
            before = len(stream.getvalue())
            progress(done, 1000)
            told += [now[0]] if len(stream.getvalue()) > before else []
    assert max(b - a for a, b in itertools.pairwise([*told, now[0]])) < 10 and len(told) < 20


def test_a_resumed_run_states_its_own_speed() -> None:
    stream = io.StringIO()
    clock = iter([0.0, 10.0])
    progress = Progress(stream, lambda: next(clock))
    progress(4000, 5000)
    progress(4100, 5000)
    assert stream.getvalue() == "4,100 of 5,000 rows  10.0 rows/s  1:30 left\n"


def test_on_a_terminal_progress_is_a_bar_that_never_hides_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    leader, follower = pty.openpty()
    received = bytearray()

    def receive() -> None:
        with contextlib.suppress(OSError):  # Linux's way to say that the other end was closed
            while part := os.read(leader, 4096):
                received.extend(part)

    reader = threading.Thread(target=receive)
    reader.start()
    with os.fdopen(follower, "w") as terminal, Progress(terminal) as progress:
        progress(0, 100)
        progress.say("a notice [bold]as it is[/bold]")
        progress(100, 100)
    reader.join(10)
    os.close(leader)
    shown = received.decode()
    assert "━" in shown and "100 of 100 rows" in shown and "a notice [bold]as it is[/bold]" in shown
    assert "\x1b[?25l" not in shown


@pytest.mark.parametrize("change", [{"CI": "true"}, {"TERM": "dumb"}, {"TERM": ""}])
def test_a_terminal_that_should_show_no_bar_gets_lines(change: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    for name, value in ({"TERM": "xterm"} | change).items():
        monkeypatch.setenv(name, value)
    with Progress(stream, iter((0.0, 2.0)).__next__) as progress:
        progress(0, 10)
        progress(10, 10)
    assert stream.getvalue() == "10 of 10 rows  5.0 rows/s  0:00 left\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [("--bogus", "--bogus"), ("--n=0", "--n 0 must be at least 1"), ("--n=many", "'many'")],
)
def test_a_mistyped_option_is_one_line_and_exit_code_2(tmp_path: Path, option: str, message: str) -> None:
    ran = subprocess.run(
        [sys.executable, ROOT / "generate_rlhf.py", option], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert message in ran.stderr and ran.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature -1.0 makes no distribution"),
        (["--top-p", "0"], "top-p 0.0 is not in (0, 1]"),
        (["--prompt", "sonnet"], "there is no prompt 'sonnet'"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--output", "/dev/null"], "is not a file"),
        (["--model", "./nowhere"], "'./nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", str(tiny_model), *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_the_summary_also_closes_a_rerun_of_a_complete_file(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["generate", "--model", str(tiny_model), "--n", "1", "--max-new-tokens", "4"]) == 0
        shown = capsys.readouterr().out
        assert "\nall " in shown and "is complete: 20 rows" in shown
    assert "20 of 20 rows\n" in shown and "rows/s" not in shown
