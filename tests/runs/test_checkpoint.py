"""Checkpoints against real kills. They must never load something untrue."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings

from equipoise.errors import NonFiniteError, UserError
from equipoise.runs import checkpoint as module
from equipoise.runs.checkpoint import Json, list_checkpoints, newest, prune, save_checkpoint
from equipoise.runs.tensors import DTYPES, encode
from tests.runs.checkpoints import assert_of_one_step, content, save, visible_and_hidden

# Reads one job (Python code) a line and runs it in a fork of itself, so that torch is imported once for all kills.
FORK_SERVER = """
import itertools, os, signal, sys
from pathlib import Path
import torch
from equipoise.runs.checkpoint import newest, prune, save_checkpoint
from tests.killing import kill_before
def state(step, size=5000):
    fill = lambda: torch.full((size,), float(step))
    return ({"model": {"a": fill(), "b": fill()}, "optimizer": {"m": fill()}}, {"loop": {"step": step}})
for job in sys.stdin:
    child = os.fork()
    if not child:
        code = 1
        try:
            exec(eval(job))
            code = 0
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""

# Saves (each step twice, to hit replacing too) and prunes for ever; `acknowledged` holds the last step that returned.
SAVE_FOR_EVER = """
last = newest(folder)
acknowledged = os.open(folder.parent / "acknowledged", os.O_RDWR | os.O_CREAT)
for step in itertools.count(last.step + 1 if last else 1):
    for _ in range(2):
        save_checkpoint(folder, step, *state(step))
        os.pwrite(acknowledged, b"%08d" % step, 0)
    prune(folder, keep_last=3, keep_every=10)
"""

# Dies before the n-th operation on the file system that Python reports to audit hooks.
DIE_BEFORE = """
def die(event, args, left=[{n}]):
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "shutil.rmtree"):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
os.fsync = lambda descriptor: None  # a kill loses no written byte; only a power cut would
"""


