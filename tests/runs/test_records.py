"""A record names the command that was typed, and calls a checkout changed for its source alone."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from equipoise.runs.command import typed
from equipoise.runs.records import SOURCE, checkout, software

ROOT = Path(__file__).parents[2]
MAKE, GIT = shutil.which("make"), shutil.which("git")


@pytest.mark.parametrize(
    ("argv", "original", "command"),
    [
        (["train_rlhf.py", "--n", "2"], ["python", "train_rlhf.py", "--n", "2"], "python train_rlhf.py --n 2"),
        (["../x y/train_rlhf.py"], ["/opt/bin/python3.13", "-u", "../x y/train_rlhf.py"],
         "python3.13 -u '../x y/train_rlhf.py'"),
        (["/v/bin/equipoise", "score", "It's $5 & more"], ["/v/bin/python", "/v/bin/equipoise", "score", "…"],
         """equipoise score 'It'"'"'s $5 & more'"""),
        (["/x/equipoise/__main__.py", "doctor"], ["python", "-m", "equipoise", "doctor"], "python -m equipoise doctor"),
        (["-c"], ["python", "-c", "import equipoise\nprint(1)"], "python -c 'import equipoise\nprint(1)'"),
        (["host"], [], "host"),  # Python within another program
    ],
)  # fmt: skip
def test_the_command_is_the_one_that_was_typed(argv: list[str], original: list[str], command: str) -> None:
    assert typed(argv, original, {}) == command
    assert shlex.split(command)[1:] == (original[1:] if argv[0] != "/v/bin/equipoise" else argv[1:])


def test_a_process_that_another_started_is_told_what_was_typed() -> None:
    assert typed(["equipoise", "train"], ["python", "-c", "…"], {"EQUIPOISE_COMMAND": "equipoise sweep a.yaml"}) == (
        "equipoise sweep a.yaml"
    )


SHOW = "import json, sys\nfrom equipoise.runs.command import typed\nprint(json.dumps([typed(), sys.argv[1:]]))\n"


def folder_of_make(tmp_path: Path) -> Path:
    """A copy of the Makefile, taken for installed, whose script only shows what was typed and what came of it."""
    folder = tmp_path / "a folder"
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements_rlhf.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "train_rlhf.py").write_text(SHOW)
    python = folder / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (folder / ".venv/.installed").touch()
    return folder


@pytest.mark.skipif(MAKE is None, reason="needs make")
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("make train", []),
        ("make train ARGS='--steps 10'", ["--steps", "10"]),
        ("make train ARGS='--prompt \"a  b\" --model c\\ d'", ["--prompt", "a  b", "--model", "c d"]),
        ("""make train ARGS='--prompt '"'"'$$5 = (x)'"'"'' QUIET=""", ["--prompt", "$5 = (x)"]),
        ("ARGS='--steps 3' make train", ["--steps", "3"]),
        ("ARGS='--steps 3' make train QUIET=x", ["--steps", "3"]),
    ],
)
def test_of_make_the_command_is_that_of_make(command: str, words: list[str], tmp_path: Path) -> None:
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    folder = folder_of_make(tmp_path)
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    recorded, argv = json.loads(done.stdout)
    assert argv == words
    assert sorted(shlex.split(recorded)) == sorted(shlex.split(command)), recorded  # make turns the order around


def test_the_variables_of_make_are_for_what_is_trained_and_generated_alone() -> None:
    assert "EQUIPOISE_MAKE" not in os.environ  # under `make test` too
    assert software()["command"] == typed()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout with the package's files that matter here, all committed."""
    root = tmp_path / "checkout"
    for name in ("equipoise/ppo/step.py", "equipoise/evaluation/templates/report.css", "train_rlhf.py", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / ".gitignore").write_text("__pycache__/\nbuild/\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "-c", "user.name=A", "-c", "user.email=a@b", "commit", "-qm", "first")
    return root


def git(root: Path, *words: str) -> str:
    assert GIT
    return subprocess.run([GIT, "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()


needs_git = pytest.mark.skipif(GIT is None, reason="needs git")


@needs_git
def test_outputs_in_a_checkout_do_not_mark_it_as_changed(repository: Path) -> None:
    clean = {"commit": git(repository, "rev-parse", "HEAD"), "uncommitted_changes": False}
    assert checkout(repository) == clean
    outputs = ("report.html", "report_files/headline.tex", "study/ppo.csv", "my-run/model.safetensors", "warmth.yaml",
               "equipoise/report.html", "equipoise/out/task.yaml", "equipoise/ppo/__pycache__/step.pyc",
               "evaluate_mine.py")  # fmt: skip
    for name in outputs:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("x")
    assert checkout(repository) == clean
    os.utime(repository / "train_rlhf.py", (1, 1))  # touched, not changed
    assert checkout(repository) == clean


@needs_git
@pytest.mark.parametrize("name", ["train_rlhf.py", "equipoise/ppo/step.py", "README.md"])
@pytest.mark.parametrize("how", ["changed", "staged", "removed"])
def test_a_tracked_file_that_is_changed_marks_it(name: str, how: str, repository: Path) -> None:
    path = repository / name
    path.unlink() if how == "removed" else path.write_text(path.read_text() + "\n# mine\n")
    if how == "staged":
        git(repository, "add", name)
    assert checkout(repository)["uncommitted_changes"] is True


@needs_git
@pytest.mark.parametrize(
    "name",
    ["equipoise/mine.py", "equipoise/ppo/deep/er.py", "equipoise/build/x.py", "equipoise/protocol/tasks/mine.yaml",
     "equipoise/evaluation/templates/mine.js"],
)  # fmt: skip
def test_source_of_the_package_in_no_commit_marks_it(name: str, repository: Path) -> None:
    (repository / name).parent.mkdir(parents=True, exist_ok=True)
    (repository / name).write_text("x = 1\n")
    assert checkout(repository)["uncommitted_changes"] is True


@needs_git
def test_where_git_cannot_tell_nothing_is_said(tmp_path: Path) -> None:
    assert checkout(tmp_path) == {}
    git(tmp_path, "init", "-q")  # no commit yet
    assert checkout(tmp_path) == {}


def test_what_counts_as_source_is_what_is_installed() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = {f"{package.replace('.', '/')}/{pattern}" for package, own in data.items() for pattern in own}
    assert patterns | {"equipoise/**/*.py"} == set(SOURCE)
