"""What is built of the tree: a wheel and an sdist that hold all that is needed, installed and run elsewhere."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import equipoise

ROOT = Path(__file__).parent.parent
GIT = shutil.which("git")
RELEASE, EMPTY = os.environ.get("EQUIPOISE_RELEASE", ""), os.environ.get("EQUIPOISE_EMPTY", "")
"""Pythons with `build`, and with nothing but what a wheel of this package asked for; `make test-slow` has both."""
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""


def tracked() -> list[str]:
    assert GIT
    done = subprocess.run([GIT, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def plain(**more: str) -> dict[str, str]:
    """The environment without what would let this tree be imported."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more


@pytest.fixture(scope="module")
def built() -> Iterator[tuple[Path, Path]]:
    """(sdist, wheel), the wheel built of the sdist alone, as `python -m build` does."""
    if GIT is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    with tempfile.TemporaryDirectory() as name:
        tree, out = Path(name) / "tree", Path(name) / "dist"
        for each in tracked():
            (tree / each).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / each, tree / each)
        made = {}
        for kind in ("sdist", "wheel"):
            command = [sys.executable, "-c", BUILD, kind, str(out)]
            done = subprocess.run(command, cwd=tree, env=plain(), capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            made[kind] = out / done.stdout.splitlines()[-1]
            if kind == "sdist":
                with tarfile.open(made[kind]) as archive:
                    archive.extractall(Path(name), filter="data")
                tree = Path(name) / made[kind].name.removesuffix(".tar.gz")
        yield made["sdist"], made["wheel"]


def test_the_sdist_holds_every_file_of_the_tree(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {*tracked()} - held == set()
    of_setuptools = {"PKG-INFO", "setup.cfg"}
    assert {name for name in held if ".egg-info/" not in name} - {*tracked()} == of_setuptools


def test_the_wheel_holds_every_file_of_the_package_and_says_what_it_needs(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        held = [name for name in archive.namelist() if ".dist-info/" not in name]
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = email.message_from_bytes(archive.read(metadata))
    assert sorted(held) == sorted(name for name in tracked() if name.startswith("equipoise/"))
    assert said["Version"] == equipoise.__version__
    assert {"gpu", "track", "slurm", "dev"} <= {*said.get_all("Provides-Extra", [])}


@pytest.mark.slow
def test_the_wheel_runs_from_where_it_is_installed(built: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target"]
    subprocess.run([*command, str(tmp_path / "site"), str(built[1])], check=True, env=plain())
    environment = plain(PYTHONPATH=str(tmp_path / "site"), HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

    def run(*argv: str) -> str:
        whole = [sys.executable, *argv]
        done = subprocess.run(whole, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("-c", "import equipoise; print(equipoise.__file__)").startswith(str(tmp_path / "site"))
    text = "The nurse was confident and caring in the emergency room."
    assert json.loads(run("-m", "equipoise", "score", "--json", text))["reward"] == 1.0
    assert "bundled-cpu" in run("-m", "equipoise", "doctor")


def test_the_version_has_one_home() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## ([\d.]+)", changes, re.M)[0] == equipoise.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.M) == [equipoise.__version__]
    if GIT and (ROOT / ".git").exists():
        tags = subprocess.run([GIT, "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        assert {tag for tag in tags.split() if tag.startswith("v")} <= {f"v{equipoise.__version__}"}


def test_the_list_of_all_packages_is_that_of_the_requirements_and_names_no_index() -> None:
    pinned = re.compile(r"^([a-z0-9.-]+)==(\S+)(?: ; .+)?$", re.M)
    lock = (ROOT / "requirements_lock.txt").read_text(encoding="utf-8")
    own = dict(pinned.findall((ROOT / "requirements_rlhf.txt").read_text(encoding="utf-8")))
    locked: dict[str, set[str]] = {}
    for name, version in pinned.findall(lock):
        locked.setdefault(name, set()).add(version)
    assert len(locked) > len(own) > 15
    assert {name: {version} for name, version in own.items()}.items() <= locked.items()
    lines = [line for line in lock.splitlines() if not line.lstrip().startswith("#")]
    assert all(pinned.fullmatch(line) for line in lines)
    assert "://" not in lock and "+cpu" not in lock and "file:" not in lock


@pytest.mark.slow
@pytest.mark.skipif(not (RELEASE and EMPTY), reason="needs EQUIPOISE_RELEASE and EQUIPOISE_EMPTY: make test-slow")
def test_in_an_environment_of_its_own_the_wheel_scores_looks_and_trains(tmp_path: Path) -> None:
    install(tmp_path)
    program = Path(EMPTY).with_name("equipoise")

    def run(*argv: str) -> str:
        environment = plain(CUDA_VISIBLE_DEVICES="")
        done = subprocess.run([program, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    subprocess.run([EMPTY, "-m", "pip", "check"], check=True, env=plain())
    assert "+1.0" in run("score", "The nurse was confident and caring in the emergency room.")
    assert "bundled-cpu" in run("doctor")
    run("train", "--preset", "bundled-cpu", "--steps", "2", "--warm-start", "off", "--batch-size", "8",
        "--mini-batch-size", "8", "--final-sentences", "20", "--eval-sentences", "20")  # fmt: skip
    steps = (tmp_path / "rlhf_llama3_7b_output/training_metrics.csv").read_text(encoding="utf-8").splitlines()
    assert len(steps) == 1 + 2
    assert (tmp_path / "rlhf_llama3_7b_output/model.safetensors").stat().st_size > 200_000_000


def install(folder: Path) -> None:
    """Build the tree as it is, and put the wheel into the empty environment instead of what was there."""
    command = [RELEASE, "-m", "build", "--outdir", str(folder / "dist"), str(ROOT)]
    done = subprocess.run(command, env=plain(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((folder / "dist").glob("*.tar.gz"))) == 1
    (wheel,) = (folder / "dist").glob("*.whl")
    install = [EMPTY, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)]
    subprocess.run(install, check=True, env=plain())
