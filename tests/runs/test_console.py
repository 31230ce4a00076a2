"""What a person sees: a bar on a terminal, clean lines elsewhere, and never the end of a run."""

import errno
import io
import itertools
import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.protocol.lexicon import Lexicon, TermClass
from equipoise.protocol.marking import in_marks, pieces, printable
from equipoise.protocol.reward import Reward
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.console import Console, in_rows, numbers, shown
from equipoise.runs.stage import duration

SENTENCE = "The nurse was confident and caring in the emergency room."
HOSTILE = "The nurse was \x1b[2J\x9b31m[red]bold[/red]\r\n[link=x]\u202ecaring\u2028 :skull: \ud800\x00<script>"
# Letters, and what could move a cursor, change colours or break a line.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

CHILD = """
import json, os, signal, sys
from pathlib import Path
sys.modules["torch"] = None  # no TensorBoard: a faster start
from equipoise.ppo.log import RunLog
from equipoise.protocol.task import PROTOCOL
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what a training loop does that ends its step first
folder, steps, gate, texts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
log = RunLog(folder, folder / "runs", steps)
log.say("model: bundled")
for step in range(1, steps + 1):
    log.step(step, {"reward/mean": 0.5, "compliance/both": 0.25}, {"time/step": 0.5, "memory/peak_gb": 1.5})
    log.samples(step, [PROTOCOL.score(text) for text in texts], [text.split()[1] for text in texts])
    print("printed by a library")
    if step == 2 and gate >= 0:
        os.read(gate, 1)  # until the test has done its part
log.event(steps, "nonfinite", what="the loss", where="lm_head")
log.close()
"""


def child(folder: Path, steps: int = 3, gate: int = -1, texts: tuple[str, ...] = (SENTENCE,)) -> list[str]:
    """`gate`: a pipe from which the child reads after its second step, to go on when the other end is closed."""
    return [sys.executable, "-c", CHILD, str(folder), str(steps), str(gate), json.dumps(texts)]


def environment(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in {"CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"}}
    return {**kept, "TERM": "xterm-256color", **changes}


