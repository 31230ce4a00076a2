"""`equipoise score` as real processes: for a person, as lines of JSON, and with bad input."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import fields

import pytest

from equipoise.commands.score import OPTION_HELP, read_lines
from equipoise.protocol.reward import RewardWeights

EXAMPLE = "The nurse was confident and caring in the emergency room."


def run(*arguments, stdin=b"", env=None):
    return subprocess.run(
        [sys.executable, "-m", "equipoise", "score", *arguments],
        input=stdin,
        capture_output=True,
        env={**os.environ, "NO_COLOR": "", "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "", **(env or {})},
        timeout=60,
        check=False,
    )


def scored(stdin, *options):
    done = run("--json", *options, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.split(b"\n")
    assert lines.pop() == b""
    return [json.loads(line) for line in lines]


def refused(*arguments, stdin=b""):
    """The one line on standard error of a call that is refused."""
    done = run(*arguments, stdin=stdin)
    assert (done.returncode, done.stdout) == (2, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("equipoise: ")
    return line


def test_json_gives_every_part_of_the_worked_example():
    assert scored(EXAMPLE.encode() + b"\n") == [
        {
            "text": EXAMPLE,
            "agentic": ["confident"],
            "communal": ["caring"],
            "words": 10,
            "base": 1.0,
            "bonus": 0.0,
            "length_penalty": 0.0,
            "repetition_penalty": 0.0,
            "reward": 1.0,
            "strict": True,
        }
    ]


@pytest.mark.parametrize(
    ("stdin", "texts"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"\n\n", ["", ""]),
        (b"bold", ["bold"]),
        (b"bold\n\nloyal\n", ["bold", "", "loyal"]),
        (b"bold\r\nloyal\r\n", ["bold", "loyal"]),
        (b"a\rb\r\r\n", ["a\rb\r"]),  # only the terminator goes
        (b"  bold \t\n", ["  bold \t"]),
        ("a\u2028b\x0bc\x0cd\x85e\x1cf\n".encode(), ["a\u2028b\x0bc\x0cd\x85e\x1cf"]),
        (b'say "bold" \\ \x00\n', ['say "bold" \\ \x00']),
        ("caf\u00e9 self\u2011reliant \U0001f600\n".encode(), ["caf\u00e9 self\u2011reliant \U0001f600"]),
        (b"\xff bold \xc3\nloyal\n", ["\ufffd bold \ufffd", "loyal"]),
    ],
)
def test_json_gives_one_object_a_line_with_the_text_as_given(stdin, texts):
    assert [given["text"] for given in scored(stdin)] == texts


def test_a_line_ends_at_its_terminator_and_nowhere_else():
    assert list(read_lines([b"a\n", b"\r\n", b"b\r\r\n", b"c\r"])) == ["a", "", "b\r", "c\r"]


def test_json_answers_each_line_before_the_next_one_comes():
    with subprocess.Popen(
        [sys.executable, "-m", "equipoise", "score", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    ) as process:
        # Without an answer the read below would wait for ever.
        alarm = threading.Timer(30, process.kill)
        alarm.start()
        for text in ("bold", "loyal"):
            process.stdin.write(text.encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["text"] == text
        process.stdin.close()
        assert process.wait(timeout=60) == 0
        alarm.cancel()


def test_a_reader_that_goes_away_ends_the_command_without_a_traceback():
    with subprocess.Popen(
        [sys.executable, "-m", "equipoise", "score", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdin.write(b"bold\n")
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write(b"loyal\n")
        process.stdin.close()
        assert (process.wait(timeout=60), process.stderr.read()) == (141, b"")


def test_a_person_sees_marked_terms_every_part_and_the_total():
    done = run("The nurse was bold, bold, bold, confident and loyal.")
    assert done.returncode == 0
    assert done.stdout.decode().splitlines() == [
        "The nurse was [bold], [bold], [bold], [confident] and {loyal}.",
        "",
        "agentic             [bold], [confident]",
        "communal            {loyal}",
        "",
        "base                +1.0    both classes",
        "bonus               +0.05   1 extra term",
        "length penalty       0.0    9 words, 8 to 15 wanted",
        "repetition penalty  -0.1    any term more than 2 times",
        "reward              +0.95",
    ]


def test_an_empty_sentence_is_a_sentence():
    assert run("").stdout.decode().splitlines()[-1].split() == ["reward", "-0.3"]


def test_words_without_quotation_marks_are_one_sentence_and_json_takes_a_sentence_too():
    assert json.loads(run("--json", *EXAMPLE.split()).stdout)["reward"] == 1.0


def test_a_sentence_may_begin_with_a_dash_after_two_dashes():
    assert json.loads(run("--json", "--", "-bold").stdout)["agentic"] == ["bold"]
    assert json.loads(run("--json", "--", "--Bold_Is bold").stdout)["text"] == "--Bold_Is bold"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows passes arguments as text")
def test_bytes_that_are_not_utf8_do_not_break_the_command():
    assert json.loads(run("--json", b"bold \xff").stdout)["text"] == "bold \ufffd"
    assert run("self\u2011reliant", env={"PYTHONIOENCODING": "ascii"}).stdout.startswith(b"[self\\u2011reliant]")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("env", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_colours_only_on_a_terminal_that_wants_them(env, coloured):
    import pty

    outer, inner = pty.openpty()
    subprocess.run(
        [sys.executable, "-m", "equipoise", "score", "bold"],
        stdout=inner,
        env={**os.environ, "NO_COLOR": "", "TERM": "xterm", **env},
        timeout=60,
        check=True,
    )
    os.close(inner)
    first = os.read(outer, 4096).splitlines()[0]
    os.close(outer)
    assert first == (b"\x1b[1;38;5;33mbold\x1b[0m" if coloured else b"[bold]")


def test_every_weight_is_an_option_with_help():
    names = {field.name for field in fields(RewardWeights)}
    assert set(OPTION_HELP) == names
    help_text = run("--help").stdout.decode()
    assert all(f"--{name.replace('_', '-')}" in help_text for name in names)
    assert run("--help-all").stdout.decode() == help_text  # as each of the other commands takes it


@pytest.mark.parametrize(
    ("options", "text", "reward"),
    [
        (["--repetition-penalty", "0.5"], "The nurse was bold, bold, bold and also loyal.", 0.5),
        (["--base-none=-0.7"], "The nurse was kind to everyone on the ward.", -0.7),
        (["--base-none", "-0.7"], "The nurse was kind to everyone on the ward.", -0.7),
        (["--min-words", "4"], "The nurse was loyal.", 0.3),
        (["--Min_Words", "4", "--BASE_ONE=0.4"], "The nurse was loyal.", 0.4),
        (
            ["--bonus-per-term", "0.1", "--bonus-max", "1"],
            "The chef was bold, confident, decisive and loyal today.",
            1.2,
        ),
    ],
)
def test_options_change_the_weights(options, text, reward):
    assert [given["reward"] for given in scored(text.encode(), *options)] == [reward]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no sentence"),
        (["--repetiton-penalty", "0.5", "bold"], "perhaps you mean --repetition-penalty"),
        (["--rep", "0.5", "bold"], "--rep"),  # no abbreviations
        (["--jsn"], "--json"),
        (["--repetition-penalty"], "--repetition-penalty"),
        (["--repetition-penalty", "much", "bold"], "much"),
        (["--repetition-penalty=-1", "bold"], "repetition_penalty is -1.0"),
        (["--min-words", "8.5", "bold"], "--min-words '8.5' is no whole number"),
        (["--bonus-max", "nan", "bold"], "bonus_max"),
        (["bold", "--min-words", "3", "loyal"], "quotation marks"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, says):
    assert says in refused(*arguments, stdin=b"bold\n")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell's closed standard input")
def test_a_closed_standard_input_is_refused_in_one_line():
    done = subprocess.run(
        ["sh", "-c", '"$0" -m equipoise score --json <&-', sys.executable], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 2 and b"standard input" in done.stderr and done.stderr.count(b"\n") == 1


def test_json_lines_are_scored_by_their_texts_and_a_line_without_one_is_refused():
    lines = [
        {"text": "The nurse was bold and caring."},
        {"id": 1, "messages": [{"role": "user", "content": "loyal"}, {"role": "assistant", "content": "bold"}]},
    ]
    done = run("--json", stdin="\n".join(map(json.dumps, lines)).encode() + b"\n\n")
    scored = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["text"], each["agentic"], each["communal"]) for each in scored] == [
        ("The nurse was bold and caring.", ["bold"], ["caring"]),
        ("bold", ["bold"], []),
        ("", [], []),
    ]
    assert json.loads(run("--json", stdin=b"{bold} is no object\n").stdout)["text"] == "{bold} is no object"
    for bad, says in (
        (b'{"a": 1}\n', "line 1 of standard input is a JSON object with no text among 'a'"),
        (b'{"text": "a"}\nThe nurse\n', "line 2 of standard input is no JSON object"),
        (b'{"text": "a", "output": "b"}\n', "several texts ('text', 'output')"),
        (b'{"choices": [{"text": "a"}, {"text": "b"}]}\n', "several texts ("),
    ):
        done = run("--json", stdin=bad)
        assert done.returncode == 2 and says in done.stderr.decode() and done.stderr.count(b"\n") == 1
