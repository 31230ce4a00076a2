"""Options from dataclasses and files: what is read, and that every mistake becomes one line that names it."""

import ast
import contextlib
import dataclasses
import inspect
import os
import pty
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest

from equipoise import options
from equipoise.commands.task import TaskConfig
from equipoise.errors import UserError
from equipoise.methods.generate import GenerateConfig
from equipoise.methods.sample import SampleConfig
from equipoise.methods.sft_config import SftConfig
from equipoise.methods.study import StudyConfig
from equipoise.ppo.config import TrainConfig
from equipoise.ppo.tool_config import BenchConfig, ExportConfig
from equipoise.protocol.task import Task

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Sizes:
    batch: int = 64
    mini: int = 16
    rate: float = 1e-5
    target: float | None = None

    def __post_init__(self) -> None:
        if self.batch % self.mini:
            raise UserError(f"batch {self.batch} is not a multiple of mini {self.mini}")


@dataclasses.dataclass(frozen=True)
class Warm:
    warm: Literal["off", "on", "forced"] = "off"
    warm_sentences: int = 256


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 10
    """How long."""
    name: str = "x"
    holdout: bool = False
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    warm: Warm = dataclasses.field(default_factory=Warm)


DEFAULT = Config()


def parse(*argv: str, default: Config = DEFAULT) -> Config:
    return options.parse(Config, list(argv), default, prog="train", description="")


def from_file(folder: Path, text: str, default: Config = DEFAULT) -> Config:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return options.apply(default, options.read_file(path), str(path))


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and not any(mark in text for mark in "│╭╮╰╯─"), text
    return text


def test_options_of_all_groups_share_one_space_and_leave_the_rest_as_it_was() -> None:
    default = dataclasses.replace(DEFAULT, name="mine", sizes=Sizes(32, 8))
    config = parse("--steps", "3", "--mini=4", "--holdout", "--warm", "forced", "--target", "0.5", default=default)
    assert config == Config(3, "mine", True, Sizes(32, 4, 1e-5, 0.5), Warm("forced"))
    assert parse(default=default) == default
    assert parse("--no-holdout", "--name=", "--target", "None", default=config).sizes.target is None


MISTAKES = [
    (["--stepz", "3"], ["--stepz", "perhaps you meant --steps"]),
    (["--steps", "many"], ["--steps", "'many'"]),
    (["--steps", "1.5"], ["--steps", "'1.5'"]),
    (["--steps"], ["--steps", "Missing value"]),
    (["--warm", "maybe"], ["--warm", "'maybe'", "forced"]),
    (["--rate", "fast"], ["--rate", "fast"]),
    (["stray"], ["stray"]),
    (["--batch", "10"], ["batch 10 is not a multiple of mini 16"]),
]


@pytest.mark.parametrize(("argv", "says"), MISTAKES)
@pytest.mark.parametrize("columns", [None, "40"])
def test_a_mistake_is_one_line_that_names_it_however_narrow_the_terminal(
    argv: list[str], says: list[str], columns: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(UserError) as error:
        parse(*argv)
    text = message(error)
    assert all(part in text for part in says), text
    assert text.endswith("; train --help lists the options")
    assert "Error parsing sizes" not in text and "Config" not in text  # no names of ours
    assert os.environ.get("COLUMNS") == columns


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_line_is_the_same_where_standard_output_cannot_show_boxes(encoding: str) -> None:
    script = (
        "from tests.test_options import MISTAKES, parse, UserError\n"
        "for argv, says in MISTAKES:\n"
        "    try: parse(*argv)\n"
        "    except UserError as error: print(ascii(str(error)), all(part in str(error) for part in says))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": "."},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == len(MISTAKES) and all(line.endswith(" True") for line in lines), run.stdout
    assert "---" not in run.stdout and "+-" not in run.stdout


@dataclasses.dataclass(frozen=True)
class Guide:
    batch_size: int = 64
    learning_rate: float = 1e-5
    lora_rank: int = 8
    use_8bit: bool = False
    keep: bool = True
    files: tuple[str, ...] = ()
    """Any: a word that follows a switch is
    one of them, `such` as this."""


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-batch_size", "32"], "perhaps you meant --batch-size;"),
        (["BATCH_SIZE=32"], "perhaps you meant --batch-size;"),
        (["--bs", "32"], "perhaps you meant --batch-size;"),
        (["--lr", "1"], "perhaps you meant --learning-rate or --lora-rank;"),
        (["--hepl"], "perhaps you meant --help;"),
        (["--use_8bit=True"], "--use-8bit takes no value, and was given 'True': write --use-8bit"),
        (["--Use_8bit", "false"], "--use-8bit takes no value, and was given 'false': write --no-use-8bit"),
        (["--keep=0"], "--keep takes no value, and was given '0': write --no-keep"),
        (["--batch-size", "1e3"], "--batch-size '1e3' is no whole number;"),
        (["--batch-size=2,000"], "--batch-size '2,000' is no whole number;"),
        (["--learning-rate", "fast"], "--learning-rate 'fast' is no number;"),
    ],
)
def test_what_is_spelled_otherwise_is_answered_with_the_option(argv: list[str], said: str) -> None:
    names = dataclasses.replace(Guide(), files=("a",))
    with pytest.raises(UserError) as error:
        options.parse(Guide, argv, names, prog="train", description="")
    assert said in f"{message(error)};"


def test_a_file_after_a_switch_is_a_file() -> None:
    given = options.parse(Guide, ["--no-keep", "--files", "yes.csv", "true"], Guide(), prog="train", description="")
    assert given == Guide(keep=False, files=("yes.csv", "true"))