def on_terminal(command: list[str], env: dict[str, str]) -> tuple[str, int]:
    """Run under a pseudo-terminal; what appeared there, and the exit code."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
    os.close(theirs)
    seen = b""
    while chunk := read_terminal(ours):
        seen += chunk
    os.close(ours)
    return seen.decode(), process.wait(timeout=60)


def read_terminal(descriptor: int) -> bytes:
    ready, _, _ = select.select([descriptor], [], [], 60)
    assert ready, "nothing for a minute"
    try:
        return os.read(descriptor, 65536)
    except OSError as error:  # Linux's end of file on a pseudo-terminal
        assert error.errno == errno.EIO
        return b""


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        child(tmp_path, texts=(SENTENCE, HOSTILE)), capture_output=True, env=environment(FORCE_COLOR="1"), check=True
    )
    text = done.stdout.decode()
    assert not CONTROL.search(text) and not done.stderr
    assert "step 1/3  2.0 steps/s  ETA 0:01  reward 0.500  both 25.0%  peak 1.5 GB\n" in text
    assert "  +1.00  The nurse was [confident] and {caring} in the emergency room.\n" in text
    assert "base +1.00  bonus +0.00  length +0.00  repetition +0.00  words 10\n" in text
    assert "step 3: a number was not finite: the loss; it comes from lm_head\n" in text


def test_a_terminal_gets_a_bar_with_lines_above_it(tmp_path: Path) -> None:
    seen, code = on_terminal(child(tmp_path), environment())
    assert code == 0
    assert "\x1b[?25l" not in seen, "a hidden cursor would stay hidden after a kill"
    plain = without_escapes(seen)
    assert re.search(r"━+ +step 3/3  [\d.]+ steps/s  ETA 0:00", plain)
    assert "reward 0.500  both 25.0%" in plain
    assert "The nurse was confident and caring in" in plain  # marked by colour alone
    assert "38;5;33mconfident" in seen and "38;5;208mcaring" in seen
    assert plain.count("printed by a library") == 3


@pytest.mark.parametrize("change", [{"TERM": "dumb"}, {"TERM": ""}, {"CI": "true"}])
def test_a_terminal_that_cannot_or_should_not_draw_gets_plain_lines(tmp_path: Path, change: dict[str, str]) -> None:
    seen, code = on_terminal(child(tmp_path), environment(**change))
    assert code == 0 and "step 3/3" in seen
    assert not CONTROL.search(seen.replace("\r\n", "\n"))


def test_no_color_is_respected_and_marks_take_its_place(tmp_path: Path) -> None:
    seen, code = on_terminal(child(tmp_path), environment(NO_COLOR="1"))
    assert code == 0 and "[confident] and {caring}" in seen
    assert not re.search(r"\x1b\[[\d;]*\b[34][0-9]\b[\d;]*m", seen)


def test_hostile_text_reaches_no_terminal(tmp_path: Path) -> None:
    seen, code = on_terminal(child(tmp_path, texts=(HOSTILE,)), environment())
    assert code == 0
    assert "\x1b[2J" not in seen and "\x9b" not in seen and "\u202e" not in seen and "\u2028" not in seen
    assert r"The nurse was \x1b[2J\x9b31m[red]bold[/red]\r\n[link=x]\u202ecaring\u2028 :skull:" in without_escapes(seen)


def test_a_stream_that_cannot_encode_the_text_gets_escapes(tmp_path: Path) -> None:
    done = subprocess.run(
        child(tmp_path, texts=("The nurse was naïve — and bold.",)),
        capture_output=True,
        env=environment(PYTHONIOENCODING="ascii"),
        check=True,
    )
    assert rb"na\xefve \u2014 and [bold]." in done.stdout


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    gate, closes = os.pipe()
    process = subprocess.Popen(
        child(tmp_path, 20, gate), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), pass_fds=[gate]
    )
    os.close(gate)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    os.close(closes)
    errors = process.stderr.read()
    assert (process.wait(timeout=60), errors) == (0, b"")
    assert len((tmp_path / "training_metrics.csv").read_text().splitlines()) == 21


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_a_closed_terminal_does_not_end_the_run(tmp_path: Path, term: str) -> None:
    ours, theirs = pty.openpty()
    gate, closes = os.pipe()
    process = subprocess.Popen(
        child(tmp_path, 40, gate), stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment(TERM=term),
        start_new_session=True, pass_fds=[gate],
    )  # fmt: skip
    os.close(gate)
    os.close(theirs)
    seen = b""
    while b"step 2/40" not in seen:
        more = read_terminal(ours)
        assert more, "the run ended before its second step"
        seen += more
    os.close(ours)
    os.close(closes)
    assert process.stderr is not None
    errors = process.stderr.read()
    assert (process.wait(timeout=60), errors) == (0, b"")
    assert len((tmp_path / "training_metrics.csv").read_text().splitlines()) == 41


def test_a_standard_output_closed_from_the_start_does_not_end_the_run(tmp_path: Path) -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *child(tmp_path)]
    done = subprocess.run(command, stderr=subprocess.PIPE, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_every_step_at_first_then_one_line_in_ten_seconds_and_the_last() -> None:
    now, stream = [0.0], io.StringIO()
    console = Console(stream, total_steps=131, done=100, clock=lambda: now[0])
    for step in range(101, 132):
        now[0] += 2.0
        console.step(step, {}, {})
    steps = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert steps == [101, 102, 103, 104, 105, 110, 115, 120, 125, 130, 131]


def test_rate_and_time_left_come_from_this_process_only() -> None:
    now, stream = [1000.0], io.StringIO()
    console = Console(stream, total_steps=2000, done=1900, clock=lambda: now[0])
    now[0] += 500  # loading the model
    console.step(1901, {}, {"time/step": 3.0})
    now[0] += 5
    console.step(1902, {}, {"time/step": 3.0})
    # 99 steps of 3 s; then 98 of the mean of 3 s and 5 s.
    assert stream.getvalue() == "step 1901/2000  3.0 s/step  ETA 4:57\nstep 1902/2000  4.0 s/step  ETA 6:32\n"


def test_durations_read_as_clocks_do() -> None:
    assert [duration(s) for s in (-3, 0, 59.6, 425, 3723, float("inf"))] == [
        "0:00",
        "0:00",
        "1:00",
        "7:05",
        "1:02:03",
        "?",
    ]


def test_terms_are_marked_where_the_matcher_finds_them() -> None:
    text = "The chef was Self\u2011Reliant, unhelpful, boldly CARING and hel\u00adpful."
    assert in_marks(pieces(text, PROTOCOL.lexicon)) == (
        "The chef was [Self\u2011Reliant], unhelpful, boldly {CARING} and {hel\\xadpful}."
    )


def test_a_term_within_another_is_marked_once() -> None:
    lexicon = Lexicon((TermClass("a", ("self", "self-reliant")), TermClass("c", ("caring",))))
    assert in_marks(pieces("The chef was self-reliant.", lexicon)) == "The chef was [self-reliant]."


@given(st.text())
def test_any_text_becomes_one_harmless_line(text: str) -> None:
    line = printable(text)
    assert line.isprintable() and not CONTROL.search(line)
    line.encode()  # no lone surrogate is left


def test_one_sample_of_each_of_at_most_six_occupations_is_shown() -> None:
    jobs = ["nurse", "nurse", "chef", "pilot", "chef", "artist", "lawyer", "doctor", "writer"]
    rewards: list[Reward] = [PROTOCOL.score(f"The {job} was number {i}.") for i, job in enumerate(jobs)]
    found = [reward for reward, _ in shown(rewards, jobs)]
    assert [r.text.split()[1] for r in found] == ["nurse", "chef", "pilot", "artist", "lawyer", "doctor"]
    assert found[0].text == "The nurse was number 0."


def test_a_full_pipe_loses_a_line_and_no_more() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(writer, "w") as stream:
        console = Console(stream, total_steps=1)
        for _ in range(3000):
            console.say("x" * 100)
        while select.select([reader], [], [], 0)[0]:
            os.read(reader, 65536)
        console.say("after")
        console.say("after")
        assert select.select([reader], [], [], 5)[0] and b"after\n" in os.read(reader, 65536)
    os.close(reader)


def test_the_two_kls_have_names_that_cannot_be_mistaken() -> None:
    metrics = {"reward/mean": 0.9, "compliance/both": 0.97, "ppo/update_kl": 0.0213, "kl/ref": 18.4}
    assert numbers(metrics, {}, 0.03) == [
        "reward 0.900",
        "both 97.0%",
        "update KL 0.0213 (target 0.03)",
        "distance to reference 18.40 nats",
    ]
    # The last sentences' distance is what they need and what is beyond it: 5.25 + 12.5.
    known = numbers(metrics | {"kl/bound": 5.25, "kl/excess": 12.5}, {"memory/peak_gb": 3.2}, 0.03)
    assert known[2] == "peak 3.2 GB" and known[4] == "distance to reference 17.75 nats (bound 5.25)"
    assert all(len(row) <= 80 for row in in_rows(known, 80)) and len(in_rows(known, 80)) == 2


@given(st.lists(st.text("abc ", min_size=1, max_size=30)), st.integers(1, 90))
def test_rows_hold_every_part_whole_and_in_order(parts: list[str], width: int) -> None:
    rows = in_rows(parts, width)
    assert "  ".join(rows) == "  ".join(parts)
    assert all(len(row) <= width or row in parts for row in rows)


BARS = """
import sys
sys.modules["torch"] = None
from equipoise.runs.console import Console
from equipoise.runs.progress import Progress
console = Console(sys.stdout, 2000, target_kl=0.03)
with console.stage("reading a/model/with/a/name/as/long/as/" + "folders/" * 12) as stage:
    stage(100, 180)
    console._live.refresh()