class ForkServer:
    def __init__(self) -> None:
        command, root, pipe = [sys.executable, "-c", FORK_SERVER], Path(__file__).parents[2], subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe, text=True)

    def start(self, folder: Path, code: str) -> int:
        """Run `code` in a new process with `folder` defined; its process id."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(repr(f"folder = Path({str(folder)!r})\n{code}") + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """The wait status of the process that was started last."""
        assert self._process.stdout
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=10)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


# Killed for real


def test_after_a_kill_between_any_two_calls_the_newest_checkpoint_is_whole_and_no_acknowledged_one_is_lost(
    server: ForkServer, tmp_path: Path
) -> None:
    folder, draw, interrupted = tmp_path / "checkpoints", random.Random(0), 0
    save(folder, 0)
    for _ in range(25):
        server.start(folder, f"kill_before({draw.randrange(1, 3000)})\n{SAVE_FOR_EVER}")
        assert os.WTERMSIG(server.wait()) == signal.SIGKILL
        acknowledged = tmp_path / "acknowledged"
        interrupted += bool(visible_and_hidden(folder)[1])
        assert assert_of_one_step(folder) >= int(acknowledged.read_text() or 0 if acknowledged.exists() else 0)
        assert not visible_and_hidden(folder)[1], "leftovers are cleared when the folder is opened"
    assert interrupted >= 5, "the kills fell between saves, not into them"


@pytest.mark.parametrize(
    "action",
    [
        "save_checkpoint(folder, 3, *state(3))",
        "save_checkpoint(folder, 2, *state(2, size=50))",
        "prune(folder, keep_last=1, keep_every=0)",
    ],
    ids=["new", "replace", "prune"],
)
def test_a_death_before_each_single_file_operation_leaves_whole_checkpoints_only(
    server: ForkServer, tmp_path: Path, action: str
) -> None:
    before, folder = tmp_path / "before", tmp_path / "checkpoints"
    save(before, 1)
    save(before, 2)
    for n in range(1, 200):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        server.start(folder, DIE_BEFORE.format(n=n) + action)
        status = server.wait()
        # Even before anything is cleared: what counts is whole, and so is what clearing might restore.
        assert all(isinstance(module._open_verified(path), module.Checkpoint) for path in list_checkpoints(folder))
        for path in folder.glob(".replaced-2"):
            assert content(path) == content(before / "checkpoint-2")
        assert_of_one_step(folder)
        visible, hidden = visible_and_hidden(folder)
        assert "checkpoint-2" in visible and visible <= {"checkpoint-1", "checkpoint-2", "checkpoint-3"} and not hidden
        if status == 0:
            break
    assert status == 0 and n > 10, (status, n)


def test_a_running_save_is_left_alone_by_readers_and_waited_for_by_writers(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    stop_in_save = "sys.addaudithook(lambda event, args: event == 'open' and '.saving-2/manifest' in str(args[0]) and "
    child = server.start(
        tmp_path, stop_in_save + "os.kill(os.getpid(), signal.SIGSTOP))\nsave_checkpoint(folder, 2, *state(2))"
    )
    while not Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].startswith(" T"):
        time.sleep(0.005)
    monkeypatch.setattr(module, "LOCK_WAIT_S", 0.1)
    try:
        assert assert_of_one_step(tmp_path) == 1
        assert visible_and_hidden(tmp_path)[1] == {".saving-2"}
        with pytest.raises(UserError, match="another process has been writing checkpoints"):
            save(tmp_path, 3)
    finally:
        os.kill(child, signal.SIGCONT)
        status = server.wait()
    assert status == 0
    assert assert_of_one_step(tmp_path) == 2


# What is written


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    )
)
def test_the_safetensors_library_reads_the_same_tensors_and_every_one_is_aligned(
    specs: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    tensors = {name: torch.randint(0, 100, shape).to(dtype) for name, (dtype, shape) in specs.items()}
    written = b"".join(encode(tensors))
    loaded = safetensors.torch.load(written)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    length = int.from_bytes(written[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(written[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % tensors[name].element_size() == 0


def test_shared_expanded_transposed_and_gradient_carrying_tensors_come_back_equal(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "tied": base,
        "row": base[1],
        "transposed": base.t(),
        "expanded": torch.tensor([[2.0]]).expand(3, 5),
        "parameter": torch.nn.Parameter(base.bfloat16()),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
    }
    save_checkpoint(tmp_path, 0, {"all": tensors, "none": {}}, {})
    found = newest(tmp_path)
    assert found is not None and found.tensors("none") == {}
    loaded = found.tensors("all")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name


def test_documents_come_back_exactly(tmp_path: Path) -> None:
    document: dict[str, Json] = {
        "kl_coef": 0.1 + 0.2,
        "tiny": 5e-324,
        "state": [2**64 - 1, -1],
        "text": 'The "nurse" – ☃\n\x00',
        "none": None,
    }
    save_checkpoint(tmp_path, 4, {}, {"loop": document, "plain": [True, "x"]})
    found = newest(tmp_path)
    assert found is not None and found.document("loop") == document and found.document("plain") == [True, "x"]


def test_asking_for_a_file_the_checkpoint_lacks_names_those_it_has(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = newest(tmp_path)
    assert found is not None
    with pytest.raises(UserError, match=r"checkpoint-1 holds no adapter\.safetensors, only loop\.json, model\.saf"):
        found.tensors("adapter")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_non_finite_tensor_is_named_and_nothing_is_written(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    poisoned = torch.zeros(3, 4000, dtype=dtype)
    poisoned[1, 3999] = value
    with pytest.raises(NonFiniteError, match=r"tensor exp_avg of optimizer"):
        save_checkpoint(tmp_path / "new", 1, {"model": {"w": torch.ones(2)}, "optimizer": {"exp_avg": poisoned}}, {})
    assert not (tmp_path / "new").exists()


def test_a_non_finite_number_in_a_document_is_located_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"loop\.kl\[1\] is nan"):
        save_checkpoint(tmp_path / "new", 1, {}, {"loop": {"kl": [0.1, float("nan")]}})
    assert not (tmp_path / "new").exists()


def test_large_finite_values_are_not_mistaken_for_infinities(tmp_path: Path) -> None:
    extremes = {
        str(t): torch.tensor([torch.finfo(t).max, torch.finfo(t).min], dtype=t) for t in (torch.float16, torch.float32)
    }
    save_checkpoint(tmp_path, 1, {"model": extremes}, {})


# The folder


def test_the_same_step_is_replaced_by_the_later_save(tmp_path: Path) -> None:
    save(tmp_path, 5, size=10)
    save(tmp_path, 5, size=20)
    found = newest(tmp_path)
    assert found is not None and found.tensors("model")["w"].numel() == 20
    assert visible_and_hidden(tmp_path) == ({"checkpoint-5"}, set())


def test_tensors_read_lazily_outlive_the_replacement_and_the_pruning_of_their_file(tmp_path: Path) -> None:
    save(tmp_path, 5)
    found = newest(tmp_path)
    assert found is not None
    held = found.tensors("model")["w"]
    save_checkpoint(tmp_path, 5, {"model": {"w": torch.zeros(5000)}}, {})
    save(tmp_path, 6)
    prune(tmp_path, 1, 0)
    assert held.eq(5).all()


def test_checkpoints_are_ordered_by_number_and_other_names_do_not_count(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        save(tmp_path, step)
    for name in (
        "checkpoint-0200",
        "checkpoint-300.bak",
        "checkpoint-",
        "checkpoint--1",
        "checkpoint-٣",
        "my-checkpoint-400",
    ):
        shutil.copytree(tmp_path / "checkpoint-9", tmp_path / name)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert assert_of_one_step(tmp_path) == 100


def test_no_folder_and_an_empty_folder_have_no_newest_and_are_not_created_or_changed(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") is None and list_checkpoints(tmp_path / "absent") == []
    assert newest(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 50)
    (save(tmp_path, 100) / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert assert_of_one_step(tmp_path) == 50
    assert "checkpoint-100 is incomplete" in caplog.text


def test_a_save_sets_an_incomplete_checkpoint_of_its_step_aside_and_deletes_nothing_of_it(tmp_path: Path) -> None:
    for number in (1, 2):
        foreign = tmp_path / "checkpoint-100"
        foreign.mkdir()
        (foreign / "trainer_state.json").write_text(f"not ours {number}")
        save(tmp_path, 100)
        shutil.rmtree(foreign)
    assert (tmp_path / "incomplete-checkpoint-100-1" / "trainer_state.json").read_text() == "not ours 1"
    assert (tmp_path / "incomplete-checkpoint-100-2" / "trainer_state.json").read_text() == "not ours 2"


def test_pruning_keeps_the_newest_few_and_the_multiples(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400, 450, 500):
        save(tmp_path, step, size=4)
    assert [path.name for path in prune(tmp_path, keep_last=2, keep_every=200)] == ["checkpoint-100", "checkpoint-300"]
    assert visible_and_hidden(tmp_path) == ({f"checkpoint-{step}" for step in (200, 400, 450, 500)}, set())
    prune(tmp_path, keep_last=0, keep_every=0)
    assert visible_and_hidden(tmp_path) == ({"checkpoint-500"}, set())
    assert prune(tmp_path, 1, 0) == [] and prune(tmp_path / "absent", 1, 0) == []
