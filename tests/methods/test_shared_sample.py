"""The files and the accounts of every method, written by several processes: those of one."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise import cli
from equipoise.errors import UserError
from equipoise.methods import kl, prompted
from equipoise.methods import sample as sampling
from equipoise.methods.completions import Key
from equipoise.methods.ctrlg import distil
from equipoise.methods.ctrlg import writer as ctrlg_writer
from equipoise.methods.ctrlg.config import CtrlGConfig
from equipoise.methods.gen_filter import Ahead, Draws, Wanted, raw_path
from equipoise.methods.prompted import Written
from equipoise.methods.sample import SampleConfig, sample
from equipoise.policy.sample import NonFiniteLogits
from equipoise.protocol.task import PROTOCOL
from equipoise.runs.ranks import Ranks
from tests.ranked import only_first_has_disk, rank, read_only, together
from tests.tiny import words_folder

from .test_sample import config, costs, quiet, read

ROOT = Path(__file__).resolve().parents[2]
SMALL = CtrlGConfig(shape="free", hidden_states=8, distil_sentences=220, em_passes=1)
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "words", prompt=None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return words_folder(tmp_path_factory.mktemp("models") / "base", seed=5)


def wanted(method: str, models: dict[str, Path], where: Path) -> SampleConfig:
    """A run of the method whose every part has more batches than there are processes."""
    if method == "ctrlg":
        more: dict[str, Any] = {"prompt": "raw", "ctrlg": SMALL, "max_new_tokens": 10, "batch_size": 8, "n": 1}
        return config(models["words"], where / "out.csv", method, kl_sentences=40, **more)
    if method == "gen-filter":
        return config(models["tiny"], where / "out.csv", method, max_new_tokens=16)
    return config(models["tiny"], where / "out.csv", method, base_model=str(models["base"]), kl_sentences=40, n=3)


def writing(asked: SampleConfig, cache: Path) -> Callable[[], int]:
    def work() -> int:
        only_first_has_disk(cache)
        os.environ["EQUIPOISE_CACHE"] = str(cache / str(rank()))
        return cli.run_command(lambda _: sample(asked, quiet).exit_code, [])

    return work


def files(where: Path) -> dict[str, Any]:
    """Everything that the run leaves, but for what time decides."""
    found: dict[str, Any] = {"costs": costs(where / "out.csv")}
    found |= {p.name: p.read_bytes() for p in (where / "out.csv", raw_path(where / "out.csv")) if p.exists()}
    found |= {p.name: p.read_bytes() for p in (where / "0").glob("ctrlg-*")}
    return found


METHODS = ["prompt-only", "gen-filter", "ctrlg"]


@pytest.fixture(scope="module")
def alone(
    tiny_model: Path, words: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, Any], dict[str, Path]]]:
    """What one process writes, and the models."""
    models, made = {"tiny": tiny_model, "words": words, "base": base}, dict[str, Any]()

    def of(method: str) -> tuple[dict[str, Any], dict[str, Path]]:
        if method not in made:
            where = tmp_path_factory.mktemp("alone")
            assert together(1, writing(wanted(method, models, where), where)) == [0]
            made[method] = files(where)
        return made[method], models

    return of


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=SLOW)])
@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_processes_changes_no_byte_of_rows_account_and_hidden_markov_model(
    alone: Any, tmp_path: Path, method: str, size: int
) -> None:
    expected, models = alone(method)
    assert together(size, writing(wanted(method, models, tmp_path), tmp_path)) == [0] * size
    found = files(tmp_path)
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name
    assert "kl" in found["costs"] and found["costs"]["kl"]["value"] != 0
    assert len(found) == {"prompt-only": 2, "gen-filter": 3, "ctrlg": 3}[method]


def on_rank(monkeypatch: pytest.MonkeyPatch, where: Any, number: int, batch: int, act: Callable[[], Any]) -> None:
    """Have `act` called on that rank in place of what `where` draws as its batch of that number."""
    plain, calls = where.sample, []

    def drawing(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if rank() == number and len(calls) == batch:
            act()
        return plain(*given, **named)

    monkeypatch.setattr(where, "sample", drawing)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("method", "where", "number", "batch"),
    [
        ("gen-filter", prompted, 0, 3),
        ("gen-filter", prompted, 1, 4),
        pytest.param("prompt-only", prompted, 1, 2, marks=SLOW),
        pytest.param("prompt-only", kl, 1, 1, marks=SLOW),  # once all rows are there
        pytest.param("ctrlg", distil, 1, 2, marks=SLOW),
        pytest.param("ctrlg", ctrlg_writer, 0, 2, marks=SLOW),
    ],
)
def test_killed_and_continued_with_another_number_files_and_account_are_the_same(
    alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, where: Any, number: int, batch: int
) -> None:
    expected, models = alone(method)
    asked = wanted(method, models, tmp_path)
    with monkeypatch.context() as patched:
        on_rank(patched, where, number, batch, kill)
        found = together(2, writing(asked, tmp_path))
    assert found[number] == -signal.SIGKILL and found[1 - number] == 1  # LostProcess
    others = 3 if method == "gen-filter" else 1
    assert together(others, writing(asked, tmp_path)) == [0] * others
    assert files(tmp_path) == expected


def test_a_signal_to_another_rank_stops_gen_filter_which_goes_on_to_the_same_files(
    alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, models = alone("gen-filter")
    asked = wanted("gen-filter", models, tmp_path)
    with monkeypatch.context() as patched:
        on_rank(patched, prompted, 1, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert together(2, writing(asked, tmp_path)) == [143, 0]
    assert 0 < len(read(raw_path(asked.output))) < expected["costs"]["generations"]
    assert together(2, writing(asked, tmp_path)) == [0, 0]
    assert files(tmp_path) == expected


@pytest.mark.parametrize(
    ("fault", "method"),
    [
        *(pytest.param(fault, "prompt-only", marks=SLOW) for fault in ("no base", "not finite")),
        *((fault, "gen-filter") for fault in ("full disk", "read-only")),
    ],
)
def test_what_goes_wrong_on_one_rank_is_told_once_and_the_same_command_continues(
    alone: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: str,
    method: str,
) -> None:
    expected, models = alone(method)
    asked = wanted(method, models, tmp_path)

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    def broken() -> None:
        raise NonFiniteLogits("non-finite logits")

    def work() -> int:
        if fault == "read-only":
            read_only(tmp_path)
        return writing(asked, tmp_path)()

    with monkeypatch.context() as patched:
        if fault == "no base":
            patched.setattr(sampling, "_prompted", without(models["base"]))
        elif fault == "not finite":  # rows are there by then: the KL is left out
            on_rank(patched, kl, 1, 1, broken)
        elif fault == "full disk":
            on_rank(patched, prompted, 0, 1, fill)
        assert together(2, work) == [0 if fault == "not finite" else 2, 0]
    error = capfd.readouterr().err
    told = {"no base": "process 1: there is no base", "full disk": "File too large", "read-only": "Read-only"}
    assert "Traceback" not in error and error.count("equipoise:") == (fault in told) and told.get(fault, "") in error
    assert (fault in ("no base", "not finite")) == (asked.output.exists() and len(read(asked.output)) == 60)
    assert together(2, writing(asked, tmp_path)) == [0, 0]
    assert files(tmp_path) == expected


def without(base: Path) -> Callable[..., Any]:
    """On rank 1's host there is no such model."""
    plain = sampling._prompted

    def made(config: Any, model: str, *given: Any) -> Any:
        if rank() == 1 and model == str(base):
            raise UserError("there is no base")
        return plain(config, model, *given)

    return made


