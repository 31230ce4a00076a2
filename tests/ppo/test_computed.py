"""What a run is computed in: a run that goes on keeps it, whatever `--dtype auto` is by then."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.errors import UserError
from equipoise.policy import load
from equipoise.policy.config import PolicyConfig
from equipoise.ppo import computed as module
from equipoise.ppo.computed import computed, continued
from equipoise.ppo.train import Outcome, train
from equipoise.runs.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from tests.ranked import together

from .small import results, small_config
from .started import work

FAST, FORMER, SLOW = "GenuineIntel avx512_bf16 amx_bf16", "GenuineIntel avx512_bf16", "GenuineIntel avx2"
"""Processors on which `auto` is bfloat16, was so once, and never was."""
AUTO: dict[str, Any] = {"dtype": "auto"}


def forget(where: Path) -> None:
    """Make the checkpoints those of before they said what they were computed in."""
    for checkpoint in (where / "checkpoints").glob("checkpoint-*"):
        (checkpoint / "computed.json").unlink()
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        del manifest["files"]["computed.json"]
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("began", "goes_on", "old"),
    [(FAST, SLOW, False), (SLOW, FAST, False), (FAST, FORMER, True), (SLOW, SLOW, True)],
    ids=["bfloat16", "float32", "bfloat16 of before", "float32 of before"],
)
def test_three_steps_and_three_more_are_six_though_auto_is_another_dtype_by_then(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    began: str,
    goes_on: str,
    old: bool,
) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    monkeypatch.setattr(load, "_cpuinfo", lambda: began)
    train(small_config(model, straight, **AUTO))
    train(small_config(model, parts, steps=3, **AUTO))
    if old:
        forget(parts)
    monkeypatch.setattr(load, "_cpuinfo", lambda: goes_on)
    capsys.readouterr()
    assert train(small_config(model, parts, **AUTO)) == Outcome("done", 6, 0)
    assert results(parts, 6) == results(straight, 6)
    names = ("bfloat16", "float32") if began == FAST else ("float32", "bfloat16")
    line = "the run goes on in {}, as it began, and not in {}, as a new one would here".format(*names)
    assert capsys.readouterr().out.count(line) == (began != goes_on)
    train(small_config(model, tmp_path / "other", dtype=names[1]))
    assert results(tmp_path / "other", 6)["tensors"] != results(straight, 6)["tensors"]


def test_every_process_goes_on_in_what_the_run_began_with(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    monkeypatch.setattr(load, "_cpuinfo", lambda: FAST)
    for where, steps in ((straight, 6), (parts, 3)):
        assert together(2, work(small_config(model, where, steps=steps, **AUTO))) == [0, 0]
    monkeypatch.setattr(load, "_cpuinfo", lambda: SLOW)
    assert together(2, work(small_config(model, parts, **AUTO))) == [0, 0]
    assert results(parts, 6) == results(straight, 6)


def saved(folder: Path, device: str, dtype: str) -> Checkpoint:
    documents = {"computed": {"device": device, "dtype": dtype}}
    return open_checkpoint(save_checkpoint(folder, 1, {"weights": {"w": torch.zeros(1)}}, documents))


@pytest.mark.parametrize(
    ("before", "here", "has", "expected"),
    [
        (("cpu", "bfloat16"), "cpu", "float32", "bfloat16"),
        (("cuda", "bfloat16"), "cpu", "float32", "float32"),
        (("cpu", "float32"), "cuda", "bfloat16", "bfloat16"),
        (("cuda", "float32"), "cuda", "bfloat16", "float32"),
        (("cuda", "bfloat16"), "cuda", "float32", "float32"),  # a GPU without bfloat16
    ],
)
def test_a_run_goes_on_in_its_dtype_on_devices_of_its_kind_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[str, str], here: str, has: str, expected: str
) -> None:
    monkeypatch.setattr(module, "pick_device", lambda _: torch.device(here))
    monkeypatch.setattr(module, "pick_dtype", lambda name, _: getattr(torch, has if name == "auto" else name))
    checkpoint = saved(tmp_path, *before)
    assert computed(continued(PolicyConfig(), checkpoint))["dtype"] == expected
    for named in ("float32", "bfloat16"):
        policy = PolicyConfig(dtype=named)
        assert continued(policy, checkpoint) == policy


@pytest.mark.parametrize(
    "document", [None, [], {}, {"dtype": "float32"}, {"device": "cpu", "dtype": "float16"}, "bfloat16"]
)
def test_a_checkpoint_that_says_it_otherwise_is_refused_in_one_line(tmp_path: Path, document: Any) -> None:
    """As that of a later version may."""
    checkpoint = open_checkpoint(
        save_checkpoint(tmp_path, 1, {"weights": {"w": torch.zeros(1)}}, {"computed": document})
    )
    with pytest.raises(UserError, match=r"checkpoint-1 does not say what it was computed in .*float32 or bfloat16"):
        continued(PolicyConfig(device="cpu"), checkpoint)