def test_help_breaks_lines_at_the_terminals_width_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = "Many words, and --more-of-them than one line of a terminal holds. " * 5
    with pytest.raises(SystemExit):
        options.parse(Guide, ["--help"], Guide(), prog="train", description=words.strip())
    text = capsys.readouterr().out
    assert "a word that follows a switch is one of them, `such` as this." in text
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        options.parse(Guide, ["--help"], Guide(), prog="train", description=words.strip())
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and text.count("--more-of-them") == 5
    assert " ".join(words.split()) in " ".join(text.split())


@pytest.mark.parametrize(("change", "colours"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_help_has_colours_on_a_terminal_unless_they_are_unwanted(change: dict[str, str], colours: bool) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "equipoise", "join", "--help"], stdout=theirs, env={**kept, "TERM": "xterm", **change}
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # Linux's end of file on a pseudo-terminal
        while chunk := os.read(ours, 65536):
            seen += chunk
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert b"usage:" in seen and (b"\x1b[" in seen) == colours


def test_help_is_printed_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    assert "--steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 3\n", Config(3)),
        ("sizes:\n  batch: 8\n  mini: 4\nwarm:\n  warm: forced\n", Config(sizes=Sizes(8, 4), warm=Warm("forced"))),
        ("batch: 8\nmini: 4\n", Config(sizes=Sizes(8, 4))),  # either alone would not fit the other's default
        ("mini: 48\nbatch: 96\n", Config(sizes=Sizes(96, 48))),
        ("rate: 1e-4\ntarget: 2\n", Config(sizes=Sizes(rate=1e-4, target=2.0))),  # YAML reads 1e-4 as a word
        ("target: null\n", Config()),
        ("warm: forced\n", Config(warm=Warm("forced"))),  # a setting with the name of its group
        ("warm: off\nholdout: on\n", Config(holdout=True)),  # YAML reads off and on as false and true
        ("warm: on\nholdout: no\n", Config(warm=Warm("on"))),
        ("warm-sentences: 7\n", Config(warm=Warm(warm_sentences=7))),
        ("name: 2024\n", Config(name="2024")),
        ("name: 'two words = {x}'\n", Config(name="two words = {x}")),
        ("name: naïve – “x”\n", Config(name="naïve – “x”")),
        ("name: --steps\n", Config(name="--steps")),
        ("{}\n", Config()),
    ],
)
def test_a_file_says_what_options_could(tmp_path: Path, text: str, expected: Config) -> None:
    assert from_file(tmp_path, text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stepz: 3\n", "no setting 'stepz'"),
        ("sizes:\n  steps: 3\n", "no setting 'steps'"),
        ("sizes: 3\n", "sizes is a group of settings, not 3"),
        ("steps: many\n", "--steps"),
        ("steps: true\n", "--steps"),
        ("steps: [1, 2]\n", "steps is [1, 2], expected a single value"),
        ("steps: {a: 1}\n", "steps is {'a': 1}, expected a single value"),
        ("holdout: maybe\n", "maybe"),
        ("batch: 10\n", "batch 10 is not a multiple of mini 16"),
        ("steps: 3\nname: a\nsteps: 4\n", "line 3: the key 'steps' stands on line 1 already"),
        ("weight-on: 1\nweight_on: 2\n", "weight_on is given twice"),
        ("steps: 3\nsizes: {batch: 16}\nbatch: 32\n", "batch is given twice"),
        ("steps: 010\n", "line 1: 010 is no plain way to write a whole number"),
        ("steps: 1:30\n", "1:30 is no plain way"),
        ("- steps\n", "holds no settings"),
        ("steps\n", "holds no settings"),
        ("", "holds no settings"),
        ("steps: 3: 4\n", "line 1: this is no YAML"),
        ("steps: [3\n", "this is no YAML"),
        ("name: !!python/object/apply:os.getcwd []\n", "line 1: the tag"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_the_file(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        from_file(tmp_path, text)
    assert says in message(error) and "run.yaml" in message(error)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    for name, says in (
        ("nowhere.yaml", "cannot read"),
        (".", "cannot read"),
        ("latin.yaml", "line 1: a byte is not UTF-8"),
    ):
        with pytest.raises(UserError) as error:
            options.read_file(tmp_path / name)
        assert says in message(error) and str(tmp_path) in message(error)


def test_options_override_the_file(tmp_path: Path) -> None:
    filed = from_file(tmp_path, "steps: 3\nname: filed\n")
    assert parse("--steps", "4", default=filed) == Config(4, "filed")


def test_a_file_starts_from_the_configuration_it_is_given(tmp_path: Path) -> None:
    default: Any = dataclasses.replace(DEFAULT, name="kept", sizes=Sizes(32, 8))
    assert from_file(tmp_path, "mini: 4\n", default) == dataclasses.replace(default, sizes=Sizes(32, 4))


@pytest.mark.parametrize(
    "kind", [TrainConfig, BenchConfig, ExportConfig, SftConfig, StudyConfig, SampleConfig, GenerateConfig, TaskConfig]
)
def test_every_option_says_what_it_is(kind: type) -> None:
    groups, seen = [kind], []
    while groups:
        group = groups.pop()
        for name, field in _documented(group).items():
            seen.append(name)
            inner = get_type_hints(group)[name]
            if dataclasses.is_dataclass(inner) and inner is not Task:
                groups.append(inner)
            else:
                assert field, f"{group.__name__}.{name} has no text in --help"
    assert len(seen) > 3


def _documented(kind: type) -> dict[str, bool]:
    """Of each field, its parents' too, whether a docstring follows it."""
    found: dict[str, bool] = {}
    for parent in reversed([c for c in kind.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body  # type: ignore[attr-defined]
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    return found
