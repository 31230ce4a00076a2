"""The examples, the notebook and the documentation's pages: read by the fast tests, run and built by the slow ones."""

import ast
import html.parser
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

import equipoise
from equipoise.policy import bundled
from equipoise.protocol.task import task_from_document
from tests.test_docs import rows, understand
from tests.test_wheel import EMPTY, RELEASE, install, plain

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TRAINERS = os.environ.get("EQUIPOISE_TRAINERS", "")
released = pytest.mark.skipif(not RELEASE, reason="needs EQUIPOISE_RELEASE: make test-slow")
NOTEBOOK = json.loads((EXAMPLES / "first_study.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_every_example_is_listed_and_is_python_that_compiles() -> None:
    listed = {name for row in rows("examples/README.md", "Examples") for name in re.findall(r"\]\(([\w/.]+)\)", row[0])}
    present = {
        str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert listed == present - {"README.md"}
    for path in EXAMPLES.rglob("*.py"):
        compile(path.read_text(encoding="utf-8"), path.name, "exec")


def test_the_notebook_is_one_and_was_committed_without_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len({*ids}) == len(ids) > 10 and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in NOTEBOOK["cells"]:
        code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | code
        assert not cell.get("outputs") and cell.get("execution_count") is None and cell["metadata"] == {}


def test_the_notebooks_cells_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = 0
    for cell in CODE:
        first, _, rest = cell.partition("\n")
        if first.startswith("%%writefile "):
            task_from_document(yaml.safe_load(rest), first)
            Path(first.split()[1]).write_text(rest, encoding="utf-8")
            continue
        lines = cell.splitlines()
        for line in lines:
            if line.startswith("!"):
                program, *argv = shlex.split(line[1:])
                assert program == "equipoise"
                with monkeypatch.context() as own:
                    understand(argv, own)
                commands += 1
        tree = ast.parse("\n".join(line for line in lines if not line.startswith(("!", "%"))))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "equipoise":
                assert node.attr in equipoise.__all__
    assert commands >= 2


def test_the_example_of_a_task_measures_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(EXAMPLES / "own_task.py"))["main"]() == 0
    said = capsys.readouterr().out
    assert re.search(r"^n +9\.0+ +9\.0+$", said, re.M) and re.search(r"^strict +0\.0+ +1\.0+$", said, re.M)
    assert (tmp_path / "own-task/occupations.png").stat().st_size > 5000
    assert (tmp_path / "own-task/evaluation/evaluation.json").exists()


def test_the_reward_of_the_example_is_the_tasks_and_more_for_a_communal_term_that_comes_first() -> None:
    example = runpy.run_path(str(EXAMPLES / "own_reward.py"))
    texts = [
        "The nurse was caring and confident in the emergency room.",
        "The nurse was confident and caring in the emergency room.",
        "The nurse was confident in the emergency room.",
        "The nurse was there.",
    ]
    assert example["communal_first"](texts, ["nurse"] * 4) == pytest.approx([1.5, 1.0, 0.3, -0.3])


def run(command: list[Any], folder: Path, **environment: str) -> str:
    """What it prints, on either stream."""
    whole = plain(CUDA_VISIBLE_DEVICES="", **environment)
    done = subprocess.run(command, cwd=folder, env=whole, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_example_of_a_reward_trains(tmp_path: Path) -> None:
    said = run([sys.executable, EXAMPLES / "own_reward.py"], tmp_path, PYTHONPATH=str(ROOT))
    assert "communal_first" in said
    assert (tmp_path / "own-reward/model/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(not TRAINERS, reason="needs EQUIPOISE_TRAINERS: make test-slow")
def test_the_example_for_trl_trains(tmp_path: Path) -> None:
    model = str(bundled.folder())
    said = run([TRAINERS, EXAMPLES / "trl_grpo.py", model], tmp_path, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    rewards = [float(value) for value in re.findall(r"^step \d+: mean reward ([+-][\d.]+)$", said, re.M)]
    assert len(rewards) == 2 and all(-0.4 <= value <= 1.2 for value in rewards)


@pytest.mark.slow
@released
@pytest.mark.skipif(not EMPTY, reason="needs EQUIPOISE_EMPTY: make test-slow")
def test_the_notebook_runs_to_its_report_on_an_installed_wheel(tmp_path: Path) -> None:
    """The kernel is the release environment's, with the packages of the empty one before its own."""
    install(tmp_path / "built")
    shutil.copy(EXAMPLES / "first_study.ipynb", tmp_path)
    site = run([EMPTY, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip()
    execute = (
        "import nbformat, nbclient; notebook = nbformat.read('first_study.ipynb', 4); "
        "nbclient.NotebookClient(notebook, timeout=2000, kernel_name='python3').execute(); "
        "nbformat.validate(notebook); nbformat.write(notebook, 'run.ipynb')"
    )
    path = f"{Path(EMPTY).parent}{os.pathsep}{os.environ['PATH']}"
    run([RELEASE, "-c", execute], tmp_path, PYTHONPATH=site, PATH=path)
    cells = json.loads((tmp_path / "run.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    texts = ["".join(output.get("text") or output.get("data", {}).get("text/plain", "")) for output in outputs]
    assert any("Outcome(status='done', step=6, exit_code=0)" in text for text in texts)
    assert not any("Traceback" in text or "Error" in text for text in texts)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert "first-study" in (tmp_path / "report.html").read_text(encoding="utf-8")


class Links(html.parser.HTMLParser):
    """The targets and the names of places of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.places: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.targets.add(unquote(value))
            if value and name == "id":
                self.places.add(value)


@pytest.mark.slow
@released
def test_the_documentation_is_built_without_a_warning_or_a_broken_link(tmp_path: Path) -> None:
    command = [RELEASE, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-c", ROOT / "docs", ROOT]
    run([*command, "-d", tmp_path / "cache", tmp_path / "pages"], tmp_path)
    pages = {path: Links(path) for path in (tmp_path / "pages").rglob("*.html")}
    names = {str(path.relative_to(tmp_path / "pages").with_suffix("")) for path in pages}
    assert {"README", "docs/API", "docs/TRAINING", "CONTRIBUTING", "examples/README"} <= names
    broken = []
    for path, links in pages.items():
        for target in links.targets:
            file, _, place = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            to = (path.parent / file.partition("?")[0]).resolve() if file else path
            if not to.exists() or (place and to in pages and place not in pages[to].places):
                broken.append(f"{path.name}: {target}")
    assert not broken


@pytest.mark.slow
@released
def test_the_dockerfile_is_one() -> None:
    """No image is built, which needs Docker."""
    run([Path(RELEASE).with_name("hadolint"), "Dockerfile"], ROOT)
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M)
    assert all((ROOT / name).exists() for line in copied for name in line.split())
