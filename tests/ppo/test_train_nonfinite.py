"""What happens to a run in which a number is not finite: skipped, gone back, ended, and nothing broken saved."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from equipoise.policy.load import Policy
from equipoise.ppo.train import Outcome, train
from equipoise.protocol.task import PROTOCOL

from .small import checkpoints, events, rows, small_config, tensors


def poisoned(bad_calls: range) -> Any:
    """A reward function that is the protocol's but for one nan at the given calls, counted from 1."""
    calls = 0

    def reward(texts: Any, _: Any) -> list[float]:
        nonlocal calls
        calls += 1
        scores = [PROTOCOL.score(t).reward for t in texts]
        return [math.nan, *scores[1:]] if calls in bad_calls else scores

    return reward


def assert_all_finite(where: Path) -> None:
    for step in checkpoints(where):
        assert all(bool(x.isfinite().all()) for x in tensors(where, step).values() if x.is_floating_point())


def test_a_step_with_a_reward_that_is_no_number_is_skipped_counted_and_kept_for_inspection(
    model: Path, tmp_path: Path
) -> None:
    outcome = train(small_config(model, tmp_path, save_every=1), poisoned(range(3, 4)))
    assert outcome == Outcome("done", 6, 0)
    table = rows(tmp_path)
    assert [row["step"] for row in table] == [1, 2, 4, 5, 6]
    assert [row["guard/skipped"] for row in table] == [0, 0, 1, 1, 1]
    assert events(tmp_path) == ["nonfinite"]
    assert checkpoints(tmp_path) == [1, 2, 4, 5, 6]  # a skipped step is no place to come back to
    dump = load_file(tmp_path / "checkpoints/nonfinite/step-3.safetensors")
    assert int(dump["rewards"].isnan().sum()) == 1 and dump["tokens"].shape == (8, 8)
    note = json.loads((tmp_path / "checkpoints/nonfinite/step-3.json").read_text())
    assert note["step"] == 3 and "reward" in note["problem"] and len(note["prompts"]) == 8
    assert_all_finite(tmp_path)


def test_three_such_steps_in_a_row_go_back_to_the_last_checkpoint_and_on_with_other_numbers(
    model: Path, tmp_path: Path
) -> None:
    outcome = train(small_config(model, tmp_path, sample_every=1), poisoned(range(4, 7)))
    assert outcome == Outcome("done", 6, 0)
    assert events(tmp_path) == ["nonfinite"] * 3 + ["rollback"]
    table = rows(tmp_path)
    assert [row["step"] for row in table] == [1, 2, 3, 4, 5, 6]
    assert [row["guard/skipped"] for row in table] == [0, 0, 3, 3, 3, 3]
    # The same random numbers would lead to the same place.
    other = tmp_path / "other"
    train(small_config(model, other, sample_every=1))
    samples = [(where / "out/samples.jsonl").read_text().splitlines() for where in (tmp_path, other)]
    texts = [[json.loads(line)["text"] for line in lines] for lines in samples]
    assert texts[0][:16] == texts[1][:16] and texts[0][16:24] != texts[1][16:24]
    assert_all_finite(tmp_path)


def test_three_more_after_the_roll_back_end_the_run_with_code_3_and_the_checkpoint_intact(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = train(small_config(model, tmp_path, steps=20), poisoned(range(3, 100)))
    assert (outcome.status, outcome.exit_code) == ("nonfinite", 3)
    assert events(tmp_path) == ["nonfinite"] * 3 + ["rollback"] + ["nonfinite"] * 3 + ["gave_up"]
    assert checkpoints(tmp_path) == [2]
    assert not (tmp_path / "out/model.safetensors").exists()
    assert "checkpoint-2, is intact" in capsys.readouterr().out
    assert_all_finite(tmp_path)
    # And it is: with the cause removed the same command goes on from there.
    assert train(small_config(model, tmp_path, steps=20), poisoned(range(0)), changed_functions=True) == Outcome(
        "done", 20, 0
    )
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 21))


def test_without_a_checkpoint_to_go_back_to_the_run_ends_after_three(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(small_config(model, tmp_path), poisoned(range(1, 100))).exit_code == 3
    assert checkpoints(tmp_path) == []
    assert "no checkpoint had been written" in capsys.readouterr().out


def breaking(policies: list[Policy], part: str, call: int) -> Any:
    """A reward function that at its `call`-th call breaks the first weight whose name holds `part`."""
    calls = 0

    def reward(texts: Any, _: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == call:
            weight = next(p for name, p in policies[-1].model.named_parameters() if part in name)
            with torch.no_grad():
                weight.view(-1)[3] = math.nan
        return [PROTOCOL.score(t).reward for t in texts]

    return reward


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tuning", "part"), [("full", "down_proj"), ("lora", "lora_B")])
def test_a_trained_weight_that_breaks_is_healed_by_the_roll_back(
    model: Path, tmp_path: Path, policies: list[Policy], tuning: str, part: str, dtype: str
) -> None:
    outcome = train(small_config(model, tmp_path, tuning=tuning, dtype=dtype), breaking(policies, part, call=3))
    assert outcome == Outcome("done", 6, 0)
    assert events(tmp_path) == ["nonfinite"] * 3 + ["rollback"]
    assert_all_finite(tmp_path)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert all(bool(file.get_tensor(name).isfinite().all()) for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("when", [1, 3])
def test_a_frozen_weight_that_breaks_ends_the_run_with_code_3_and_nothing_broken_saved(
    model: Path, tmp_path: Path, policies: list[Policy], when: int
) -> None:
    outcome = train(small_config(model, tmp_path), breaking(policies, "down_proj.base_layer", when))
    assert outcome.exit_code == 3
    assert checkpoints(tmp_path) == ([2] if when == 3 else [])
    assert_all_finite(tmp_path)
    assert len(list((tmp_path / "checkpoints/nonfinite").glob("*.json"))) == 3  # steps of the same number share a file


def test_a_trained_weight_that_breaks_in_the_last_step_is_not_saved_either(
    model: Path, tmp_path: Path, policies: list[Policy], capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = train(small_config(model, tmp_path, steps=5, tuning="full"), breaking(policies, "down_proj", call=5))
    assert (outcome.status, outcome.exit_code) == ("nonfinite", 3)
    assert checkpoints(tmp_path) == [2, 4] and not (tmp_path / "out/model.safetensors").exists()
    assert events(tmp_path) == ["nonfinite", "gave_up"]
    assert_all_finite(tmp_path)
    again = train(small_config(model, tmp_path, steps=5, tuning="full"), poisoned(range(0)), changed_functions=True)
    assert again == Outcome("done", 5, 0)
