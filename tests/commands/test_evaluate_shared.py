"""`equipoise evaluate` by several processes: the files of one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from equipoise import cli
from equipoise.commands import evaluate as commands
from equipoise.errors import UserError
from equipoise.evaluation import fluency
from equipoise.evaluation.files import FILES
from tests.ranked import only_first_has_disk, rank, read_only, together
from tests.tiny import WORDS, words_folder

from .completions import completions


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two files, a judge, and a classifier that is indifferent to which way texts are batched."""
    folder = tmp_path_factory.mktemp("given")
    judge = words_folder(folder / "judge")
    classifier = words_folder(folder / "classifier")
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(classifier)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=1, eos_token_id=1, id2label={0: "unacceptable", 1: "acceptable"}, initializer_range=0.5,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(classifier)
    files = {"a": completions(folder / "a.csv", "Prompt-Only", 1), "b": completions(folder / "b.csv", "RLHF", 7, n=12)}
    return {**files, "judge": str(judge), "classifier": str(classifier)}


def evaluating(given: dict[str, str], where: Path) -> Callable[[], int]:
    argv = [given["a"], given["b"], "--judge", given["judge"], "--acceptability", given["classifier"]]
    argv += ["--output", str(where), "--device", "cpu", "--dtype", "float32", "--bootstrap-draws", "100"]

    def work() -> int:
        only_first_has_disk(where)
        return cli.run_command(commands.main, argv)

    return work


def measured(where: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: (where / name).read_bytes() for name in FILES}
    document = json.loads(found["evaluation.json"])
    del document["provenance"]["date"], document["settings"]["output"]
    return found | {"evaluation.json": document}


@pytest.fixture(scope="module")
def alone(given: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    where = tmp_path_factory.mktemp("alone")
    assert together(1, evaluating(given, where)) == [0]
    return measured(where)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_number_of_processes_changes_no_byte_of_the_files(
    given: dict[str, str], tmp_path: Path, alone: dict[str, Any], capfd: pytest.CaptureFixture[str], size: int
) -> None:
    assert together(size, evaluating(given, tmp_path)) == [0] * size
    assert measured(tmp_path) == alone
    assert capfd.readouterr().out.count("written to") == 1
    assert b"NLL@judge" in alone["rows.csv"] and b"Acceptable@classifier" in alone["rows.csv"]


@pytest.mark.parametrize(
    "fault",
    ["other", "read-only", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("missing", "not finite"))],
)
def test_what_goes_wrong_on_one_rank_ends_all_with_one_line(
    given: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    plain = fluency.Scorer.__init__

    def init(self: Any, *settings: Any) -> None:
        if rank() == 1 and fault == "missing":
            raise UserError("there is no such judge")
        plain(self, *settings)
        if rank() == 1 and fault == "other":
            self.model.lm_head.weight.data[3, 4] += 1e-6
        if fault == "not finite":
            self.model.lm_head.weight.data[3, 4] = torch.nan

    monkeypatch.setattr(fluency.Scorer, "__init__", init)

    def work() -> int:
        if fault == "read-only":
            read_only(tmp_path)
        return evaluating(given, tmp_path / "out")()

    assert together(2, work) == [2, 0]
    error = capfd.readouterr().err
    told = {
        "missing": "process 1: there is no such judge",
        "other": "process 1 is not as process 0: it has other weights",
        "not finite": "gives numbers that are not finite",
        "read-only": "Read-only file system",
    }
    assert error.count("equipoise:") == 1 and told[fault] in error and "Traceback" not in error
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
