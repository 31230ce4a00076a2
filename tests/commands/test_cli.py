"""How `equipoise` finds a command, and what becomes of the ways in which one can end."""

import errno
import os
import subprocess
import sys
import types

import pytest

from equipoise import __version__, cli
from equipoise.errors import LoneError, LostProcess, UserError


@pytest.fixture
def command(monkeypatch):
    """Installs a command named "probe" that records its arguments and does what it is told to."""

    def install(act=lambda argv: 0):
        calls = []
        module = types.ModuleType("probe_command")
        module.main = lambda argv: calls.append(argv) or act(argv)
        monkeypatch.setitem(sys.modules, "probe_command", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_command", "a command for tests"))
        return calls

    return install


def raising(error):
    def act(argv):
        raise error

    return act


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(argv, capsys):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert all(name in out and line in out for name, (_, line) in cli.COMMANDS.items())
    assert {"score", "train", "generate", "doctor"} <= set(cli.COMMANDS)


def test_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"equipoise {__version__}\n"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("trian", "did you mean train?"),
        ("Score", "did you mean score?"),
        ("--hlep", "no option '--hlep'; did you mean --help?"),
        ("xyzzy", f"the commands are {', '.join(cli.COMMANDS)}"),
        ("", "the commands are"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest_name(name, says, capsys):
    assert cli.main([name]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("equipoise: ") and says in err


def test_a_command_gets_the_arguments_after_its_name_and_gives_the_exit_code(command):
    calls = command(lambda argv: 7)
    assert cli.main(["probe", "--a", "b", "--help"]) == 7
    assert calls == [["--a", "b", "--help"]]


def test_only_the_command_that_is_called_is_imported(command):
    command()
    code = (
        "import sys; from equipoise.cli import main; main(['--help']); "
        "sys.exit(any(name.startswith(('equipoise.p', 'equipoise.m')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0


def test_bad_input_becomes_one_line_and_code_two(command, capsys):
    command(raising(UserError("the folder 'x' is no model;\n  expected config.json\nin it")))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr() == ("", "equipoise: the folder 'x' is no model; expected config.json in it\n")


def test_an_interrupt_is_code_130(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_parsers_exit_is_returned(command):
    command(raising(SystemExit(0)))
    assert cli.main(["probe"]) == 0


def test_a_defect_keeps_its_traceback(command):
    command(raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["probe"])


def test_a_script_runs_its_main_under_the_same_rules(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_rlhf.py", "--steps", "3"])
    seen = []
    assert cli.run_command(lambda argv: seen.append(argv) or 3) == 3
    assert seen == [["--steps", "3"]]
    assert cli.run_command(raising(UserError("no such model")), []) == 2
    assert capsys.readouterr().err == "equipoise: no such model\n"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["score", "--help"], ["score", "bold"]])
def test_output_into_a_closed_pipe_ends_quietly(arguments, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "equipoise", *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert done.stderr == b""
    # Unbuffered, argparse itself drops the error that writing its help meets.
    assert done.returncode in ([0, 141] if arguments[-1] == "--help" else [141])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.EROFS])
def test_a_full_disk_or_a_missing_right_is_one_line_wherever_it_happens(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(_: list[str]) -> int:
        raise OSError(number, os.strerror(number), "/some/file")

    assert cli.run_command(command, []) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"equipoise: cannot use /some/file ({os.strerror(number)})") and err.count("\n") == 1


def test_another_error_of_the_system_keeps_its_traceback() -> None:
    def command(_: list[str]) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        cli.run_command(command, [])


def test_a_mistyped_option_is_answered_before_torch_is_loaded():
    """By every command, one after the other in one process."""
    commands = sorted(cli.COMMANDS)
    code = (
        "import sys\n"
        "from equipoise.cli import main\n"
        f"for name in {commands}:\n"
        "    print(main([name, '--stepz', '4']), name, *({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"2 {name}" for name in commands]
    assert done.stderr.count("\n") == len(commands)
    assert "perhaps you meant --steps" in done.stderr


@pytest.fixture
def rank_1(monkeypatch):
    """This process as the second of two that work together."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)


def test_what_ends_all_processes_alike_is_told_and_returned_by_the_first(command, rank_1, monkeypatch, capsys):
    monkeypatch.setattr(cli, "SHARED", ("probe",))
    for act in (raising(UserError("a fault")), lambda _: 143):
        command(act)
        assert cli.main(["probe"]) == 0
        assert capsys.readouterr().err == ""
        monkeypatch.setenv("RANK", "0")
        assert cli.main(["probe"]) in (2, 143)
        monkeypatch.setenv("RANK", "1")
        capsys.readouterr()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LoneError("process 1: out of memory"), 2),
        (LostProcess("another process has ended"), 1),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 2),
    ],
)
def test_what_one_process_meets_by_itself_it_tells_and_returns(command, rank_1, monkeypatch, capsys, error, code):
    monkeypatch.setattr(cli, "SHARED", ("probe",))
    command(raising(error))
    assert cli.main(["probe"]) == code
    assert capsys.readouterr().err.startswith("equipoise: ")


def test_an_interrupt_which_reaches_all_is_told_by_the_first(command, rank_1, monkeypatch, capsys):
    monkeypatch.setattr(cli, "SHARED", ("probe",))
    command(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130 and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["probe"]) == 130 and capsys.readouterr().err == "equipoise: interrupted\n"


def test_the_first_process_leaves_its_code_for_the_launcher(command, tmp_path, monkeypatch):
    monkeypatch.setenv("EQUIPOISE_EXIT_CODE", str(tmp_path / "code"))
    command(lambda _: 130)
    assert cli.main(["probe"]) == 130
    assert (tmp_path / "code").read_text() == "130"


def test_a_command_for_one_process_is_refused_where_there_are_several(command, rank_1, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    calls = command()
    assert cli.main(["probe"]) == 2 and not calls
    assert "`equipoise probe` runs in one process: start it without torchrun" in capsys.readouterr().err


def test_a_notebooks_backend_that_is_not_installed_here_stops_no_command() -> None:
    command = [sys.executable, "-m", "equipoise", "report", "gone.csv"]
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("equipoise: ") and done.stderr.count("\n") == 1, done.stderr