class Fake:
    """A shared writer that keeps count."""

    def __init__(self, size: int, processes: int) -> None:
        self.size, self.ranks, self.notices, self.calls = size, Ranks(size=processes), (), 0
        self.describe, self.load = str, print

    def __call__(self, keys: Sequence[Key], say: object) -> dict[Key, Written]:
        self.calls += 1
        assert len(keys) <= self.size * self.ranks.size and len(set(keys)) == len(keys)
        return {key: Written(text(key), 3) for key in keys}


def text(key: Key) -> str:
    lucky = key.run_id * 7 % (2 + PROTOCOL.names.index(key.occupation)) == 0
    return f"The {key.occupation} was {'bold and caring' if lucky else 'there'} {key.run_id}."


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 200), st.integers(1, 30), st.integers(2, 5))
def test_what_is_drawn_ahead_changes_nothing_and_is_rarely_thrown_away(
    n: int, budget: int, size: int, processes: int
) -> None:
    found = []
    for shared in (False, True):
        texts: dict[Key, str] = {}
        draws = Draws(texts, Wanted(PROTOCOL, "both", n, budget), size)
        writer = Fake(size, processes)
        ahead = Ahead(writer, draws)  # type: ignore[arg-type]
        batches = []
        for batch in draws:
            written = ahead(batch, print) if shared else {key: Written(text(key), 3) for key in batch}
            assert list(written) == list(batch)
            texts |= {key: one.text for key, one in written.items()}
            batches.append(list(batch))
        found.append((batches, texts))
    assert found[0] == found[1]
    # Whenever occupations have got enough, and no sooner, what is ahead is drawn anew.
    ends = len({o for o in PROTOCOL.names if sum("bold" in t for k, t in texts.items() if k.occupation == o) >= n})
    assert writer.calls <= -(-len(found[0][0]) // processes) + ends


@SLOW
def test_torchrun_and_processes_of_our_own_leave_the_files_of_one(words: Path, tmp_path: Path) -> None:
    """Commands as they are typed, from the sentences of a method to their evaluation."""
    python = [sys.executable, "-m"]
    torchrun = [*python, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "equipoise"]
    plain = [*python, "equipoise"]
    others = zip(PROTOCOL.names, PROTOCOL.names[1:], strict=False)
    lines = ["Occupation,Text", *(f"{o},The {o} was bold and caring in a {other} ." for o, other in others)]
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    found = []
    for name, start, processes in (("1", plain, []), ("own", plain, ["--processes", "2"]), ("torchrun", torchrun, [])):
        (where := tmp_path / name).mkdir()
        for command, ends in typed(words, tmp_path / "data.csv", where):
            whole = [*start, *command, *processes]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
            assert done.returncode == 0 and "Traceback" not in done.stderr, (whole, done.stderr)
            assert done.stdout.count(ends) == 1
        made = ("f.csv", "f.raw.csv", "sft/model.safetensors", "e/methods.csv", "e/occupations.csv")
        found.append({file: (where / file).read_bytes() for file in made} | {"costs": costs(where / "f.csv")})
    assert found[0] == found[1] == found[2]


def typed(words: Path, data: Path, where: Path) -> list[tuple[list[str], str]]:
    """Commands, and what is said at the end of each."""
    on_cpu = ["--device", "cpu", "--dtype", "float32"]
    model = ["--model", str(words), "--prompt", "raw", *on_cpu]
    n, learning = ["--n", "3", "--batch-size", "16", "--max-new-tokens", "12"], ["--lora-rank", "4", "--epochs", "2"]
    judge = ["--judge", str(words), "--bootstrap-draws", "100", *on_cpu, "--output", str(where / "e")]
    return [
        (["sample", *model, *n, "--method", "gen-filter", "--output", str(where / "f.csv")], "is complete"),
        (
            ["sft", "--data", str(data), *model, *learning, "--pieces", "2", "--output-dir", str(where / "sft")],
            "the model is in",
        ),
        (["evaluate", str(where / "f.csv"), *judge], "written to"),
    ]