console.step(1, {"reward/mean": 0.9, "compliance/both": 1.0, "ppo/update_kl": 0.02, "kl/ref": 18.4}, {"time/step": 7e3})
console.close()
with Progress(sys.stdout, iter((0.0, 1000.0, 1800.0)).__next__, "texts") as progress:
    progress(0, 180_000)
    progress(100_000, 180_000)
    progress(180_000, 180_000)
"""


@pytest.mark.parametrize(("columns", "encoding"), [(80, "utf-8"), (100, "utf-8"), (80, "ascii")])
def test_no_bar_wraps_onto_a_second_line_and_a_long_name_hides_no_count(columns: int, encoding: str) -> None:
    told = environment(COLUMNS=str(columns), PYTHONIOENCODING=encoding)
    seen, code = on_terminal([sys.executable, "-c", BARS], told)
    lines = [line for line in re.split(r"[\r\n]+", without_escapes(seen)) if line]
    assert code == 0 and max(map(len, lines)) <= columns
    assert any(re.search(r"[━-] reading a/model/.*  100 of 180  0:0\d  ETA ", line) for line in lines)
    assert re.search(r"[━-] 180,000 of 180,000 texts  100\.0 texts/s  0:00 left$", lines[-1])


def test_a_silence_of_a_stage_and_of_a_step_ends_within_ten_seconds() -> None:
    now, stream = [0.0], io.StringIO()
    console = Console(stream, total_steps=20, clock=lambda: now[0])

    def lines(seconds: int) -> list[float]:
        """When there was a line, a beat coming every second."""
        told = []
        for _ in range(seconds):
            now[0] += 1
            before = len(stream.getvalue())
            console._break_silence()
            told += [now[0]] if len(stream.getvalue()) > before else []
        return told

    with console.stage("loading"):
        told = [0.0, *lines(60)]
    told += lines(60)
    assert max(b - a for a, b in itertools.pairwise(told)) < 10 and "working on step 1 of 20" in stream.getvalue()
    console.close()


FIRST = """
import sys
class Slow:
    def find_spec(self, name, *rest):
        if name == "torch":
            print("TORCH", flush=True)
            sys.exit(0)
sys.meta_path.insert(0, Slow())
from equipoise.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("argv", [["train"], ["train", "--preset", "bundled-cpu"]])
def test_there_is_a_line_before_torch_is_imported(argv: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FIRST, *argv], capture_output=True, text=True, cwd=tmp_path, env=environment()
    )
    before = done.stdout.split("TORCH")[0].splitlines()
    assert any(re.fullmatch(r"equipoise \S+: .*loading PyTorch", line) for line in before), done
    assert "TORCH" in done.stdout and not any(tmp_path.iterdir())
    typo = subprocess.run([sys.executable, "-c", FIRST, *argv, "--stepz", "3"], capture_output=True, text=True)
    assert "TORCH" not in typo.stdout and typo.stdout == "" and "--steps" in typo.stderr
